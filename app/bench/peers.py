"""Our engine and service beside other engines on the same file and machine, in turns in one run.

The sides alternate (ours, peer, ours, peer …), so that whatever else the machine does meets all of them; every figure
is the median over the repeats, and every ratio is of medians of one run.
"""

import contextlib
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from app.bench import served
from app.bench.load import percentiles
from app.bench.peer_process import PeerProcess, find_peers
from app.bench.requantised import requantise
from app.models.entry import ModelEntry
from app.text.tokenizer import Tokenizer
from engine.model import Model, StepBatch

OURS = "cloudmatrix"
Q4_0_ALONE = "xllamacpp-q4_0"
"""llama.cpp on the same weights requantised to Q4_0, for which it has its quickest kernels: speed of one request."""
PROMPT_TOKENS, OUTPUT_TOKENS = 512, 128
SERVED_PROMPT_TOKENS, SERVED_SHARED_TOKENS, SERVED_OUTPUT_TOKENS = 256, 192, 64
CONCURRENCY, REQUESTS = 16, 48
ENGINE_TURNS = 3
"""So many turns of one request for each of the service: they are short, and a busy moment meets one side alone."""
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class PeersOptions:
    """What to compare: the peers that `pythons` have, on `entry`'s file, `repeat` times."""

    pythons: Sequence[Path]
    entry: ModelEntry
    threads: int = 2
    repeat: int = 5


def run_peers(options: PeersOptions, say: Say) -> dict[str, Any]:
    """The whole comparison. Raises PeerError for a peer, ServedError for our service."""
    entry = options.entry
    tokenizer = Tokenizer.load(
        entry.tokenizer_path, bos_token_id=entry.bos_token_id if entry.add_bos else None
    )
    with contextlib.ExitStack() as held:
        models = {"openvino-genai": entry.path, "xllamacpp": entry.path}
        if entry.path.suffix == ".gguf":
            folder = held.enter_context(tempfile.TemporaryDirectory(prefix="cloudmatrix-bench-"))
            models[Q4_0_ALONE] = Path(folder) / "q4_0.gguf"
            requantise(entry.path, models[Q4_0_ALONE])
        peers = find_peers(options.pythons, models, options.threads)
        for peer in peers:
            held.callback(peer.close)
        engine = _compare_engines(options, peers, tokenizer, say)
        service = _compare_services(
            options, [peer for peer in peers if peer.name != Q4_0_ALONE], tokenizer, say
        )
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": machine(),
        "model": entry.id,
        "threads": options.threads,
        "repeat": options.repeat,
        "engine_turns": ENGINE_TURNS * options.repeat,
        "versions": {peer.name: peer.version for peer in peers},
        "engine": engine,
        "served": service,
    }


def machine() -> dict[str, Any]:
    """CPU model, cores, the instruction sets that matter to the kernels, and the load as the run ended."""
    info: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            info.setdefault(name.strip(), value.strip())
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimddp", "i8mm")
    flags = (info.get("flags") or info.get("Features") or "").split()
    return {
        "cpu": info.get("model name") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "flags": [flag for flag in wanted if flag in flags],
        "load_average": round(os.getloadavg()[0], 2),
    }


def _compare_engines(
    options: PeersOptions, peers: Sequence[PeerProcess], tokenizer: Tokenizer, say: Say
) -> dict[str, dict[str, Any]]:
    """Tokens a second of each side: prefill and decode of one greedy request."""
    turns = ENGINE_TURNS * options.repeat
    prompts = served.make_prompts(tokenizer, num=turns + 1, tokens=PROMPT_TOKENS, shared_tokens=1, seed=1)
    model = Model.load(options.entry.path, num_threads=options.threads)
    try:
        sides: dict[str, Callable[[list[int]], dict[str, float]]] = {
            OURS: lambda ids: own_request(model, ids)
        }
        for peer in peers:
            sides[peer.name] = lambda ids, peer=peer: peer.ask(  # type: ignore[misc]  # a default binds the loop's peer
                "one", prompt=ids, output_tokens=OUTPUT_TOKENS
            )
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
        for number, (_, ids) in enumerate(prompts):
            for name, request in sides.items():
                run = request(ids)
                if number:  # the first warms up
                    runs[name].append(_speeds(run))
            say(f"engine: {number} of {turns}")
    finally:
        model.close()
    return {
        name: {
            "prefill_tokens_per_s": statistics.median(run["prefill_tokens_per_s"] for run in of_side),
            "decode_tokens_per_s": statistics.median(run["decode_tokens_per_s"] for run in of_side),
            "runs": of_side,
        }
        for name, of_side in runs.items()
    }


