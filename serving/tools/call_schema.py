"""The JSON schema of an output that calls."""

from collections.abc import Mapping, Sequence
from typing import Any

from serving.tools.definitions import ToolDefinition

MAX_FORCED_CALLS = 16
"""Of one answer that has to call: without a limit a weak model calls until the context is full."""

_DATA_KEYWORDS = ("const", "enum", "default", "examples")


def call_schema(
    tools: Sequence[ToolDefinition],
    arguments_key: str,
    *,
    is_parallel: bool,
    or_answer: Mapping[str, Any] | bool | None = None,
) -> dict[str, Any]:
    """Schema of a call of one of the tools, or of a list of 1 to MAX_FORCED_CALLS calls.

    The name stands before the arguments, so that both can be streamed as they are written.

    or_answer: a schema that an output without a call has; None where it has to call.
    """
    definitions: dict[str, Any] = {t.name: moved(t.parameters, f"#/$defs/{t.name}") for t in tools}
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": t.name}, arguments_key: {"$ref": f"#/$defs/{t.name}"}},
            "required": ["name", arguments_key],
            "additionalProperties": False,
        }
        for t in tools
    ]
    call: dict[str, Any] = calls[0] if len(calls) == 1 else {"anyOf": calls}
    schema = call
    if is_parallel:
        schema = {"type": "array", "items": call, "minItems": 1, "maxItems": MAX_FORCED_CALLS}
    if or_answer is not None:
        definitions[_ANSWER] = moved(or_answer, f"#/$defs/{_ANSWER}")
        schema = {"anyOf": [schema, {"$ref": f"#/$defs/{_ANSWER}"}]}
    return {**schema, "$defs": definitions}


_ANSWER = "the.answer"  # no tool can have this name


def moved(schema: Any, place: str) -> Any:
    """A schema whose references to itself hold where it stands at `place` in another document.

    What says of which document it is (`$schema`, `$id`) goes.
    """
    if isinstance(schema, list):
        return [moved(item, place) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    kept: dict[str, Any] = {}
    for key, value in schema.items():
        if key == "$ref" and isinstance(value, str) and value.startswith("#"):
            kept[key] = place + value[1:]
        elif key in ("$schema", "$id") and isinstance(value, str):
            continue
        else:
            kept[key] = value if key in _DATA_KEYWORDS else moved(value, place)
    return kept
