"""API keys as strings: made, recognised, hashed. Pure but for the randomness.

    sk-cm-<37 random characters><6 of checksum>

The checksum tells a mistyped key from a wrong one without asking anybody. What is stored is an HMAC under a pepper that
is not in the database, so that whoever reads the database can neither use nor try keys.
"""

import hashlib
import hmac
import re
import secrets
import zlib

MARK = "sk-cm-"
NUM_RANDOM = 37
"""Characters of 62: 220 bits."""
NUM_CHECK = 6
_ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_SHAPE = re.compile(rf"{MARK}[0-9A-Za-z]{{{NUM_RANDOM + NUM_CHECK}}}")


def new_key() -> str:
    """A key that nobody has yet."""
    body = MARK + "".join(secrets.choice(_ALPHABET) for _ in range(NUM_RANDOM))
    return body + _check_of(body)


def is_well_formed(key: str) -> bool:
    """Whether a string can be one of our keys."""
    return _SHAPE.fullmatch(key) is not None and hmac.compare_digest(
        _check_of(key[:-NUM_CHECK]), key[-NUM_CHECK:]
    )


def digest_of(key: str, pepper: bytes) -> str:
    """What is stored of a key: 64 hex digits."""
    return hmac.digest(pepper, key.encode(), hashlib.sha256).hex()


def shown_of(key: str) -> tuple[str, str]:
    """What may be shown of a key: its beginning and its last four characters."""
    return key[: len(MARK) + 4], key[-4:]


def _check_of(body: str) -> str:
    number, digits = zlib.crc32(body.encode()), ""
    for _ in range(NUM_CHECK):
        number, digit = divmod(number, len(_ALPHABET))
        digits = _ALPHABET[digit] + digits
    return digits
