"""Which bytes of text a token stands for, by the two ways in which vocabularies write bytes as characters."""

from functools import cache


@cache
def _byte_alphabet() -> dict[str, int]:
    """The character by which byte-level BPE writes each byte: itself where printable, else one from U+0100 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def byte_level(token: str) -> bytes:
    """Bytes of a token of a byte-level vocabulary. One that is not written in its alphabet stands for itself."""
    alphabet = _byte_alphabet()
    try:
        return bytes([alphabet[char] for char in token])
    except KeyError:
        return token.encode()


def sentence_piece(token: str) -> bytes:
    """Bytes of a token of a SentencePiece vocabulary: `<0xNN>` is one byte, U+2581 a space."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode()
