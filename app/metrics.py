"""The gateway's Prometheus metrics: vLLM's names where the meaning is vLLM's, our own under `cloudmatrix_`.

Bucket lists are vLLM's with finer low ends added, because a small model answers in milliseconds. Everything is
measured at the gateway, on its monotonic clock; the workers export their own side on their own `/metrics`.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from app.admission.admission import Admission
from app.requests.record import RequestRecord, public_miss_reason
from app.routing.dispatcher import Dispatcher
from app.routing.peers import Peers
from app.routing.workers import Workers

if TYPE_CHECKING:
    from app.requests.generation import Order

disable_created_metrics()  # type: ignore[no-untyped-call]  # prometheus_client leaves it unannotated

TTFT_S = (
    *(
        0.001,
        0.0025,
        0.005,
        0.01,
        0.02,
        0.04,
        0.06,
        0.08,
        0.1,
        0.25,
        0.5,
        0.75,
        1,
        2.5,
        5,
        7.5,
        10,
        20,
        40,
        80,
    ),
    *(160, 640, 2560),
)
TOKEN_S = (
    *(
        0.0005,
        0.001,
        0.002,
        0.003,
        0.005,
        0.0075,
        0.01,
        0.015,
        0.025,
        0.05,
        0.075,
        0.1,
        0.15,
        0.2,
        0.3,
        0.4,
        0.5,
    ),
    *(0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80),
)
REQUEST_S = (
    *(
        0.0025,
        0.005,
        0.01,
        0.025,
        0.05,
        0.1,
        0.2,
        0.3,
        0.5,
        0.8,
        1,
        1.5,
        2,
        2.5,
        5,
        10,
        15,
        20,
        30,
        40,
        50,
        60,
        120,
        240,
        480,
    ),
    *(960, 1920, 7680),
)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
CHOICES = (1, 2, 5, 10, 20)
MAX_LABELS = 100
"""Tenants with a time series of their own."""


class LeanHistogram(Collector):
    """A histogram that costs one bisection per observation, without locks: it belongs to one event loop.

    One of them is fed once for every chunk of every stream, the others ten times a request.
    """

    def __init__(self, name: str, documentation: str, label: str, buckets: tuple[float, ...]) -> None:
        self._name, self._documentation, self._label = name, documentation, label
        self._buckets = buckets
        self._counts = [0] * (len(buckets) + 1)
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Count `value`, `times` over."""
        self._counts[bisect_left(self._buckets, value)] += times
        self._sum += value * times

    def collect(self) -> Iterable[Metric]:
        """For the registry."""
        family = HistogramMetricFamily(self._name, self._documentation, labels=["model_name"])
        total, rows = 0, []
        for bound, count in zip([*map(str, map(float, self._buckets)), "+Inf"], self._counts, strict=True):
            total += count
            rows.append((bound, total))
        family.add_metric([self._label], rows, self._sum)
        return [family]


