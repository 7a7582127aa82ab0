import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.text import Detokenizer, ModelText, StopStrings, TextStream, Tokenizer
from tests.app.text.conftest import known_part

unicode_text = st.text(st.characters(exclude_categories=["Cs"]))


def streamed(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.push(token) for token in ids), detokenizer.flush()]


@given(st.lists(st.integers(0, 49_151), max_size=40))
def test_pieces_of_any_tokens_are_the_whole(text: ModelText, ids: list[int]) -> None:
    pieces = streamed(text.tokenizer, ids)
    assert "".join(pieces) == text.tokenizer.decode(ids)
    library = text.tokenizer._inner.decode(ids, skip_special_tokens=True)
    assert "".join(pieces) == library


@given(unicode_text)
def test_no_character_is_split(text: ModelText, sample: str) -> None:
    sample = known_part(text.tokenizer, sample)
    pieces = streamed(text.tokenizer, text.tokenizer.encode(sample))
    assert "".join(pieces) == sample
    if "\ufffd" not in sample:
        assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_spread_over_tokens_comes_whole(text: ModelText) -> None:
    # U+130B8 is rare enough to be four single bytes.
    ids = text.tokenizer.encode("\U000130b8")
    assert len(ids) > 1
    assert streamed(text.tokenizer, ids)[:-1] == [""] * (len(ids) - 1) + ["\U000130b8"]
    assert streamed(text.tokenizer, ids[:-1])[-1] == "\ufffd", "a cut character shows as one"


def test_sentence_piece_drops_only_the_first_space(sentence_piece: Tokenizer) -> None:
    ids = sentence_piece.encode("hello a")[1:]
    assert "".join(streamed(sentence_piece, ids)) == "hello a"
    going_on = Detokenizer(sentence_piece, continues_text=True)
    assert "".join(going_on.push(token) for token in ids) == " hello a"


def feed(stops: list[str], pieces: list[str]) -> tuple[str, str | None]:
    """Text passed on, and the stop string met."""
    matcher = StopStrings(stops)
    shown = "".join([matcher.push(piece) for piece in pieces])
    return shown + matcher.flush(), matcher.matched


def test_a_stop_string_across_pieces_is_never_shown() -> None:
    matcher = StopStrings(["STOP"])
    assert [matcher.push(piece) for piece in ["go S", "TO", "L S", "T", "OP no"]] == [
        "go ",
        "",
        "STOL ",
        "",
        "",
    ]
    assert matcher.matched == "STOP"
    assert matcher.push("more") == matcher.flush() == ""


def test_withheld_text_comes_out_at_the_end() -> None:
    assert feed(["STOP"], ["well STO"]) == ("well STO", None)


def test_the_stop_that_ends_first_counts_and_the_longest_of_equals() -> None:
    assert feed(["abcd", "bc"], ["xabcd"]) == ("xa", "bc")
    assert feed(["c", "abc"], ["xabcd"]) == ("x", "abc")


@settings(max_examples=300)
@given(
    sample=st.text("ab\n", max_size=30),
    stops=st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 30), max_size=6),
)
def test_how_the_text_is_cut_changes_nothing(sample: str, stops: list[str], cuts: list[int]) -> None:
    places = [0, *sorted(min(cut, len(sample)) for cut in cuts), len(sample)]
    pieces = [sample[begin:end] for begin, end in itertools.pairwise(places)]
    whole = feed(stops, [sample])
    assert feed(stops, pieces) == feed(stops, list(sample)) == whole
    shown, matched = whole
    # By definition: the shortest beginning of the text that ends in a stop string, less the longest such.
    ends = [end for end in range(len(sample) + 1) if any(sample[:end].endswith(stop) for stop in stops)]
    if not ends:
        assert whole == (sample, None)
    else:
        longest = max((stop for stop in stops if sample[: ends[0]].endswith(stop)), key=len)
        assert (shown, matched) == (sample[: ends[0] - len(longest)], longest)


def test_nothing_is_withheld_that_cannot_become_a_stop() -> None:
    matcher = StopStrings(["\n\n"])
    assert matcher.push("line\n") == "line"
    assert matcher.push("next") == "\nnext"


def test_empty_stop_strings_are_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        StopStrings(["a", ""])


@given(unicode_text, st.lists(st.text(min_size=1, max_size=3), max_size=2))
def test_a_stream_of_tokens_shows_the_text_before_the_stop(
    text: ModelText, sample: str, stops: list[str]
) -> None:
    sample = known_part(text.tokenizer, sample)
    stream = TextStream(text.tokenizer, stops)
    shown = "".join([stream.push(token) for token in text.tokenizer.encode(sample)]) + stream.finish()
    assert (shown, stream.matched_stop) == feed(stops, list(sample))
    assert stream.stopped == any(stop in sample for stop in stops)
