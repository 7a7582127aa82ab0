"""Reading a JSON body: within its limit, declared as JSON, and decoded so that an error names the field."""

import re
from typing import Any, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request

from app.api.schemas import REFUSED_FIELDS
from app.errors import BodyTooLargeError, InvalidRequestError, MediaTypeError, UnsupportedError

T = TypeVar("T", bound=msgspec.Struct)

_PATH = re.compile(r"^(?P<what>.*?)(?: - at (?:`key` in )?`\$\.?(?P<path>.*)`)?$", re.DOTALL)
_MISSING = re.compile(r"^Object missing required field `(?P<name>[^`]+)`$")
_WORDS = {
    "`null`": "null",
    "`str`": "a string",
    "`int`": "an integer",
    "`float`": "a number",
    "`bool`": "a boolean",
    "`array`": "an array",
    "`object`": "an object",
}


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The whole body. Raises BodyTooLargeError, MediaTypeError, and ClientDisconnect when the caller is gone."""
    content_type = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if content_type != "application/json" and not content_type.endswith("+json"):
        raise MediaTypeError(f"send the body as application/json, not {content_type}", param="content-type")
    declared = request.headers.get("content-length", "0")
    if declared.isdigit() and int(declared) > max_bytes:
        raise BodyTooLargeError(f"the body has {declared} bytes; at most {max_bytes} are accepted")
    pieces: list[bytes] = []
    num_bytes = 0
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        piece = message.get("body", b"")
        num_bytes += len(piece)
        if num_bytes > max_bytes:
            raise BodyTooLargeError(f"the body is larger than the {max_bytes} bytes that are accepted")
        pieces.append(piece)
        if not message.get("more_body", False):
            return b"".join(pieces)


def parse(body: bytes, decoder: msgspec.json.Decoder[T]) -> T:
    """The body as the decoder's type. Raises InvalidRequestError or UnsupportedError naming the field."""
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequestError(
            f"the body is not valid UTF-8: {error.reason} at byte {error.start}", code="invalid_utf8"
        ) from None
    try:
        request = decoder.decode(text)
    except msgspec.ValidationError as error:
        raise _field_error(str(error)) from None
    except (msgspec.DecodeError, UnicodeError) as error:
        raise InvalidRequestError(f"the body is not valid JSON: {error}", code="invalid_json") from None
    except RecursionError:
        raise InvalidRequestError(
            "the body is not acceptable JSON: nested too deeply", code="invalid_json"
        ) from None
    for name in REFUSED_FIELDS.get(type(request), ()):
        value: Any = getattr(request, name)
        if value not in (None, False, [], {}, "", 0):
            raise UnsupportedError(f"{name} is not supported by this service", param=name)
    return request


def _field_error(text: str) -> InvalidRequestError:
    match = _PATH.match(text)
    what, path = (match["what"], match["path"] or "") if match else (text, "")
    missing = _MISSING.match(what)
    if missing:
        param = f"{path}.{missing['name']}" if path else missing["name"]
        return InvalidRequestError(f"{param} is required", param=param, code="missing_required_parameter")
    for theirs, ours in _WORDS.items():
        what = what.replace(theirs, ours)
    what = what[:1].lower() + what[1:].replace(" | ", " or ").replace("`", "")
    code = "invalid_type" if ", got" in what else "invalid_value"
    if not path:
        return InvalidRequestError(f"the body: {what}", code=code)
    return InvalidRequestError(f"{path}: {what}", param=path, code=code)
