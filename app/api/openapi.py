"""Bodies in the OpenAPI document: the schema of the types that are really decoded."""

from typing import Any

import msgspec


def json_body(body_type: type[msgspec.Struct]) -> dict[str, Any]:
    """What to merge into a route's operation: a required JSON body of `body_type`, references inlined."""
    (schema,), components = msgspec.json.schema_components([body_type], ref_template="#/$defs/{name}")
    return {
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": _inline(schema, components)}},
        }
    }


def _inline(schema: Any, components: dict[str, Any]) -> Any:
    if isinstance(schema, list):
        return [_inline(item, components) for item in schema]
    if not isinstance(schema, dict):
        return schema
    reference = schema.get("$ref")
    if isinstance(reference, str):
        return _inline(components[reference.rpartition("/")[2]], components)
    return {name: _inline(value, components) for name, value in schema.items()}
