"""Tool calls in an answer's text, read as it arrives: one reader for whole answers and streamed ones."""

import re
import secrets
from dataclasses import dataclass, replace

OPENS, CLOSES = "<tool_call>", "</tool_call>"
"""What stands around a call: `<tool_call>{"name": "f", "arguments": {…}}</tool_call>`."""
_HEAD = re.compile(r'(?:\}</tool_call>)?<tool_call>\{"name": "([^"]+)", "arguments": ')


@dataclass(frozen=True, slots=True)
class CallDelta:
    """What came in of call number `index`: `name` and `call_id` with its first piece only."""

    index: int
    arguments: str
    name: str | None = None
    call_id: str | None = None

    def followed_by(self, later: "CallDelta") -> "CallDelta":
        """Both as one piece of the same call."""
        return replace(self, arguments=self.arguments + later.arguments)


class CallReader:
    """Tells calls from the text before them, in an answer that is held to `tool_grammar`."""

    def __init__(self) -> None:
        self.num_calls = 0
        self._pending = ""
        self._opened = False
        self._inside = False
        self._depth = 0
        self._quoted = False
        self._escaped = False

    def feed(self, piece: str) -> tuple[str, list[CallDelta]]:
        """Text that is certainly no part of a call, and what came in of calls, one delta a call."""
        self._pending += piece
        text = ""
        if not self._opened:
            at = self._pending.find(OPENS)
            self._opened = at >= 0
            if at < 0:
                at = len(self._pending) - _possible_start(self._pending)
            text, self._pending = self._pending[:at], self._pending[at:]
        deltas: list[CallDelta] = []
        while self._opened and (delta := self._next()) is not None:
            deltas.append(delta)
        return text, deltas

    @property
    def is_complete(self) -> bool:
        """There were calls, and the last one is whole."""
        return self.num_calls > 0 and not self._inside

    def finish(self) -> str:
        """The answer ended: text that was withheld because a call might have begun with it."""
        return "" if self._opened else self._pending

    def _next(self) -> CallDelta | None:
        name = call_id = None
        if not self._inside:
            head = _HEAD.match(self._pending)
            if head is None:
                return None
            name, call_id = head[1], "call_" + secrets.token_hex(12)
            self._pending = self._pending[head.end() :]
            self._inside = True
            self.num_calls += 1
        elif not self._pending:
            return None
        length = self._length()
        arguments, self._pending = self._pending[:length], self._pending[length:]
        return CallDelta(self.num_calls - 1, arguments, name, call_id)

    def _length(self) -> int:
        """How many of the pending characters belong to the arguments, a JSON object."""
        for at, letter in enumerate(self._pending):
            if self._escaped:
                self._escaped = False
            elif self._quoted:
                self._escaped, self._quoted = letter == "\\", letter != '"'
            elif letter == '"':
                self._quoted = True
            else:
                self._depth += (letter in "{[") - (letter in "}]")
                if not self._depth:
                    self._inside = False
                    return at + 1
        return len(self._pending)


def _possible_start(text: str) -> int:
    """Length of the longest end of `text` that begins a call."""
    return next((n for n in range(min(len(OPENS) - 1, len(text)), 0, -1) if text.endswith(OPENS[:n])), 0)
