"""The OpenAPI document: bodies and answers by the types that are decoded and encoded, errors by their envelope."""

from typing import Any

import msgspec
from fastapi import FastAPI

from app.api.middleware import OPEN_PATHS
from app.api.schemas import REFUSED_FIELDS
from app.errors import ErrorEnvelope

_FRAMEWORKS_OWN = ("HTTPValidationError", "ValidationError")


def json_body(
    body_type: type[msgspec.Struct], answer_type: Any = None, *, is_streamed: bool = False
) -> dict[str, Any]:
    """What to merge into a route's operation: a required JSON body of `body_type`, without what it refuses.

    `answer_type`: what a whole answer is; `is_streamed`: events are the other way to answer.
    """
    described = {} if answer_type is None else json_answer(answer_type, is_streamed=is_streamed)
    schema = _schema(body_type)
    for name in REFUSED_FIELDS.get(body_type, ()):
        schema["properties"].pop(name)
    content = {"application/json": {"schema": schema}}
    return {"requestBody": {"required": True, "content": content}, **described}


def json_answer(answer_type: Any, *, status: int = 200, is_streamed: bool = False) -> dict[str, Any]:
    """What to merge into a route's operation: an answer of `answer_type`, as msgspec encodes it."""
    content: dict[str, Any] = {"application/json": {"schema": _schema(answer_type)}}
    if is_streamed:
        content["text/event-stream"] = {"schema": _EVENT}
    return {"responses": {str(status): {"description": "Answer", "content": content}}}


class DocumentedApp(FastAPI):
    """An application whose document also says how every operation fails, and which of them need a key."""

    def openapi(self) -> dict[str, Any]:
        """The document; made at the first call."""
        if self.openapi_schema is None:
            document = super().openapi()
            components = document.setdefault("components", {})
            schemas = components.setdefault("schemas", {})
            for name in _FRAMEWORKS_OWN:
                schemas.pop(name, None)
            schemas["Error"] = _schema(ErrorEnvelope)
            components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            for path, operations in document["paths"].items():
                for operation in operations.values():
                    operation["responses"].pop("422", None)
                    operation["responses"]["default"] = _FAILURE
                    if path not in OPEN_PATHS:
                        operation["security"] = [{"key": []}]
        assert self.openapi_schema is not None
        return self.openapi_schema


_EVENT = {
    "type": "object",
    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
    "required": ["data"],
}
"""One of a stream's events; `data` is JSON, or `[DONE]`."""
_FAILURE = {
    "description": "OpenAI's envelope of an error; `param` names the field at fault.",
    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
    "headers": {"x-request-id": {"required": True, "schema": {"type": "string"}}},
}


def _schema(described: Any) -> dict[str, Any]:
    (schema,), components = msgspec.json.schema_components([described], ref_template="#/$defs/{name}")
    inlined: dict[str, Any] = _inline(schema, components)
    return inlined


def _inline(schema: Any, components: dict[str, Any]) -> Any:
    if isinstance(schema, list):
        return [_inline(item, components) for item in schema]
    if not isinstance(schema, dict):
        return schema
    reference = schema.get("$ref")
    if isinstance(reference, str):
        return _inline(components[reference.rpartition("/")[2]], components)
    return {name: _inline(value, components) for name, value in schema.items()}
