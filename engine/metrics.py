"""A worker's Prometheus metrics. vLLM's names where the meaning is the same, `cloudmatrix_` for what is only ours.

Buckets start lower than vLLM's: a small model on a CPU steps in milliseconds.
"""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from fabric.ledger import Transfer

_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
_FAST_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1)
_SECONDS = (*_FAST_SECONDS, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
_STEP_SECONDS = (0.001, 0.002, 0.003, 0.004, 0.006, 0.008, 0.012, 0.016, 0.025, 0.05, 0.1, 0.2, 0.5, 1.0, 2.5)


class WorkerMetrics:
    """All metrics of one worker in a registry of their own, so that several workers can live in one process."""

    def __init__(self, model_name: str, worker_id: str) -> None:
        self.registry = CollectorRegistry()
        self._labels = {"model_name": model_name, "engine": worker_id}
        self.num_requests_running = self._gauge("vllm:num_requests_running", "Sequences that hold KV blocks")
        self.num_requests_waiting = self._gauge(
            "vllm:num_requests_waiting", "Sequences waiting for admission"
        )
        self._waiting_by_reason = Gauge(
            "vllm:num_requests_waiting_by_reason",
            "Sequences that wait for room (capacity) or for KV on its way (deferred)",
            [*self._labels, "reason"],
            registry=self.registry,
        )
        self._cache_config = Gauge(
            "vllm:cache_config_info",
            "How the KV cache is laid out",
            [*self._labels, "block_size", "num_gpu_blocks"],
            registry=self.registry,
        )
        self.kv_cache_usage_perc = self._gauge(
            "vllm:kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1"
        )
        self.kv_blocks_idle = self._gauge(
            "cloudmatrix_kv_blocks_idle", "Cached KV blocks that nobody uses now"
        )
        self.prompt_tokens = self._counter("vllm:prompt_tokens", "Prompt tokens of sequences begun here")
        self._prompt_tokens_by_source = Counter(
            "vllm:prompt_tokens_by_source",
            "Prompt tokens of ended requests by where their KV came from",
            [*self._labels, "source"],
            registry=self.registry,
        )
        self.generation_tokens = self._counter("vllm:generation_tokens", "Tokens generated")
        self.computed_tokens = self._counter("cloudmatrix_computed_tokens", "Rows run through the model")
        self.prefix_cache_queries = self._counter(
            "vllm:prefix_cache_queries", "Tokens looked up in local blocks"
        )
        self.prefix_cache_hits = self._counter("vllm:prefix_cache_hits", "Tokens found in local blocks")
        self.external_queries = self._counter(
            "vllm:external_prefix_cache_queries", "Tokens looked for in the pool"
        )
        self.external_hits = self._counter(
            "vllm:external_prefix_cache_hits", "Tokens whose KV came from the pool"
        )
        self.num_preemptions = self._counter("vllm:num_preemptions", "Sequences that gave their blocks back")
        self.iteration_tokens = self._histogram(
            "vllm:iteration_tokens_total", "Rows per engine step", _TOKENS
        )
        self.step_seconds = self._histogram(
            "cloudmatrix_step_seconds", "Seconds per engine step", _STEP_SECONDS
        )
        self.queue_seconds = self._histogram(
            "vllm:request_queue_time_seconds", "Seconds from receipt to admission", _SECONDS
        )
        self.spec_drafts = self._counter("vllm:spec_decode_num_drafts", "Drafts verified")
        self.spec_draft_tokens = self._counter("vllm:spec_decode_num_draft_tokens", "Tokens guessed")
        self.spec_accepted_tokens = self._counter(
            "vllm:spec_decode_num_accepted_tokens", "Guesses that were right"
        )
        self._success = Counter(
            "vllm:request_success",
            "Requests brought to an end",
            [*self._labels, "finished_reason"],
            registry=self.registry,
        )
        self._failed = Counter(
            "cloudmatrix_requests_failed", "Requests refused", [*self._labels, "code"], registry=self.registry
        )
        kinds = [*self._labels, "kind"]
        self._kv_bytes = Counter("cloudmatrix_kv_bytes", "KV bytes moved", kinds, registry=self.registry)
        self._kv_seconds = Counter(
            "cloudmatrix_kv_measured_seconds", "Seconds measured for them", kinds, registry=self.registry
        )
        self._kv_ub_seconds = Counter(
            "cloudmatrix_kv_modelled_ub_seconds",
            "Seconds modelled for them over UB",
            kinds,
            registry=self.registry,
        )
        self._kv_roce_seconds = Counter(
            "cloudmatrix_kv_modelled_roce_seconds",
            "Seconds modelled for them over RoCE",
            kinds,
            registry=self.registry,
        )
        self._kv_failed = Counter(
            "cloudmatrix_kv_failed_blocks",
            "Blocks not fetched or not published",
            [*self._labels, "direction"],
            registry=self.registry,
        )

    def watch(
        self,
        *,
        running: Callable[[], float],
        waiting: Callable[[], float],
        loading: Callable[[], float],
        usage: Callable[[], float],
        idle_blocks: Callable[[], float],
    ) -> None:
        """Read the gauges when they are asked for instead of setting them every step."""
        self.num_requests_running.set_function(running)
        self.num_requests_waiting.set_function(waiting)
        for reason, number in (("capacity", waiting), ("deferred", loading)):
            self._waiting_by_reason.labels(**self._labels, reason=reason).set_function(number)
        self.kv_cache_usage_perc.set_function(usage)
        self.kv_blocks_idle.set_function(idle_blocks)

    def laid_out(self, *, block_tokens: int, num_blocks: int) -> None:
        """The KV cache has so many blocks; vLLM's dashboards look for them under the name of its GPU."""
        labels = {"block_size": str(block_tokens), "num_gpu_blocks": str(num_blocks)}
        self._cache_config.labels(**self._labels, **labels).set(1)

    def prompted(self, *, num_local: int, num_fetched: int, num_computed: int) -> None:
        """Of the prompt of a request that is over, so many tokens' KV was here, came from the pool, was computed."""
        sources = {
            "local_cache_hit": num_local,
            "external_kv_transfer": num_fetched,
            "local_compute": num_computed,
        }
        for source, number in sources.items():
            self._prompt_tokens_by_source.labels(**self._labels, source=source).inc(number)

    def stepped(self, num_rows: int, seconds: float) -> None:
        """An engine step was run."""
        self.computed_tokens.inc(num_rows)
        self.iteration_tokens.observe(num_rows)
        self.step_seconds.observe(seconds)

    def drafted(self, num_tokens: int, num_accepted: int) -> None:
        """A draft was verified."""
        self.spec_drafts.inc()
        self.spec_draft_tokens.inc(num_tokens)
        self.spec_accepted_tokens.inc(num_accepted)

    def finished(self, reason: str) -> None:
        """A request came to its end here; `reason` is a finish reason or `handoff`."""
        self._success.labels(**self._labels, finished_reason=reason).inc()

    def failed(self, code: str) -> None:
        """A request was refused."""
        self._failed.labels(**self._labels, code=code).inc()

    def moved(self, transfers: list[Transfer], num_failed: int, direction: str) -> None:
        """Blocks went to or came from the pool."""
        for transfer in transfers:
            labels = {**self._labels, "kind": transfer.kind}
            self._kv_bytes.labels(**labels).inc(transfer.num_bytes)
            self._kv_seconds.labels(**labels).inc(transfer.measured_s or 0.0)
            self._kv_ub_seconds.labels(**labels).inc(transfer.ub_s)
            self._kv_roce_seconds.labels(**labels).inc(transfer.roce_s)
        if num_failed:
            self._kv_failed.labels(**self._labels, direction=direction).inc(num_failed)

    def exposition(self) -> bytes:
        """The registry in Prometheus' text format."""
        return generate_latest(self.registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(name, text, list(self._labels), registry=self.registry).labels(**self._labels)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(name, text, list(self._labels), registry=self.registry).labels(**self._labels)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, text, list(self._labels), buckets=buckets, registry=self.registry).labels(
            **self._labels
        )
