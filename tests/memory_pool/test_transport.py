"""TLS and ACL users: how the pool reaches a Redis that is not its own."""

import contextlib
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from memory_pool.acl import Role, rules
from memory_pool.async_client import AsyncPoolClient
from memory_pool.client import PoolClient, Reason
from memory_pool.connection import endpoint_of
from memory_pool.directory import AsyncDirectory, Directory
from memory_pool.disk_tier import DiskTier
from memory_pool.keeper import Integrity, Keeper
from memory_pool.redis_server import RedisServer
from memory_pool.resp import Channel, ChannelError
from tests.memory_pool.conftest import FORMAT, fetches_of, puts_of, tokens_of


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("makes its certificate with openssl, which is not here")
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    argv = [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    argv += ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)]
    subprocess.run(argv, check=True, capture_output=True)
    return cert, key


def pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def tls_port(certificate: tuple[Path, Path], redis_url: str) -> Iterator[int]:
    """A TLS end in front of the test's Redis, whose binary has none of its own."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*certificate)
    listener = socket.create_server(("127.0.0.1", 0))
    open_sockets: list[socket.socket] = []
    threads: list[threading.Thread] = []

    def serve() -> None:
        while True:
            try:
                plain, _ = listener.accept()
            except OSError:
                return
            try:
                front = context.wrap_socket(plain, server_side=True)
            except OSError:
                plain.close()
                continue
            back = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            back.connect(endpoint_of(redis_url).path or "")
            open_sockets.extend([front, back])
            for ends in ((front, back), (back, front)):
                threads.append(threading.Thread(target=pump, args=ends, daemon=True))
                threads[-1].start()

    server = threading.Thread(target=serve, daemon=True)
    server.start()
    yield listener.getsockname()[1]
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    server.join()
    for each in open_sockets:
        with contextlib.suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)
    for thread in threads:
        thread.join()
    for each in open_sockets:
        each.close()


async def test_blocks_travel_over_tls(tls_port: int, certificate: tuple[Path, Path]) -> None:
    url = f"rediss://localhost:{tls_port}/0?ssl_ca_certs={certificate[0]}"
    puts = puts_of(tokens_of(3))
    items = fetches_of(puts)
    with contextlib.closing(PoolClient(url, FORMAT)) as client:
        assert all(result.ok for result in client.publish(puts))
        assert all(result.ok for result in client.fetch(items))
    assert [item.into for item in items] == [put.payload for put in puts]
    gateway = AsyncPoolClient(url)
    assert await gateway.lookup([put.key for put in puts]) == 3
    await gateway.close()


def test_a_certificate_nobody_vouches_for_is_refused(tls_port: int) -> None:
    with pytest.raises(ChannelError, match="CERTIFICATE_VERIFY_FAILED"):
        Channel(endpoint_of(f"rediss://localhost:{tls_port}/0"))
    with contextlib.closing(PoolClient(f"rediss://localhost:{tls_port}/0", FORMAT)) as client:
        assert {result.reason for result in client.publish(puts_of(tokens_of(1)))} == {Reason.UNAVAILABLE}
    Channel(endpoint_of(f"rediss://localhost:{tls_port}/0?ssl_cert_reqs=none")).close()


def url_of(role: Role, server: RedisServer) -> str:
    with redis.Redis.from_url(server.url) as connection:
        connection.execute_command("ACL", "SETUSER", role, "on", ">secret", *rules(role))
    return f"unix://{role}:secret@{endpoint_of(server.url).path}"


async def test_each_role_can_do_its_work(own_redis: RedisServer, tmp_path: Path) -> None:
    puts = puts_of(tokens_of(3))
    keys = [put.key for put in puts]
    worker = url_of("worker", own_redis)
    keeper = Keeper(url_of("keeper", own_redis), disk=DiskTier(tmp_path / "disk", 1 << 20))
    with contextlib.closing(PoolClient(worker, FORMAT)) as client, contextlib.closing(keeper):
        assert all(result.ok for result in client.publish(puts))
        assert client.lookup(keys) == 3
        assert client.lease(keys, holder="me") == 3
        client.release(keys, holder="me")
        assert all(result.ok for result in client.fetch(fetches_of(puts)))
        with contextlib.closing(Directory(worker)) as directory:
            directory.announce("w", b"record", 60.0)
        keeper.run_pass()
        assert keeper.audit() == Integrity()
    gateway_url = url_of("gateway", own_redis)
    gateway = AsyncPoolClient(gateway_url)
    assert await gateway.lookup(keys) == 3
    assert (await gateway.stats())["blocks"] == 3
    await gateway.close()
    members = AsyncDirectory(gateway_url)
    assert await members.members() == {"w": b"record"}
    await members.close()


@pytest.mark.parametrize("role", ["worker", "gateway", "keeper"])
def test_no_role_reaches_beyond_the_pool(own_redis: RedisServer, role: Role) -> None:
    with redis.Redis.from_url(url_of(role, own_redis)) as connection:
        for words in (["GET", "elses"], ["FLUSHALL"], ["CONFIG", "GET", "*"], ["ACL", "LIST"], ["SHUTDOWN"]):
            with pytest.raises(redis.exceptions.NoPermissionError):
                connection.execute_command(*words)


def test_a_wrong_password_is_an_outage_and_shown_nowhere(own_redis: RedisServer) -> None:
    url = url_of("worker", own_redis).replace("secret", "topsecret")
    with contextlib.closing(PoolClient(url, FORMAT)) as client:
        assert {result.reason for result in client.publish(puts_of(tokens_of(1)))} == {Reason.UNAVAILABLE}
    with pytest.raises(ChannelError) as caught:
        Channel(endpoint_of(url))
    assert "topsecret" not in f"{caught.value!r} {endpoint_of(url)!r}"


def test_a_bad_url_is_told_without_its_password() -> None:
    with pytest.raises(ValueError, match="redis://") as caught:
        PoolClient("http://:topsecret@host", FORMAT)
    assert "topsecret" not in str(caught.value)
