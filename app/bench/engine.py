"""How fast the engine is alone: one process, batch 1, greedy, beside what the machine allows."""

import statistics
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from engine.kernels import measure
from engine.kernels.isa import Isa
from engine.kv_cache import KVCache
from engine.model import Model, StepBatch

BATCH = 16
"""Sequences of the batched decode figure."""
BATCH_PROMPT_TOKENS, BATCH_STEPS = 64, 32
READ_PASSES = 31
"""Passes over as many bytes as the weights have, after each run."""


def bench_engine(
    path: Path,
    *,
    num_threads: int,
    prompt_tokens: int = 512,
    output_tokens: int = 128,
    repeat: int = 5,
    kernels: str = "auto",
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, Any]:
    """Measure the model at `path`; what `cloudmatrix bench engine --json` prints.

    Medians over `repeat` runs of random prompts; `ttft_s` is the median time of a whole prompt with its first token.
    `limits` are what this machine allows. Decode is bounded by the bandwidth of reading as many bytes as the weights
    have, which is measured after each run; `decode_share_of_limit` is the median over runs. The dot product from
    registers (one core, best of some runs) is set beside matrix products of one core, in turns.
    Raises ValueError naming the argument when the lengths do not fit the model.
    """
    if prompt_tokens < 1 or output_tokens < 2 or repeat < 1:
        raise ValueError("prompt_tokens and repeat: at least 1; output_tokens: at least 2")
    model = Model.load(path, num_threads=num_threads, kernels=kernels, progress=progress)
    try:
        total = prompt_tokens + output_tokens
        if total > model.config.max_context_tokens:
            raise ValueError(
                f"prompt_tokens + output_tokens: {total}, context is {model.config.max_context_tokens}"
            )
        block_tokens = model.layout.block_tokens
        batch_blocks = -(-(BATCH_PROMPT_TOKENS + BATCH_STEPS) // block_tokens) * BATCH
        cache = model.new_cache(max(-(-total // block_tokens), batch_blocks))
        _one_run(model, cache, prompt_tokens, 2, seed=0)  # buffers grow, caches fill
        runs = []
        with closing(measure.Reader(model.weight_bytes, num_threads)) as reader:
            for index in range(repeat):
                run = _one_run(model, cache, prompt_tokens, output_tokens, seed=1 + index)
                runs.append(run | {"read_bytes_per_s": reader.bytes_per_s(READ_PASSES)})
        batched = statistics.median(_batched_decode(model, cache) for _ in range(repeat))
        weight_bytes, isa = model.weight_bytes, model.isa
    finally:
        model.close()
    prefill = statistics.median(run["prefill_tokens_per_s"] for run in runs)
    decode = statistics.median(run["decode_tokens_per_s"] for run in runs)
    return {
        "prefill_tokens_per_s": prefill,
        "decode_tokens_per_s": decode,
        "threads": num_threads,
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "ttft_s": statistics.median(run["ttft_s"] for run in runs),
        "runs": runs,
        "batch": BATCH,
        "batch_decode_tokens_per_s": batched,
        "kernels": isa.name,
        "limits": _limits(isa, weight_bytes, runs),
    }


def _limits(isa: Isa, weight_bytes: int, runs: list[dict[str, float]]) -> dict[str, float | None]:
    bandwidth = statistics.median(run["read_bytes_per_s"] for run in runs)
    share = statistics.median(
        run["decode_tokens_per_s"] * weight_bytes / run["read_bytes_per_s"] for run in runs
    )
    peak = measure.dot_peak_ops_per_s(isa)
    product, shipped = measure.matrix_ops_per_s(isa), measure.matrix_ops_per_s(isa, "q4_1")
    return {
        "weight_bytes_per_token": weight_bytes,
        "read_bytes_per_s": bandwidth,
        "decode_limit_tokens_per_s": bandwidth / weight_bytes,
        "decode_share_of_limit": share,
        "dot_peak_ops_per_s": peak,
        "int8_matrix_512x576x1536_ops_per_s": product,
        "int8_matrix_share_of_dot_peak": measure.share_of_dot_peak(isa),
        "q4_1_matrix_512x576x1536_ops_per_s": shipped,
        "q4_1_matrix_share_of_dot_peak": measure.share_of_dot_peak(isa, "q4_1"),
    }


def _one_run(
    model: Model, cache: KVCache, prompt_tokens: int, output_tokens: int, seed: int
) -> dict[str, float]:
    """One prompt and its greedy continuation, end tokens ignored."""
    prompt = np.random.default_rng(seed).integers(0, model.config.vocab_size, prompt_tokens)
    table = np.arange(-(-(prompt_tokens + output_tokens) // model.layout.block_tokens))[None]
    began = time.perf_counter()
    token = int(
        model.forward(_batch(prompt, [0, prompt_tokens], [0], table, [prompt_tokens - 1]), cache)[0].argmax()
    )
    first_at = time.perf_counter()
    for position in range(prompt_tokens, prompt_tokens + output_tokens - 1):
        token = int(model.forward(_batch([token], [0, 1], [position], table, [0]), cache)[0].argmax())
    ttft_s, decode_s = first_at - began, time.perf_counter() - first_at
    return {
        "ttft_s": ttft_s,
        "prefill_tokens_per_s": prompt_tokens / ttft_s,
        "decode_tokens_per_s": (output_tokens - 1) / decode_s,
    }


def _batched_decode(model: Model, cache: KVCache) -> float:
    """Tokens a second of BATCH sequences that decode together, from BATCH_PROMPT_TOKENS on."""
    per_sequence = -(-(BATCH_PROMPT_TOKENS + BATCH_STEPS) // model.layout.block_tokens)
    tables = np.arange(per_sequence * BATCH).reshape(BATCH, per_sequence)
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, BATCH)
    rows = np.arange(BATCH)
    began = time.perf_counter()
    for step in range(BATCH_STEPS):
        positions = np.full(BATCH, BATCH_PROMPT_TOKENS + step)
        tokens = model.forward(_batch(tokens, np.arange(BATCH + 1), positions, tables, rows), cache).argmax(
            axis=1
        )
    return BATCH * BATCH_STEPS / (time.perf_counter() - began)


def _batch(tokens: Any, starts: Any, positions: Any, tables: Any, logit_rows: Any) -> StepBatch:
    return StepBatch(
        *(np.asarray(part, np.int32) for part in (tokens, starts, positions, tables, logit_rows))
    )
