"""Measurements of the whole service, as its users see it: `cloudmatrix up`, HTTP, streaming requests."""

import contextlib
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx

from app.bench.load import LoadOptions, run_load
from app.text.tokenizer import Tokenizer

START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 40.0
WORDS = """block pool worker router prefill decode token cache fabric plane rack node link queue batch step kernel layer
head vector matrix weight score memory disk server client request answer stream clock second byte page table key value
hash chain lease limit share tenant model prompt text word line file path road river bridge market garden winter summer
morning window letter doctor teacher farmer forest silver copper bread paper music story"""


class ServedError(Exception):
    """The service did not come up or did not answer; the message says what it said."""


def make_prompts(
    tokenizer: Tokenizer, *, num: int, tokens: int, shared_tokens: int, seed: int
) -> list[tuple[str, list[int]]]:
    """`num` different prompts of exactly `tokens` tokens, the first `shared_tokens` the same in all: text and ids.

    Made of words that are one token each, whatever stands beside them. Raises ValueError when the tokenizer has too
    few of them.
    """
    words = [
        " " + word
        for word in WORDS.split()
        if len(tokenizer.encode(" " + word)) == len(tokenizer.encode(" the"))
    ]
    if len(words) < 30:
        raise ValueError(f"the tokenizer has only {len(words)} of the prompt maker's words as one token")
    draw = random.Random(seed)  # noqa: S311 - filler text, not secrets
    start = len(tokenizer.encode(""))
    shared = draw.choices(words, k=shared_tokens - start)
    prompts = []
    for _ in range(num):
        text = "".join([*shared, *draw.choices(words, k=tokens - shared_tokens)])
        ids = tokenizer.encode(text)
        if len(ids) != tokens:
            raise ValueError(f"a prompt of {tokens} words has {len(ids)} tokens with this tokenizer")
        prompts.append((text, ids))
    return prompts


@contextlib.contextmanager
def service(*, model: str, threads: int, more: Sequence[str] = ()) -> Iterator[str]:
    """A service of its own on free ports with a folder of its own; its URL. Raises ServedError."""
    with (
        tempfile.TemporaryDirectory(prefix="cloudmatrix-bench-") as folder,
        running(Path(folder), model=model, threads=threads, more=more) as url,
    ):
        yield url


@contextlib.contextmanager
def running(folder: Path, *, model: str, threads: int, more: Sequence[str] = ()) -> Iterator[str]:
    """A service on free ports that keeps everything in `folder`; its URL. Raises ServedError."""
    argv = [sys.executable, "-m", "app.cli", "up", "--data-dir", str(folder), "--port", "0", "--no-console"]
    argv += ["--model", model, "--threads", str(threads), *more]
    log = folder / "up.log"
    with log.open("wb") as output:
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    try:
        yield _until_ready(process, folder, log)
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _until_ready(process: subprocess.Popen[bytes], folder: Path, log: Path) -> str:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError, ValueError, KeyError, httpx.HTTPError):
            url = str(json.loads((folder / "service.json").read_text())["url"])
            if httpx.get(url + "/readyz", trust_env=False).status_code == httpx.codes.OK:
                return url
        time.sleep(0.1)
    raise ServedError(f"the service did not come up: {log.read_text(errors='replace')[-1000:]}")


def closed_loop(
    url: str, model: str, prompts: Sequence[str], *, concurrency: int, output_tokens: int
) -> dict[str, Any]:
    """`bench load` of the prompts, greedy, `ignore_eos`. Raises ServedError when a request failed."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "prompts.jsonl")
        path.write_text("\n".join(json.dumps({"prompt": text}) for text in prompts), encoding="utf-8")
        options = LoadOptions(
            base_url=url,
            model=model,
            concurrency=concurrency,
            requests=len(prompts),
            prompts=path,
            max_tokens=output_tokens,
            ignore_eos=True,
        )
        return _whole(run_load(options))


def _whole(result: dict[str, Any]) -> dict[str, Any]:
    if result["failed"]:
        raise ServedError(f"{result['failed']} of {result['requests']} requests failed: {result['errors']}")
    return result
