"""The tokenizer that a GGUF file describes, as one of the `tokenizers` library (saved as `tokenizer.json`)."""

from collections import Counter
from collections.abc import Callable, Sequence

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.normalizers import Normalizer
from tokenizers.pre_tokenizers import PreTokenizer

from engine.weights.errors import ModelFileError
from engine.weights.gguf import GgufFile

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
"""`tokenizer.ggml.token_type` values that matter here (1: normal, 5: unused, 6: byte)."""

_SPACE = "▁"
"""SentencePiece's visible space."""

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _byte_level() -> PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _single_digits() -> PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _byte_level()])


def _pattern(regex: str) -> PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(regex), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


PRE_TOKENIZERS: dict[str, Callable[[], PreTokenizer]] = {
    **dict.fromkeys(["gpt-2", "gpt2", "olmo", "phi-2"], _byte_level),
    **dict.fromkeys(["smollm", "starcoder", "refact", "command-r"], _single_digits),
    **dict.fromkeys(["llama-bpe", "llama3", "llama-v3", "falcon3"], lambda: _pattern(_LLAMA3)),
    **dict.fromkeys(["qwen2", "deepseek-r1-qwen"], lambda: _pattern(_QWEN2)),
    "tekken": lambda: _pattern(_TEKKEN),
}
"""How text is cut before byte-pair merging, by the file's `tokenizer.ggml.pre`."""

_IGNORE_MERGES = frozenset(["llama-bpe", "llama3", "llama-v3", "falcon3", "tekken"])
"""Models whose whole words are looked up in the vocabulary before merging."""


def tokenizer_from_gguf(file: GgufFile) -> Tokenizer:
    """Build it. Raises ModelFileError when the file has none, or one of a kind that is not known."""
    kind = file.get("tokenizer.ggml.model", str)
    if kind == "gpt2":
        tokenizer = _byte_pair(file)
    elif kind == "llama":
        tokenizer = _sentence_piece(file)
    else:
        raise ModelFileError(
            f"{file.path}: tokenizer kind {kind!r} is not supported ('gpt2' and 'llama' are)"
        )
    _add_special_tokens(tokenizer, file)
    return tokenizer


def adds_bos(file: GgufFile) -> bool:
    """Whether a prompt starts with the beginning-of-sequence token."""
    by_kind = file.get("tokenizer.ggml.model", str) == "llama" or file.get("tokenizer.ggml.pre", str, "") in (
        "llama-bpe",
        "llama3",
        "llama-v3",
    )
    return file.get("tokenizer.ggml.add_bos_token", bool, by_kind)


def _vocabulary(file: GgufFile) -> dict[str, int]:
    tokens = file.get("tokenizer.ggml.tokens", list)
    vocabulary = {str(token): token_id for token_id, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        twice = Counter(str(token) for token in tokens).most_common(1)[0][0]
        raise ModelFileError(
            f"{file.path}: token {twice!r} stands twice in tokenizer.ggml.tokens; the file is damaged"
        )
    return vocabulary


def _byte_pair(file: GgufFile) -> Tokenizer:
    pre = file.get("tokenizer.ggml.pre", str, "")
    if pre not in PRE_TOKENIZERS:
        raise ModelFileError(
            f"{file.path}: pre-tokenizer {pre!r} (tokenizer.ggml.pre) is not known; guessing it would damage every "
            f"prompt. Known: {', '.join(PRE_TOKENIZERS)}. The model's Hugging Face folder can be added instead"
        )
    vocabulary = _vocabulary(file)
    merges: list[tuple[str, str]] = []
    for merge in file.get("tokenizer.ggml.merges", list):
        left, _, right = str(merge).partition(" ")
        if left not in vocabulary or right not in vocabulary or left + right not in vocabulary:
            raise ModelFileError(
                f"{file.path}: merge {merge!r} uses tokens outside the vocabulary; the file is damaged"
            )
        merges.append((left, right))
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=merges, ignore_merges=pre in _IGNORE_MERGES))
    if pre in ("qwen2", "deepseek-r1-qwen"):
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentence_piece(file: GgufFile) -> Tokenizer:
    vocabulary = _vocabulary(file)
    scores = [float(str(score)) for score in file.get("tokenizer.ggml.scores", list)]
    if len(scores) != len(vocabulary):
        raise ModelFileError(
            f"{file.path}: {len(scores)} scores for {len(vocabulary)} tokens (tokenizer.ggml.scores); "
            "the file is damaged"
        )
    unknown = file.get("tokenizer.ggml.unknown_token_id", int, 0)
    names = list(vocabulary)
    if not 0 <= unknown < len(names):
        raise ModelFileError(
            f"{file.path}: tokenizer.ggml.unknown_token_id {unknown} is outside the vocabulary"
        )
    model = BPE(
        vocab=vocabulary,
        merges=_merges_by_score(vocabulary, scores),
        unk_token=names[unknown],
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    prefix = file.get("tokenizer.ggml.add_space_prefix", bool, True)
    to_visible: list[Normalizer] = [normalizers.Replace(" ", _SPACE)]
    tokenizer.normalizer = normalizers.Sequence(
        ([normalizers.Prepend(_SPACE)] if prefix else []) + to_visible
    )
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + ([decoders.Strip(" ", 1, 0)] if prefix else []))
    return tokenizer


def _merges_by_score(vocabulary: dict[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """SentencePiece joins the neighbours that make the best-scored token; as a list of merges that is all ways to
    cut each token in two, best score first."""
    ranked: list[tuple[float, int, int, str, str]] = []
    for token, token_id in vocabulary.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocabulary and right in vocabulary:
                ranked.append((-scores[token_id], vocabulary[left], vocabulary[right], left, right))
    ranked.sort(key=lambda merge: merge[:3])
    return [(left, right) for _, _, _, left, right in ranked]


def _add_special_tokens(tokenizer: Tokenizer, file: GgufFile) -> None:
    """Control tokens are special (never shown as text); user-defined ones are text, but never cut."""
    tokens = file.get("tokenizer.ggml.tokens", list)
    types = file.get("tokenizer.ggml.token_type", list, [])
    special: list[AddedToken] = []
    whole: list[AddedToken] = []
    for token, kind in zip(tokens, types, strict=False):
        if kind in (_CONTROL, _UNKNOWN):
            special.append(AddedToken(str(token), special=True, normalized=False))
        elif kind == _USER_DEFINED:
            whole.append(AddedToken(str(token), special=False, normalized=False))
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(whole)
