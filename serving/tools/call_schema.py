"""The JSON schema of an output that is a call or an answer of a form of its own."""

from collections.abc import Mapping, Sequence
from typing import Any

from serving.tools.definitions import ToolDefinition

_DATA_KEYWORDS = ("const", "enum", "default", "examples")
_ANSWER = "the.answer"  # no tool can have this name


def call_or_answer(
    tools: Sequence[ToolDefinition],
    arguments_key: str,
    answer: Mapping[str, Any] | bool,
    *,
    is_parallel: bool,
) -> dict[str, Any]:
    """Schema of an answer, a call of one of the tools or, where they may be several, a list of calls."""
    definitions: dict[str, Any] = {t.name: moved(t.parameters, f"#/$defs/{t.name}") for t in tools}
    definitions[_ANSWER] = moved(answer, f"#/$defs/{_ANSWER}")
    calls: list[dict[str, Any]] = [
        {
            "type": "object",
            "properties": {"name": {"const": t.name}, arguments_key: {"$ref": f"#/$defs/{t.name}"}},
            "required": ["name", arguments_key],
            "additionalProperties": False,
        }
        for t in tools
    ]
    if is_parallel:
        calls.append({"type": "array", "items": {"anyOf": calls.copy()}, "minItems": 1})
    return {"anyOf": [*calls, {"$ref": f"#/$defs/{_ANSWER}"}], "$defs": definitions}


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