class GatewayMetrics:
    """Everything the gateway counts, in a registry of its own."""

    def __init__(self, model: str) -> None:
        self.registry = CollectorRegistry()
        self._model = model
        self.inter_token_latency = self._histogram(
            "vllm:inter_token_latency_seconds", "Time between tokens of a stream.", TOKEN_S
        )
        self._ttft = self._histogram("vllm:time_to_first_token_seconds", "Arrival to first token.", TTFT_S)
        self._tpot = self._histogram(
            "vllm:request_time_per_output_token_seconds",
            "(end - first token) / (output tokens - 1), per request of one choice.",
            TOKEN_S,
        )
        self._e2e = self._histogram("vllm:e2e_request_latency_seconds", "Arrival to last byte.", REQUEST_S)
        self._decode = self._histogram("vllm:request_decode_time_seconds", "First to last token.", REQUEST_S)
        self._queue = self._histogram("vllm:request_queue_time_seconds", "Waiting on workers.", REQUEST_S)
        self._prefill = self._histogram("vllm:request_prefill_time_seconds", "Prefill on workers.", REQUEST_S)
        self._inference = self._histogram(
            "vllm:request_inference_time_seconds", "Prefill and decode on workers.", REQUEST_S
        )
        self._publish = self._histogram(
            "cloudmatrix_request_publish_seconds", "Waiting for KV to reach the pool.", TOKEN_S
        )
        self._fetch = self._histogram(
            "cloudmatrix_request_fetch_seconds", "Waiting for KV from the pool.", TOKEN_S
        )
        self._modelled = Counter(
            "cloudmatrix_request_transfer_modelled_seconds",
            "Modelled seconds of the KV moved for requests, by plane; not measured.",
            ["plane"],
            registry=self.registry,
        )
        self._prompt = self._histogram("vllm:request_prompt_tokens", "Prompt tokens of a request.", TOKENS)
        self._generated = self._histogram(
            "vllm:request_generation_tokens", "Output tokens of a request.", TOKENS
        )
        self._wanted = self._histogram("vllm:request_params_max_tokens", "max_tokens of a request.", TOKENS)
        self._n = self._histogram("vllm:request_params_n", "n of a request.", CHOICES)
        self._prompt_tokens = self._total("vllm:prompt_tokens", "Prompt tokens served.")
        self._generation_tokens = self._total("vllm:generation_tokens", "Output tokens produced.")
        self._cached_tokens = self._total("vllm:prompt_tokens_cached", "Prompt tokens whose KV was found.")
        self._success = self._counter("vllm:request_success", "Choices ended, by reason.", "finished_reason")
        self._rejected = self._counter("vllm:admission_rejections", "Requests turned away.", "reason")
        self._requests = Counter(
            "cloudmatrix_http_requests",
            "Answers by endpoint and status.",
            ["endpoint", "status"],
            registry=self.registry,
        )
        self._ended = self._counter("cloudmatrix_requests", "Requests ended, by how.", "status")
        self._retries = self._total(
            "cloudmatrix_dispatch_retries", "Submits beyond those that a request needs when nothing fails."
        )
        self._moved = Counter(
            "cloudmatrix_request_transfer_bytes",
            "KV bytes moved for requests.",
            ["kind"],
            registry=self.registry,
        )
        self._written = self._total(
            "cloudmatrix_cache_write_tokens", "Prompt tokens whose KV requests brought into the pool."
        )
        self._misses = self._counter(
            "cloudmatrix_pool_misses",
            "Prefixes that ended early in the pool, by why the next block was missing.",
            "reason",
        )
        self._left = self._total(
            "cloudmatrix_pool_blocks_left",
            "Blocks that the pool had and that were computed, as the faster way.",
        )
        self._predicted = self._total(
            "cloudmatrix_predicted_cached_tokens", "Prompt tokens that the pool lookup promised."
        )

    def observe(self, record: RequestRecord, order: "Order") -> None:
        """Count a request that has ended."""
        self._ended.labels(self._model, record.status).inc()
        if record.ended_at is None:
            return
        self._e2e.observe(record.ended_at - record.arrived_at)
        self._prompt.observe(record.prompt_tokens)
        self._generated.observe(record.completion_tokens)
        self._wanted.observe(max(sampling.max_tokens for sampling in order.sampling))
        self._n.observe(order.n)
        self._prompt_tokens.inc(record.prompt_tokens)
        self._generation_tokens.inc(record.completion_tokens)
        self._cached_tokens.inc(record.cached_tokens or 0)
        self._predicted.inc(record.predicted_cached_tokens or 0)
        self._written.inc(record.written_tokens or 0)
        for reuse, _, _ in record.reuses:
            reason = public_miss_reason(reuse.miss_reason)
            if reason is not None:
                self._misses.labels(self._model, reason).inc()
            self._left.inc(reuse.found_blocks - reuse.chosen_blocks)
        for reason in record.finish_reasons.values():
            self._success.labels(self._model, reason).inc()
        for transfer in record.transfers:
            self._moved.labels(transfer.kind).inc(transfer.num_bytes)
            self._modelled.labels("ub").inc(transfer.ub_s)
            self._modelled.labels("roce").inc(transfer.roce_s)
        for histogram, phases in (
            (self._queue, ("queue",)),
            (self._prefill, ("prefill",)),
            (self._inference, ("prefill", "decode")),
            (self._publish, ("publish",)),
            (self._fetch, ("fetch",)),
        ):
            seconds = record.seconds_in(*phases)
            if seconds is not None:
                histogram.observe(seconds)
        if record.first_token_at is not None:
            self._ttft.observe(record.first_token_at - record.arrived_at)
            decode_s = record.ended_at - record.first_token_at
            self._decode.observe(decode_s)
            if record.num_choices == 1 and record.completion_tokens > 1:
                self._tpot.observe(decode_s / (record.completion_tokens - 1))
        self._retries.inc(record.num_retries)

    def answered(self, endpoint: str, status: int) -> None:
        """Count an HTTP answer."""
        self._requests.labels(endpoint, str(status)).inc()

    def rejected(self, reason: str) -> None:
        """Count a request that was not admitted."""
        self._rejected.labels(self._model, reason).inc()

    def expose(self) -> bytes:
        """The text that Prometheus scrapes."""
        return generate_latest(self.registry)

    def watch(self, dispatcher: Dispatcher, workers: Workers, peers: Peers) -> None:
        """Export gauges of what is under way and of the workers' announced load."""
        self.registry.register(_WorkerGauges(workers, self._model))
        in_flight = Gauge(
            "cloudmatrix_requests_in_flight", "Requests admitted and not answered.", registry=self.registry
        )
        in_flight.set_function(lambda: dispatcher.gate.admission.num_requests)
        parked = Gauge(
            "cloudmatrix_choices_parked", "Choices waiting for a worker to appear.", registry=self.registry
        )
        parked.set_function(lambda: dispatcher.num_parked)
        others = Gauge(
            "cloudmatrix_other_gateways", "Other gateways that this one knows of.", registry=self.registry
        )
        others.set_function(lambda: len(peers.others))
        elsewhere = Gauge(
            "cloudmatrix_other_gateways_sequences",
            "Sequences that other gateways have with the workers.",
            registry=self.registry,
        )
        elsewhere.set_function(lambda: sum(load.sequences for load in peers.others.values()))
        known = Gauge(
            "cloudmatrix_local_blocks",
            "Blocks that this gateway knows to lie in workers' own caches, since it or another sent the prompt there.",
            registry=self.registry,
        )
        known.set_function(lambda: dispatcher.local_blocks.num_blocks)
        self.registry.register(_AdmissionGauges(dispatcher.gate.admission))

    def _histogram(self, name: str, documentation: str, buckets: tuple[float, ...]) -> LeanHistogram:
        histogram = LeanHistogram(name, documentation, self._model, buckets)
        self.registry.register(histogram)
        return histogram

    def _total(self, name: str, documentation: str) -> Counter:
        """The one series of a counter: looking it up by its label would cost more than counting does."""
        return self._counter(name, documentation).labels(self._model)

    def _counter(self, name: str, documentation: str, *labels: str) -> Counter:
        return Counter(name, documentation, ["model_name", *labels], registry=self.registry)


