"""A peer engine in its own interpreter: a script by itself that speaks JSON lines and imports nothing of ours.

    PEER_PYTHON -I peer_side.py openvino-genai|xllamacpp

Each line on standard input is `{"do": name, …}`; each answer is one line: the result, or `{"error": text}`. Whatever
the peer itself prints goes to standard error.
"""

import importlib
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

CACHE_GB = 2


class OpenVino:
    """OpenVINO GenAI: `LLMPipeline` for one request, `ContinuousBatchingPipeline` with a prefix cache for many."""

    def __init__(self, model_path: str, threads: int) -> None:
        # By name: they exist only in the peer's interpreter, and a type checker of ours never sees them.
        self._np, self._ov, self._genai = map(
            importlib.import_module, ("numpy", "openvino", "openvino_genai")
        )
        self._model_path = model_path
        self._properties = {"INFERENCE_NUM_THREADS": threads}
        self._alone: Any = None
        self._batched: Any = None
        self._next_id = 0

    def one(self, prompt: list[int], output_tokens: int) -> dict[str, float]:
        """One greedy request by the pipeline's own clocks: time to the first token, and of the tokens after it."""
        if self._alone is None:
            self._alone = self._genai.LLMPipeline(self._model_path, "CPU", **self._properties)
        ids = self._tensor(prompt)
        mask = self._ov.Tensor(self._np.ones((1, len(prompt)), self._np.int64))
        result = self._alone.generate(self._genai.TokenizedInputs(ids, mask), self._greedy(output_tokens))
        metrics = result.perf_metrics
        decode_s = metrics.get_tpot().mean / 1e3 * (output_tokens - 1) if output_tokens > 1 else 0.0
        return {"first_s": metrics.get_ttft().mean / 1e3, "decode_s": decode_s}

    def many(self, prompts: list[list[int]], output_tokens: int, concurrency: int) -> dict[str, Any]:
        """A closed loop over the prompts, `concurrency` at once, in process."""
        if self._batched is None:
            self._alone = None
            config = self._genai.SchedulerConfig()
            config.cache_size = CACHE_GB
            config.enable_prefix_caching = True
            self._batched = self._genai.ContinuousBatchingPipeline(
                self._model_path, config, "CPU", self._properties
            )
        config = self._greedy(output_tokens)
        waiting = iter(prompts)
        running: list[dict[str, Any]] = []
        requests: list[dict[str, float]] = []
        num_tokens = 0
        began = time.perf_counter()
        while True:
            while len(running) < concurrency and (prompt := next(waiting, None)) is not None:
                self._next_id += 1
                sent_at = time.perf_counter()
                handle = self._batched.add_request(self._next_id, self._tensor(prompt), config)
                running.append({"handle": handle, "sent_at": sent_at, "first_at": None, "tokens": 0})
            if not running:
                break
            self._batched.step()
            now = time.perf_counter()
            for one in list(running):
                while one["handle"].can_read():
                    one["tokens"] += sum(len(o.generated_ids) for o in one["handle"].read().values())
                    one["first_at"] = one["first_at"] or now
                if one["tokens"] >= output_tokens:
                    running.remove(one)
                    num_tokens += one["tokens"]
                    tpot_s = (now - one["first_at"]) / (one["tokens"] - 1)
                    requests.append({"ttft_s": one["first_at"] - one["sent_at"], "tpot_s": tpot_s})
        return {
            "duration_s": time.perf_counter() - began,
            "output_tokens": num_tokens,
            "requests": requests,
        }

    def _tensor(self, prompt: list[int]) -> Any:
        return self._ov.Tensor(self._np.array([prompt], self._np.int64))

    def _greedy(self, output_tokens: int) -> Any:
        config = self._genai.GenerationConfig()
        config.do_sample = False
        config.ignore_eos = True
        config.apply_chat_template = False
        config.max_new_tokens = output_tokens
        return config


class LlamaCpp:
    """llama.cpp through `xllamacpp`: its own server, one slot for one request, as many slots as asked for many."""

    def __init__(self, model_path: str, threads: int) -> None:
        self._model_path, self._threads = model_path, threads
        self._server: Any = None
        self._slots = 0

    def one(self, prompt: list[int], output_tokens: int) -> dict[str, float]:
        """One greedy request by the server's own clocks: prompt time, and time of the tokens after it."""
        self._start(1)
        body = {"prompt": prompt, "n_predict": output_tokens, "ignore_eos": True, "temperature": 0}
        timings = self._server.handle_completions({**body, "cache_prompt": False})["timings"]
        # Its time of prediction starts after the prompt, whose last step gave the first token.
        return {"first_s": timings["prompt_ms"] / 1e3, "decode_s": timings["predicted_ms"] / 1e3}

    def serve(self, slots: int) -> dict[str, str]:
        """Continuous batching with a prompt cache behind HTTP; the server's base URL."""
        self._start(slots)
        return {"url": self._server.listening_address}

    def _start(self, slots: int) -> None:
        xllamacpp = importlib.import_module("xllamacpp")
        if self._slots == slots:
            return
        self._server = None
        params = xllamacpp.CommonParams()
        params.model.path = self._model_path
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = self._threads
        params.n_parallel, params.n_ctx, params.port, params.verbosity = slots, 1024 * slots, 0, 0
        self._server = xllamacpp.Server(params)
        self._slots = slots


PEERS: dict[str, tuple[str, Callable[[str, int], Any]]] = {
    "openvino-genai": ("openvino-genai", OpenVino),
    "xllamacpp": ("xllamacpp", LlamaCpp),
    "xllamacpp-q4_0": ("xllamacpp", LlamaCpp),
}
"""By name: the package, and how to speak to it."""


def main() -> None:
    """Answer commands until standard input ends."""
    name = sys.argv[1]
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    peer: Any = None
    for line in sys.stdin:
        command: dict[str, Any] = json.loads(line)
        do = command.pop("do")
        try:
            if do == "load":
                package, kind = PEERS[name]
                answer: Any = {"name": name, "version": importlib.metadata.version(package)}
                peer = kind(command["model_path"], command["threads"])
            else:
                answer = getattr(peer, do)(**command)
        except Exception as error:  # noqa: BLE001 - whatever a peer raises is told to the one who asked
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
