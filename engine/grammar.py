"""Grammars: which tokens may come next, so that what is generated has the shape that was asked for.

A grammar arrives serialised in `SamplingParams.grammar`. It is compiled once and then copied for each sequence; the
copy, a `Matcher`, follows its sequence token by token. The tokens that it allows depend on the sequence's own tokens
alone, so a constrained answer is the same in any batch and goes on at another worker from its token ids.

llguidance (https://github.com/guidance-ai/llguidance) does the parsing, within `LIMITS`: no schema can hold up a step
for long or fill the memory; one that would is an error of its own request.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer

from engine.vocabulary import Vocabulary

Mask = npt.NDArray[np.uint32]
"""One bit per token, the lowest of each word first; set: allowed."""

MAX_GRAMMAR_BYTES = 256 * 1024
"""Longest serialised grammar."""
MAX_COMPILED = 64
"""Grammars whose compiled form is kept."""
LIMITS = LLParserLimits(
    initial_lexer_fuel=2_000_000,  # about 40 ms of building, by the library's own figure
    step_lexer_fuel=200_000,
    step_max_items=50_000,
    max_grammar_size=200_000,
    max_lexer_states=50_000,
    verbose_errors=False,
)


class GrammarError(ValueError):
    """A grammar that is not one, is too large, or uses what is not supported; the message says which."""


def check_grammar(grammar: str) -> None:
    """Compile without a vocabulary, as a gateway does before it lets a request in. Raises GrammarError."""
    _check_size(grammar)
    if message := LLMatcher.validate_grammar(grammar, None, limits=LIMITS):
        raise GrammarError(message)


class Matcher:
    """Follows one sequence through its grammar. For one thread at a time."""

    __slots__ = ("inner", "num_words")

    def __init__(self, inner: LLMatcher, num_words: int) -> None:
        self.inner = inner
        self.num_words = num_words
        """Length of its masks."""

    def accept(self, token: int) -> None:
        """The sequence goes on with `token`."""
        self.inner.consume_token(token)

    def allowed_part(self, tokens: Sequence[int]) -> int:
        """How many of these tokens, one after another, the grammar would take."""
        return self.inner.validate_tokens(list(tokens))

    def forced(self) -> list[int]:
        """Tokens that write what must come next, where only one text can; they may be cut differently, too."""
        return self.inner.compute_ff_tokens()

    @property
    def is_complete(self) -> bool:
        """Nothing may follow but the end."""
        return self.inner.is_stopped()

    @property
    def error(self) -> str | None:
        """What went wrong for good: a limit reached, or a token that does not fit."""
        return self.inner.get_error() if self.inner.is_error() else None


class GrammarCompiler:
    """Makes matchers for one model's vocabulary. Thread-safe.

    `read` gives the vocabulary, when it is first needed; `vocab_size` is the model's, which may be padded beyond it.
    """

    def __init__(self, read: Callable[[], Vocabulary], *, vocab_size: int, eos_ids: Sequence[int]) -> None:
        self._read = read
        self._vocab_size = vocab_size
        self._eos_ids = list(eos_ids)
        self._tokenizer: LLTokenizer | None = None
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def warm(self) -> None:
        """Read the vocabulary now instead of at the first grammar."""
        with self._lock:
            self._vocabulary()

    def compile(self, grammar: str) -> Matcher:
        """A matcher at the beginning of `grammar`. Raises GrammarError."""
        with self._lock:
            compiled = self._compiled.get(grammar)
            if compiled is not None:
                self._compiled.move_to_end(grammar)
                return self._copy(compiled)
            tokenizer = self._vocabulary()
        _check_size(grammar)
        compiled = LLMatcher(tokenizer, grammar, log_level=0, limits=LIMITS)
        if compiled.is_error():
            raise GrammarError(compiled.get_error())
        with self._lock:
            self._compiled[grammar] = compiled
            while len(self._compiled) > MAX_COMPILED:
                self._compiled.popitem(last=False)
            return self._copy(compiled)

    def _copy(self, compiled: LLMatcher) -> Matcher:
        return Matcher(compiled.deep_copy(), -(-self._vocab_size // 32))

    def _vocabulary(self) -> LLTokenizer:
        if self._tokenizer is None:
            vocabulary: Any = _Source(self._read(), self._eos_ids)  # has what the library's own wrapper has
            self._tokenizer = LLTokenizer(
                vocabulary, self._vocab_size, self._eos_ids, LLTokenizer.json_slices()
            )
        return self._tokenizer


class Masks:
    """Computes the masks of a step in a thread of its own, while the model computes the logits."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="masks")
        self._executor = LLExecutor(1)
        self._buffer = np.zeros((0, 0), np.uint32)

    def begin(self, wanted: Sequence[tuple[Matcher, list[int]]]) -> Callable[[], Mask]:
        """Start with the masks of these matchers, each followed by those behind each of its draft tokens.

        Call what this returns to wait for them: one row each, overwritten after the next `begin`.
        """
        return self._thread.submit(self._compute, wanted).result if wanted else _no_masks

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown()

    def _compute(self, wanted: Sequence[tuple[Matcher, list[int]]]) -> Mask:
        num_rows = sum(1 + len(draft) for _, draft in wanted)
        num_words = wanted[0][0].num_words
        if num_rows > len(self._buffer) or num_words != self._buffer.shape[1]:
            self._buffer = np.zeros((num_rows, num_words), np.uint32)
        rows = self._buffer[:num_rows]
        address, row_bytes = rows.ctypes.data, num_words * 4
        at = 0
        for matcher, draft in wanted:
            if draft:
                self._executor.unsafe_compute_mask_ptr_with_draft_token(
                    [(matcher.inner, at, draft)], address, row_bytes, num_rows
                )
            else:
                matcher.inner.unsafe_compute_mask_ptr(address + at * row_bytes, row_bytes)
            at += 1 + len(draft)
        return rows


def _no_masks() -> Mask:
    return np.zeros((0, 0), np.uint32)


class _Source:
    """A vocabulary in the form in which llguidance reads one."""

    bos_token_id = None
    is_tokenizer_wrapper = True

    def __init__(self, vocabulary: Vocabulary, eos_ids: Sequence[int]) -> None:
        self.tokens = vocabulary.tokens
        self.special_token_ids = sorted(vocabulary.control)
        self.eos_token_id = eos_ids[0]
        by_bytes = {data: token for token, data in enumerate(vocabulary.tokens) if data}
        self._by_bytes = by_bytes
        self._longest = max(map(len, by_bytes))

    def __call__(self, text: str | bytes) -> list[int]:
        """Longest match first: forced text is only a proposal, and the model cuts it as it likes."""
        data = text.encode() if isinstance(text, str) else text
        ids, at = [], 0
        while at < len(data):
            length = next(
                n
                for n in range(min(self._longest, len(data) - at), 0, -1)
                if data[at : at + n] in self._by_bytes
            )
            ids.append(self._by_bytes[data[at : at + length]])
            at += length
        return ids


def _check_size(grammar: str) -> None:
    if len(grammar.encode()) > MAX_GRAMMAR_BYTES:
        raise GrammarError(f"it is longer than {MAX_GRAMMAR_BYTES} bytes")
