"""One answer as text: takes tokens as they come, gives text that is whole, ends at a stop token or stop string."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from app.api.schemas import ChosenLogprob, TopLogprob
from app.requests.calls import CallDelta, CallReader
from app.requests.mailbox import Produced
from app.routing.dispatch import Dispatch
from app.text import TextStream, Tokenizer
from engine.protocol import TokenLogprob


class Piece(msgspec.Struct, frozen=True):
    """What became visible of a choice: text, calls, log-probabilities, and, with the last piece, why it ended."""

    choice: int
    text: str
    logprobs: list[ChosenLogprob] | None
    finish_reason: str | None
    calls: Sequence[CallDelta] = ()


@dataclass(eq=False)
class Choice:
    """The text side of one dispatch."""

    index: int
    dispatch: Dispatch
    tokenizer: Tokenizer
    stream: TextStream
    calls: CallReader | None = None
    """Tells calls of tools from text, where tools were offered."""
    drops_tokens: bool = False
    """Whether nothing but the prompt is wanted: it ends with the first token, which is not shown."""
    num_tokens: int = 0
    finish_reason: str | None = None
    _pending: list[ChosenLogprob] = field(default_factory=list)

    def take(self, produced: Produced) -> Piece | None:
        """The piece that these tokens make visible; None when there is nothing to show yet."""
        if self.finish_reason is not None:
            return None
        if self.drops_tokens and produced.token_ids:
            self.finish_reason = "length"
            return Piece(self.index, "", None, "length")
        text, stops = "", self.dispatch.work.sampling.stop_token_ids
        reason: str | None = produced.finish_reason
        logprobs = produced.logprobs
        for place, token_id in enumerate(produced.token_ids):
            self.num_tokens += 1
            if token_id in stops:
                reason = "stop"
                break
            text += self.stream.push(token_id)
            if logprobs is not None:
                self._pending.append(self._describe(logprobs[place]))
            if self.stream.stopped:
                reason = "stop"
                self.dispatch.cancel()
                break
        if reason is not None:
            text += self.stream.finish()
        calls: Sequence[CallDelta] = ()
        if self.calls is not None:
            text, calls = self.calls.feed(text)
            if reason is not None:
                text += self.calls.finish()
            if reason == "stop" and self.calls.is_complete:
                reason = "tool_calls"
        self.finish_reason = reason
        if not text and not calls and reason is None:
            return None
        pending, self._pending = self._pending, []
        return Piece(self.index, text, pending if logprobs is not None or pending else None, reason, calls)

    def _describe(self, logprob: TokenLogprob) -> ChosenLogprob:
        top = [self._top(token_id, value) for token_id, value in logprob.top]
        one = self._top(logprob.token_id, logprob.logprob)
        return ChosenLogprob(one.token, one.logprob, one.bytes, top)

    def _top(self, token_id: int, logprob: float) -> TopLogprob:
        data = self.tokenizer.token_bytes(token_id)
        return TopLogprob(data.decode("utf-8", errors="replace"), logprob, list(data))