def own_request(model: Model, prompt: Sequence[int], output_tokens: int = OUTPUT_TOKENS) -> dict[str, float]:
    """One greedy request of our engine: seconds to the first token, and of the tokens after it."""
    num_blocks = -(-(len(prompt) + output_tokens) // model.layout.block_tokens)
    cache = model.new_cache(num_blocks)
    table = np.arange(num_blocks, dtype=np.int32)[None]

    def step(tokens: Sequence[int], first: int) -> int:
        rows = len(tokens)
        logits = model.forward(
            StepBatch(
                np.array(tokens, np.int32),
                np.array([0, rows], np.int32),
                np.array([first], np.int32),
                table,
                np.array([rows - 1], np.int32),
            ),
            cache,
        )
        return int(logits[0].argmax())

    began = time.perf_counter()
    token = step(prompt, 0)
    first_at = time.perf_counter()
    for position in range(len(prompt), len(prompt) + output_tokens - 1):
        token = step([token], position)
    return {"first_s": first_at - began, "decode_s": time.perf_counter() - first_at}


def _speeds(run: dict[str, float]) -> dict[str, float]:
    return {
        "prefill_tokens_per_s": PROMPT_TOKENS / run["first_s"],
        "decode_tokens_per_s": (OUTPUT_TOKENS - 1) / run["decode_s"],
    }


def _compare_services(
    options: PeersOptions, peers: Sequence[PeerProcess], tokenizer: Tokenizer, say: Say
) -> dict[str, Any]:
    """Sixteen users at once on each side."""
    model = options.entry.id
    by_name = {peer.name: peer for peer in peers}
    runs: dict[str, list[dict[str, Any]]] = {OURS: [], **{name: [] for name in by_name}}
    with served.service(model=model, threads=options.threads) as url:
        urls = {OURS: url}
        for peer in peers:
            if peer.name == "xllamacpp":
                urls[peer.name] = peer.ask("serve", slots=CONCURRENCY)["url"]
        for number in range(options.repeat + 1):
            # New prompts each time: only the shared part of a prompt was seen before, and that by the first requests.
            prompts = served.make_prompts(
                tokenizer,
                num=REQUESTS if number else CONCURRENCY,
                tokens=SERVED_PROMPT_TOKENS,
                shared_tokens=SERVED_SHARED_TOKENS,
                seed=100 + number,
            )
            for name, of_side in runs.items():
                if name in urls:
                    result = _served_over_http(urls[name], model, [text for text, _ in prompts])
                else:
                    result = _served_in_process(by_name[name], [ids for _, ids in prompts])
                if number:
                    of_side.append(result)
            say(f"served: {number} of {options.repeat}")
    return {name: {**_medians(of_side), "runs": of_side} for name, of_side in runs.items()}


def _served_over_http(url: str, model: str, prompts: Sequence[str]) -> dict[str, Any]:
    result = served.closed_loop(
        url, model, prompts, concurrency=CONCURRENCY, output_tokens=SERVED_OUTPUT_TOKENS
    )
    wanted = (len(prompts) * SERVED_PROMPT_TOKENS, len(prompts) * SERVED_OUTPUT_TOKENS)
    if (result["prompt_tokens"], result["output_tokens"]) != wanted:
        raise served.ServedError(
            f"{url}: {result['prompt_tokens']} prompt and {result['output_tokens']} output tokens, asked for {wanted}"
        )
    return {
        "output_tokens_per_s": result["output_tokens_per_s"],
        "ttft_s": result["ttft_s"]["p50"],
        "tpot_s": result["tpot_s"]["p50"],
    }


def _served_in_process(peer: PeerProcess, prompts: Sequence[list[int]]) -> dict[str, Any]:
    result = peer.ask("many", prompts=prompts, output_tokens=SERVED_OUTPUT_TOKENS, concurrency=CONCURRENCY)
    return {
        "output_tokens_per_s": result["output_tokens"] / result["duration_s"],
        "ttft_s": percentiles([request["ttft_s"] for request in result["requests"]])["p50"],
        "tpot_s": percentiles([request["tpot_s"] for request in result["requests"]])["p50"],
    }


def _medians(runs: Sequence[dict[str, Any]]) -> dict[str, float]:
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}
