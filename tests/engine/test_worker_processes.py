"""Two real worker processes, the real model, a real pool: the same answer on every way."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import redis
from tokenizers import Tokenizer

from app.models.catalogue import pull
from app.models.entry import ModelEntry
from engine.protocol import Failed, Finished, Handoff
from memory_pool.redis_server import RedisServer, start_redis
from tests.engine.processes import Link, WorkerProcess, hand_over, request

TEXTS = [
    "What is the capital of France?",
    "Write a Python function that returns the n-th Fibonacci number.",
    "Name three rivers in South America.",
    "Give me a short recipe for tomato soup.",
    "Explain in two sentences how a refrigerator keeps food cold. " * 4,
    "The minutes of the meeting: the bridge opens in May, the trees are planted in January. " * 8,
]
KV_BYTES_PER_TOKEN = 12_240
BLOCK_TOKENS = 32


@dataclass
class Pair:
    prefill: WorkerProcess
    decode: WorkerProcess
    redis: RedisServer
    prompts: list[list[int]]

    def forget_pool(self) -> None:
        with redis.Redis.from_url(self.redis.url) as connection:
            for key in connection.scan_iter(count=1000):
                if not key.startswith(b"cm:dir"):
                    connection.delete(key)


@pytest.fixture(scope="module")
def entry() -> ModelEntry:
    return pull("smollm2-135m", progress=lambda *_: None)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, entry: ModelEntry) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp("pair")
    server = start_redis(folder, maxmemory_bytes=1 << 30)
    tokenizer = Tokenizer.from_file(str(entry.tokenizer_path))
    prompts = [
        tokenizer.encode(f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n").ids for text in TEXTS
    ]
    workers = [
        WorkerProcess("p", "prefill", entry.path, server.url, folder / "p.log", "--location", "0/0/0"),
        WorkerProcess("d", "decode", entry.path, server.url, folder / "d.log", "--location", "12/0/0"),
    ]
    yield Pair(workers[0].wait_ready(), workers[1].wait_ready(), server, prompts)
    statuses = [worker.end() for worker in workers]
    server.stop()
    assert statuses == [0, 0]


def alone(link: Link, name: str, prompt: list[int], max_tokens: int = 24) -> list[int]:
    link.send(request(name, prompt, max_tokens=max_tokens))
    link.finish(name)
    return link.tokens(name)


def test_the_same_tokens_on_every_way(pair: Pair) -> None:
    with pair.prefill.link() as p, pair.decode.link() as d:
        # (a) one worker does everything, each prompt in a namespace of its own, so that nothing is cached
        p.send(*(request(f"a{i}", t, namespace=f"alone{i}") for i, t in enumerate(pair.prompts[:1])))
        p.finish("a0")
        for i, tokens in enumerate(pair.prompts[1:], 1):
            p.send(request(f"a{i}", tokens, namespace=f"alone{i}"))
            p.finish(f"a{i}")
        answers = [p.tokens(f"a{i}") for i in range(len(pair.prompts))]
        assert all(len(answer) == 24 for answer in answers)
        assert len({tuple(answer) for answer in answers}) == len(answers)
        for i, tokens in enumerate(pair.prompts):
            # (b) prefill here, decode there
            assert hand_over(p, d, request(f"b{i}", tokens)) == answers[i], f"prompt {i} handed over"
            assert p.report(f"b{i}").computed_tokens + p.report(f"b{i}").cached_tokens == len(tokens)
            assert d.report(f"b{i}").computed_tokens == 0
        for i, tokens in enumerate(pair.prompts):
            # (c) a pool hit on the worker that has computed nothing of it
            assert alone(d, f"c{i}", tokens) == answers[i], f"prompt {i} from the cache"
            assert d.report(f"c{i}").cached_tokens == (len(tokens) - 1) // BLOCK_TOKENS * BLOCK_TOKENS
        # (d) all together, in chunks and batches as they come
        d.send(*(request(f"d{i}", tokens, namespace="batch") for i, tokens in enumerate(pair.prompts)))
        d.finish(*(f"d{i}" for i in range(len(pair.prompts))))
        assert [d.tokens(f"d{i}") for i in range(len(pair.prompts))] == answers


def test_sampled_tokens_and_logprobs_are_the_same_handed_over(pair: Pair) -> None:
    sampling = {"temperature": 0.9, "top_p": 0.95, "seed": 1234, "logprobs": 2, "frequency_penalty": 0.3}
    with pair.prefill.link() as p, pair.decode.link() as d:
        p.send(request("s1", pair.prompts[1], namespace="one", sampling=sampling))
        p.finish("s1")
        submit = request("s2", pair.prompts[1], namespace="two", sampling=sampling)
        assert hand_over(p, d, submit) == p.tokens("s1")
        assert p.logprobs("s2") + d.logprobs("s2") == p.logprobs("s1")
        assert len(p.logprobs("s1")) == 24


def test_bytes_add_up(pair: Pair) -> None:
    prompt = pair.prompts[5]
    num_blocks = -(-len(prompt) // BLOCK_TOKENS)
    with pair.prefill.link() as p, pair.decode.link() as d:
        hand_over(p, d, request("x", prompt, namespace="bytes", max_tokens=4))
        assert len(p.published("x")) == len(prompt) // BLOCK_TOKENS
        out = [t for t in p.report("x").transfers if t.kind.startswith("publish")]
        back = [t for t in d.report("x").transfers if t.kind.startswith("fetch")]
    for transfers in (out, back):
        assert len(transfers) == num_blocks
        moved = sum(t.num_bytes for t in transfers)
        # Payloads are whole blocks, headers a few hundred bytes each.
        assert 0 <= moved - num_blocks * BLOCK_TOKENS * KV_BYTES_PER_TOKEN < num_blocks * 1024
        assert all(t.ub_s < t.roce_s and t.measured_s is not None for t in transfers)
    assert {t.src for t in out} == {"die:0"}
    assert {t.dst for t in back} == {"die:192"}
    assert [t.dst for t in out if t.kind == "publish"] == [t.src for t in back if t.kind == "fetch"]


def test_a_pool_that_lost_everything_costs_time_only(pair: Pair) -> None:
    prompt = pair.prompts[4]
    with pair.prefill.link() as p, pair.decode.link() as d:
        whole = alone(p, "w", prompt)
        p.send(request("l", prompt, phase="prefill", namespace="lost"))
        p.finish("l")
        last = p.last("l")
        pair.forget_pool()
        handoff = getattr(last, "handoff", None)
        assert isinstance(handoff, Handoff)
        d.send(
            request(
                "l", prompt, phase="decode", namespace="lost", generated_tokens=whole[:1], handoff=handoff
            )
        )
        d.finish("l")
        assert whole[:1] + d.tokens("l") == whole
        assert d.report("l").computed_tokens == len(prompt)


def test_a_hundred_at_once_all_complete(pair: Pair) -> None:
    with pair.decode.link() as d:
        names = [f"m{i}" for i in range(100)]
        d.send(*(request(n, [*pair.prompts[i % 6], i], max_tokens=3) for i, n in enumerate(names)))
        d.finish(*names)
        assert all(len(d.tokens(n)) == 3 for n in names)
        assert all(isinstance(d.last(n), Finished) for n in names)
    pair.decode.until(lambda: (r := pair.decode.record) is not None and r.kv_blocks_used == 0)


def test_a_prompt_beyond_the_context_is_refused(pair: Pair) -> None:
    with pair.decode.link() as d:
        d.send(request("long", [5] * 9000))
        d.finish("long")
        last = d.last("long")
        assert isinstance(last, Failed)
        assert last.code == "too_long"


def test_surface(pair: Pair) -> None:
    record = pair.prefill.record
    assert record is not None
    assert (record.role, record.kv_bytes_per_token, record.block_tokens) == (
        "prefill",
        KV_BYTES_PER_TOKEN,
        32,
    )
    answer = httpx.get(record.url + "/metrics", trust_env=False)
    assert "vllm:prompt_tokens_total" in answer.text
    other = pair.decode.record
    assert other is not None
    assert other.fingerprint == record.fingerprint


def test_a_killed_worker_vanishes_and_an_orphan_goes(tmp_path: Path, pair: Pair, entry: ModelEntry) -> None:
    code = (
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-m', 'engine.server', *sys.argv[1:]])\n"
        "print(child.pid, flush=True)\n"
        "child.wait()\n"
    )
    argv = ["--id", "orphan", "--role", "both", "--model", "m", "--model-path", str(entry.path), "--redis"]
    argv += [pair.redis.url, "--threads", "1", "--exit-with-parent"]
    parent = subprocess.Popen([sys.executable, "-c", code, *argv], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    members = pair.prefill._directory.members
    pair.prefill.until(lambda: "orphan" in members(), 60)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    pair.prefill.until(lambda: "orphan" not in members() and not _exists(child), 30)


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A zombie that nobody waits for has ended, too.
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--location", "60/0/0"], "nodes are 0 to 47"),
        (["--kv-bytes", "0"], "positive whole number"),
        (["--role", "cook"], "invalid choice"),
    ],
)
def test_bad_arguments_are_named(args: list[str], message: str) -> None:
    argv = [
        "--id",
        "x",
        "--role",
        "both",
        "--model",
        "m",
        "--model-path",
        "/none",
        "--redis",
        "redis://localhost",
        *args,
    ]
    done = subprocess.run(
        [sys.executable, "-m", "engine.server", *argv],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert message in done.stderr


def test_a_missing_model_is_named(tmp_path: Path, pair: Pair) -> None:
    argv = ["--id", "x", "--role", "both", "--model", "m", "--model-path", str(tmp_path / "none.gguf")]
    done = subprocess.run(
        [sys.executable, "-m", "engine.server", *argv, "--redis", pair.redis.url],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert "none.gguf" in done.stderr
    assert "Traceback" not in done.stderr
