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

from memory_pool.acl import ROLES, Role, rules
from memory_pool.async_client import AsyncPoolClient
from memory_pool.client import PoolClient, Reason
from memory_pool.connection import endpoint_of
from memory_pool.directory import AsyncDirectory, Directory
from memory_pool.disk_tier import DiskTier
from memory_pool.keeper import Integrity, Keeper
from memory_pool.redis_server import RedisServer
from memory_pool.redis_store import redis_key
from memory_pool.reservations import AsyncReservations, Charge, Reservation
from memory_pool.resp import Channel, ChannelError
from memory_pool.shared_prefixes import SharedPrefix
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


def refused(server: RedisServer) -> list[str]:
    """What Redis refused since the last look, as its own log says; redis-py shrugs off that it may not say its name."""
    with redis.Redis.from_url(server.url) as connection:
        entries = connection.acl_log()
        connection.acl_log_reset()
    said = [f"{entry['username']} {entry['reason']} {entry['object']}" for entry in entries]
    return [line for line in said if " command client" not in line]


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
    assert refused(own_redis) == []


async def test_the_gateways_rules_are_enough_for_its_work(own_redis: RedisServer, tmp_path: Path) -> None:
    with contextlib.closing(PoolClient(own_redis.url, FORMAT)) as client:
        puts = puts_of(tokens_of(3))
        keys = [put.key for put in puts]
        client.publish(puts)
    url = url_of("gateway", own_redis)
    pool = AsyncPoolClient(url, disk_folder=tmp_path)
    assert await pool.lookup([*keys, bytes(32)]) == 3
    assert (await pool.stats())["blocks"] == 3
    prefix = SharedPrefix(fingerprint="f", num_tokens=4, keys=(bytes(32),))
    assert await pool.share("all", prefix)
    assert await pool.shared_prefixes() == {"all": prefix}
    assert await pool.unshare("all")
    assert await pool.pin("default", "mine", num_tokens=4, keys=keys, ttl_s=9.0) is not None
    assert [pin.name for pin in await pool.pins()] == ["mine"]
    assert await pool.unpin("default", "mine")
    await pool.close()
    members = AsyncDirectory(url)
    await members.announce("gateway", b"record", 60.0)
    assert await members.members() == {"gateway": b"record"}
    await members.withdraw("gateway")
    await members.close()
    counters = AsyncReservations(url)
    charges = [
        Charge("cm:q:{t}:window", "window", 5, 10),
        Charge("cm:q:{t}:leases", "leases", 1, 2),
        Charge("cm:q:{t}:budget", "budget", 5, 10),
    ]
    await counters.seed("cm:q:{t}:budget", 1)
    made = await counters.reserve("r", charges)
    assert isinstance(made, Reservation)
    await counters.hold([made])
    await counters.settle([(made, [2, 1, 2])])
    await counters.leave_word("changed", "x")
    assert await counters.word("changed") == b"x"
    await counters.close()
    assert refused(own_redis) == []


READS = [
    *("GET", "GETDEL", "GETEX", "DUMP", "MGET", "SORT", "STRLEN", "TYPE"),
    *("GETRANGE 0 9", "SUBSTR 0 9", "GETBIT 0", "GETSET x", "BITFIELD GET u8 0", "BITCOUNT", "SET x GET"),
    *("COPY cm:q:x", "RENAME cm:q:x", "APPEND x", "SETRANGE 0 x", "OBJECT ENCODING"),
]


def test_the_gateway_cannot_read_a_block_nor_put_one(own_redis: RedisServer) -> None:
    with contextlib.closing(PoolClient(own_redis.url, FORMAT)) as client:
        (put,) = puts_of(tokens_of(1))
        client.publish([put])
    name = redis_key(put.key)
    with redis.Redis.from_url(own_redis.url) as everything:
        value = everything.get(name)
        assert isinstance(value, bytes)
        assert bytes(put.payload) in value
    with redis.Redis.from_url(url_of("gateway", own_redis)) as connection:
        assert connection.execute_command("EXISTS", name) == 1
        for line in READS:
            command, *words = line.split()
            keyed = [command, words.pop(0), name] if command == "OBJECT" else [command, name, *words]
            with pytest.raises(redis.exceptions.NoPermissionError):
                connection.execute_command(*keyed)
        for words in (["MONITOR"], ["PSYNC", "?", "-1"], ["STRALGO", "LCS", "KEYS", name, name], ["SCAN", 0]):
            with pytest.raises(redis.exceptions.NoPermissionError):
                connection.execute_command(*words)
        # A script has no more rights than who runs it.
        with pytest.raises(redis.exceptions.ResponseError, match="can.t run this command|permission"):
            connection.execute_command("EVAL", "return redis.call('GET', KEYS[1])", 1, name)
        for closed in ("cm:contents:secret", "cm:models", "cm:l:{0}"):
            with pytest.raises(redis.exceptions.NoPermissionError):
                connection.execute_command("HGETALL", closed)
    with redis.Redis.from_url(own_redis.url) as everything:
        assert everything.get(name) == value


@pytest.mark.parametrize("role", ROLES)
def test_no_role_reaches_beyond_the_pool(own_redis: RedisServer, role: Role) -> None:
    with redis.Redis.from_url(url_of(role, own_redis)) as connection:
        for words in (
            *(["GET", "elses"], ["FLUSHALL"], ["CONFIG", "GET", "*"], ["ACL", "LIST"], ["SHUTDOWN"]),
            *(["CLIENT", "LIST"], ["CLUSTER", "RESET"], ["REPLICAOF", "NO", "ONE"], ["MODULE", "LIST"]),
        ):
            with pytest.raises(redis.exceptions.NoPermissionError):
                connection.execute_command(*words)


def test_giving_rules_again_takes_back_what_was_granted_before(own_redis: RedisServer) -> None:
    url_of("worker", own_redis)
    with redis.Redis.from_url(own_redis.url) as connection:
        connection.execute_command("ACL", "SETUSER", "worker", *rules("gateway"))
        found = connection.acl_getuser("worker")
    with (
        redis.Redis.from_url(url_of("gateway", own_redis)),
        redis.Redis.from_url(own_redis.url) as connection,
    ):
        fresh = connection.acl_getuser("gateway")
    assert sorted(found["commands"]) == sorted(fresh["commands"])
    assert found["keys"] == fresh["keys"]


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
