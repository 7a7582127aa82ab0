"""An answer's text as it grows, token by token: whole characters only, and never a part of a stop string."""

import codecs
from collections.abc import Sequence

from app.text.tokenizer import Tokenizer


class Detokenizer:
    """Tokens in, text out. The pieces joined are the text of all tokens; no piece ends inside a character.

    `continues_text`: the answer goes on from text before it (a completion), so that its first space is kept.
    """

    def __init__(self, tokenizer: Tokenizer, *, continues_text: bool = False) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._strip_space = tokenizer.strips_first_space and not continues_text

    def push(self, token_id: int) -> str:
        """The text that became complete with this token; often empty."""
        data = self._tokenizer.text_bytes(token_id)
        if self._strip_space and data:
            data = data.removeprefix(b" ")
            self._strip_space = False
        return self._decoder.decode(data)

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character cut off, else nothing."""
        return self._decoder.decode(b"", final=True)


class StopStrings:
    """Watches text for the first stop string to be completed and withholds what might become one.

    Where several end at the same character the longest counts, so how the text was cut into pieces changes nothing.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if "" in stops:
            raise ValueError("a stop string must not be empty")
        self._stops = sorted(set(stops), key=len, reverse=True)
        self._held = ""
        self.matched: str | None = None
        """The stop string met, after which nothing more is passed on."""

    def push(self, text: str) -> str:
        """The text that is now known not to belong to a stop string."""
        if not self._stops:
            return text
        if self.matched is not None:
            return ""
        pending = self._held + text
        ends = [(at + len(stop), stop) for stop in self._stops if (at := pending.find(stop)) >= 0]
        if ends:
            end, self.matched = min(ends, key=lambda found: found[0])
            self._held = ""
            return pending[: end - len(self.matched)]
        keep = self._possible_start(pending)
        self._held = pending[len(pending) - keep :]
        return pending[: len(pending) - keep]

    def flush(self) -> str:
        """The text ended: what was withheld is text after all."""
        held, self._held = self._held, ""
        return held

    def _possible_start(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = 0
        for stop in self._stops:
            for length in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:length]):
                    longest = length
                    break
        return longest


class TextStream:
    """The visible text of one answer: `push` each token, stop when `stopped`, `finish` at the end."""

    def __init__(
        self, tokenizer: Tokenizer, stop: Sequence[str] = (), *, continues_text: bool = False
    ) -> None:
        self._detokenizer = Detokenizer(tokenizer, continues_text=continues_text)
        self._stops = StopStrings(stop)

    @property
    def stopped(self) -> bool:
        """A stop string was met; its text and all after it is left out."""
        return self._stops.matched is not None

    @property
    def matched_stop(self) -> str | None:
        """The stop string that ended the answer."""
        return self._stops.matched

    def push(self, token_id: int) -> str:
        """Text to show now; empty while a character or a possible stop string is incomplete."""
        return self._stops.push(self._detokenizer.push(token_id))

    def finish(self) -> str:
        """The rest of the text, when no more tokens come."""
        return self._stops.push(self._detokenizer.flush()) + self._stops.flush()