class _WorkerGauges(Collector):
    def __init__(self, workers: Workers, model: str) -> None:
        self._workers, self._model = workers, model

    def collect(self) -> Iterator[Metric]:
        families = {
            "running": GaugeMetricFamily(
                "vllm:num_requests_running", "Sequences running on a worker.", labels=["model_name", "engine"]
            ),
            "waiting": GaugeMetricFamily(
                "vllm:num_requests_waiting", "Sequences waiting on a worker.", labels=["model_name", "engine"]
            ),
            "kv": GaugeMetricFamily(
                "vllm:kv_cache_usage_perc",
                "Share of a worker's KV blocks in use, 0 to 1.",
                labels=["model_name", "engine"],
            ),
            "up": GaugeMetricFamily(
                "cloudmatrix_worker_routable", "1 while work can be sent there.", labels=["engine", "role"]
            ),
        }
        for worker in self._workers.all():
            record = worker.record
            labels = [record.model, record.id]
            families["running"].add_metric(labels, record.running)
            families["waiting"].add_metric(labels, record.waiting)
            families["kv"].add_metric(labels, record.kv_blocks_used / max(1, record.kv_blocks_total))
            families["up"].add_metric([record.id, record.role], float(worker.is_routable))
        yield from families.values()


class _AdmissionGauges(Collector):
    def __init__(self, admission: Admission) -> None:
        self._admission = admission

    def collect(self) -> Iterator[Metric]:
        admission = self._admission
        queued = GaugeMetricFamily(
            "cloudmatrix_requests_queued", "Requests that wait in the gateway, by tenant.", labels=["tenant"]
        )
        for tenant, number in capped(admission.queued_by_tenant()).items():
            queued.add_metric([tenant], number)
        yield queued
        served = CounterMetricFamily(
            "cloudmatrix_tenant_service_tokens",
            "Virtual tokens (prompt computed + 2 x output) served to a tenant.",
            labels=["tenant"],
        )
        for tenant, tokens in capped(admission.service).items():
            served.add_metric([tenant], tokens)
        yield served
        index = admission.fairness.index()
        fairness = GaugeMetricFamily(
            "cloudmatrix_fairness_index",
            "Jain's index of weighted service among tenants that competed in the last minute; absent when none did.",
        )
        if index is not None:
            fairness.add_metric([], index)
        yield fairness
        yield GaugeMetricFamily(
            "cloudmatrix_sequences_released", "Sequences with the workers.", value=admission.num_sequences
        )
        yield GaugeMetricFamily(
            "cloudmatrix_prompt_tokens_released",
            "Prompt tokens with the workers that are not computed yet.",
            value=admission.prompt_tokens,
        )


def capped(values: Mapping[str, float]) -> dict[str, float]:
    """The largest values by label, at most `MAX_LABELS`; the sum of the others as `other`."""
    ordered = sorted(values.items(), key=lambda item: (-item[1], item[0]))
    shown = dict(ordered[:MAX_LABELS])
    if len(ordered) > MAX_LABELS:
        shown["other"] = sum(value for _, value in ordered[MAX_LABELS:])
    return shown
