"""A thin channel to Redis for large values: bytes go from and to the caller's own memory.

redis-py joins a command's arguments into one buffer and returns each value as new `bytes`; for values of a megabyte
these copies and page faults cost more than the transfer. This channel speaks the same protocol (RESP2) with
scatter-gather writes and receives straight into the caller's buffers. It knows AUTH, SELECT, READONLY, GET and SET.
"""

import socket
import ssl
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from memory_pool.target import Checked, Digest, Target

Buffer = bytes | bytearray | memoryview

_READ_BYTES = 4096
_SOCKET_BUFFER_BYTES = 4 << 20
_WINDOW = 8
"""GETs in flight: enough to hide the round trip, few enough that Redis holds only so many replies in its memory."""
_IOV_MAX = 64
_SMALL_BYTES = 16 << 10
"""Parts smaller than this wait for the next one."""


class ChannelError(Exception):
    """The connection failed or the server answered outside the protocol; the channel is of no further use."""


class RefusedError(Exception):
    """The server answered a command with an error, e.g. `OOM command not allowed`; the channel stays usable."""


Length = int | RefusedError | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where a Redis server listens and how to log in. `path` (a unix socket) wins over `host` and `port`."""

    host: str = "127.0.0.1"
    port: int = 6379
    path: str | None = None
    username: str | None = None
    password: str | None = None
    database: int = 0
    tls: ssl.SSLContext | None = None
    timeout_s: float = 2.0
    """For connecting and for each wait on the socket."""

    def __repr__(self) -> str:
        return f"Endpoint({self.path or f'{self.host}:{self.port}'})"


class Channel:
    """One connection; not thread-safe. Raises ChannelError from every method once the connection is lost."""

    def __init__(self, endpoint: Endpoint, *, readonly: bool = False) -> None:
        self._rest = memoryview(b"")
        self._buffer = bytearray(_READ_BYTES)
        try:
            self._socket = _connect(endpoint)
        except OSError as error:
            raise ChannelError(f"{endpoint!r}: {error}") from error
        self._gathers = not isinstance(self._socket, ssl.SSLSocket)
        try:
            if endpoint.password is not None:
                login = [endpoint.username] if endpoint.username else []
                self.call("AUTH", *login, endpoint.password)
            if endpoint.database:
                self.call("SELECT", str(endpoint.database))
            if readonly:
                self.call("READONLY")
        except (ChannelError, RefusedError) as error:
            self._socket.close()
            raise ChannelError(f"{endpoint!r}: {error}") from error

    def close(self) -> None:
        """Idempotent."""
        self._socket.close()

    def call(self, *words: str) -> str:
        """A command whose answer is one line, e.g. PING. Raises RefusedError when the answer is an error."""
        try:
            self._socket.sendall(command(*(word.encode() for word in words)))
            return self._read_line().decode()
        except OSError as error:
            raise ChannelError(str(error)) from error

    def ask(self, commands: Sequence[Sequence[bytes]]) -> list[bytes | RefusedError]:
        """Commands whose answers are one line each, in one go, e.g. EXISTS: the lines, or the errors."""
        answers = bytes(self._rest)
        self._rest = memoryview(b"")
        try:
            self._socket.sendall(b"".join([command(*words) for words in commands]))
            while answers.count(b"\r\n") < len(commands):
                self._fill()
                answers += self._rest
                self._rest = memoryview(b"")
        except OSError as error:
            raise ChannelError(str(error)) from error
        lines = answers.split(b"\r\n")[: len(commands)]
        return [RefusedError(line[1:].decode()) if line[:1] == b"-" else line for line in lines]

    def get_into(self, keys: Sequence[bytes], into: Sequence[Sequence[Target]]) -> list[Length]:
        """Fetch values, each scattered over its own buffers; the length of each, None where absent.

        A value whose length is not the buffers' total is drained and its buffers hold garbage.
        """
        lengths: list[Length] = []
        sent = 0
        try:
            for received, parts in enumerate(into):
                if sent - received <= _WINDOW // 2 and sent < len(keys):
                    upto = min(len(keys), received + _WINDOW)
                    self._socket.sendall(b"".join(command(b"GET", key) for key in keys[sent:upto]))
                    sent = upto
                lengths.append(self._read_value(parts))
        except OSError as error:
            raise ChannelError(str(error)) from error
        return lengths

    def set_from(
        self, puts: Iterable[tuple[bytes, int, Iterable[Buffer], Sequence[bytes]]]
    ) -> list[bool | RefusedError]:
        """Store values gathered from buffers: `(key, num_bytes, parts, options)` with options such as `EX 60 NX`.

        Parts are asked for when the one before is on its way. True where stored, False where an option (NX)
        kept the server from storing.
        """
        answers: list[bool | RefusedError] = []
        sent = 0
        try:
            for key, num_bytes, parts, options in puts:
                head = b"*%d\r\n$3\r\nSET\r\n$%d\r\n%b\r\n$%d\r\n" % (
                    3 + len(options),
                    len(key),
                    key,
                    num_bytes,
                )
                end = b"\r\n" + b"".join(b"$%d\r\n%b\r\n" % (len(option), option) for option in options)
                left = num_bytes
                waiting: list[Buffer] = [head]
                for part in parts:
                    waiting.append(part)
                    left -= memoryview(part).nbytes
                    if memoryview(part).nbytes >= _SMALL_BYTES:
                        self._send(waiting)
                        waiting = []
                if left:
                    raise ChannelError(f"{num_bytes} bytes announced, {left} of them missing")
                self._send([*waiting, end])
                sent += 1
            for _ in range(sent):
                try:
                    answers.append(self._read_line()[:1] == b"+")
                except RefusedError as refusal:
                    answers.append(refusal)
        except OSError as error:
            raise ChannelError(str(error)) from error
        return answers

    def _send(self, parts: list[Buffer]) -> None:
        if not self._gathers:
            for part in parts:
                self._socket.sendall(part)
            return
        views = [memoryview(part).cast("B") for part in parts if len(part)]
        while views:
            sent = self._socket.sendmsg(views[:_IOV_MAX])
            while views and sent >= len(views[0]):
                sent -= len(views[0])
                views.pop(0)
            if sent:
                views[0] = views[0][sent:]

    def _read_value(self, into: Sequence[Target]) -> Length:
        try:
            line = self._read_line()
        except RefusedError as refusal:
            return refusal
        if line[:1] != b"$":
            raise ChannelError(f"expected a value, got {line[:40]!r}")
        length = int(line[1:])
        if length < 0:
            return None
        if length == sum(len(part) for part in into):
            for part in into:
                if isinstance(part, Checked):
                    part.digest.reset()
                    self._read_exactly(part.view, part.digest)
                else:
                    self._read_exactly(part)
        else:
            self._drain(length)
        crlf = bytearray(2)
        self._read_exactly(memoryview(crlf))
        if crlf != b"\r\n":
            raise ChannelError("a value does not end where its length says")
        return length

    def _read_line(self) -> bytes:
        """One line without its end. Raises RefusedError when it is an error reply."""
        line = b""
        while True:
            taken = bytes(self._rest)
            line += taken
            end = line.find(b"\r\n")
            if end >= 0:
                self._rest = self._rest[len(taken) - (len(line) - end - 2) :]
                line = line[:end]
                break
            if len(line) > _READ_BYTES:
                raise ChannelError("no end of line where the protocol wants one")
            self._fill()
        if line[:1] == b"-":
            raise RefusedError(line[1:].decode(errors="replace"))
        return line

    def _fill(self) -> None:
        count = self._socket.recv_into(self._buffer)
        if not count:
            raise ChannelError("the server closed the connection")
        self._rest = memoryview(self._buffer)[:count]

    def _read_exactly(self, target: memoryview, digest: Digest | None = None) -> None:
        have = min(len(self._rest), len(target))
        target[:have] = self._rest[:have]
        self._rest = self._rest[have:]
        if digest is not None:
            digest.update(target[:have])
        while have < len(target):
            count = self._socket.recv_into(target[have:])
            if not count:
                raise ChannelError("the server closed the connection")
            if digest is not None:
                digest.update(target[have : have + count])
            have += count

    def _drain(self, length: int) -> None:
        sink = memoryview(bytearray(min(length, 1 << 16)))
        while length:
            part = sink[: min(length, len(sink))]
            self._read_exactly(part)
            length -= len(part)


def command(*words: bytes) -> bytes:
    """A command in RESP."""
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in words)


def _connect(endpoint: Endpoint) -> socket.socket:
    if endpoint.path is None:
        plain = socket.create_connection((endpoint.host, endpoint.port), timeout=endpoint.timeout_s)
    else:
        plain = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if endpoint.path is not None:
            plain.settimeout(endpoint.timeout_s)
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BUFFER_BYTES)
            plain.connect(endpoint.path)
            return plain
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if endpoint.tls is not None:
            return endpoint.tls.wrap_socket(plain, server_hostname=endpoint.host)
    except BaseException:
        plain.close()
        raise
    return plain
