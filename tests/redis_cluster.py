"""A Redis Cluster of real servers on free ports: three masters, each with a replica."""

import contextlib
import socket
import subprocess
from pathlib import Path
from typing import Any

import redis

from memory_pool.redis_server import find_binary
from tests.memory_pool.conftest import poll

SLOTS = 16384


def free_port() -> int:
    """A port whose bus port (10,000 higher) is free, too."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port: int = probe.getsockname()[1]
        if port < 55_000:
            with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port + 10_000)):
                return port


class Cluster:
    def __init__(self, folder: Path) -> None:
        self.ports = [free_port() for _ in range(6)]
        self.processes = [self._start(folder / str(port), port) for port in self.ports]
        try:
            self._join()
        except BaseException:
            self.close()
            raise

    def _join(self) -> None:
        nodes = [redis.Redis(port=port) for port in self.ports]
        for node in nodes:
            poll(lambda node=node: answers(node))  # type: ignore[misc]
        for index, node in enumerate(nodes[:3]):
            first, last = SLOTS * index // 3, SLOTS * (index + 1) // 3
            command(node, "CLUSTER", "ADDSLOTS", *range(first, last))
            command(node, "CLUSTER", "SET-CONFIG-EPOCH", index + 1)
        for port in self.ports[1:]:
            command(nodes[0], "CLUSTER", "MEET", "127.0.0.1", port)
        for master, replica in zip(nodes[:3], nodes[3:], strict=True):
            name = command(master, "CLUSTER", "MYID")
            poll(lambda r=replica, n=name: replicates(r, n))  # type: ignore[misc]
        for node in nodes:
            poll(lambda node=node: settled(node), within_s=30)  # type: ignore[misc]
            node.close()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.ports[0]}"

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def _start(self, folder: Path, port: int) -> subprocess.Popen[bytes]:
        folder.mkdir()
        argv = [str(find_binary()), "--port", str(port), "--cluster-enabled", "yes", "--dir", str(folder)]
        argv += ["--cluster-node-timeout", "1500", "--save", "", "--bind", "127.0.0.1"]
        argv += ["--repl-diskless-sync", "yes", "--repl-diskless-sync-delay", "0"]
        return subprocess.Popen(argv, stdout=subprocess.DEVNULL)


def command(node: redis.Redis, *words: str | int | bytes) -> Any:
    return node.execute_command(*words)  # type: ignore[no-untyped-call]  # untyped in redis-py


def answers(node: redis.Redis) -> bool:
    with contextlib.suppress(redis.RedisError):
        return bool(node.ping())
    return False


def replicates(node: redis.Redis, master: bytes) -> bool:
    with contextlib.suppress(redis.RedisError):
        return bool(command(node, "CLUSTER", "REPLICATE", master))
    return False


def settled(node: redis.Redis) -> bool:
    info: bytes = command(node, "CLUSTER", "INFO")
    replication = node.info("replication")
    linked = replication["role"] == "master" or replication["master_link_status"] == "up"
    return b"cluster_state:ok" in info and b"cluster_known_nodes:6" in info and linked
