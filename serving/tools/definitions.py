"""Tools, calls and conversations as every API means them."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]
ChoiceMode = Literal["none", "auto", "required"]

NO_PARAMETERS: Mapping[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True, slots=True)
class ToolDefinition:
    """A function that the model may ask the client to call.

    Args:
        name: of letters, digits, `_` and `-`; unique among a request's tools.
        parameters: JSON schema of the arguments, of type object.
        is_strict: a call's arguments are held to the schema while they are written.
        field: the request's field that holds the parameters, for errors: `tools[0].function.parameters`.
    """

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = dataclasses.field(default_factory=lambda: NO_PARAMETERS)
    is_strict: bool = False
    field: str = "tools"

    def as_template_input(self) -> dict[str, Any]:
        """As chat templates take it, in Hugging Face's convention; some of them need `properties`."""
        return {
            "type": "function",
            "function": {
                "name": self.name,
                "description": self.description,
                "parameters": {**self.parameters, "properties": self.parameters.get("properties", {})},
            },
        }


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """Whether the model calls.

    Args:
        mode: never, as it likes, or at least once.
        names: of the tools that it may call; None for all. With mode "required", one name is one call of it.
        is_parallel: several calls in one answer are allowed.
    """

    mode: ChoiceMode = "auto"
    names: tuple[str, ...] | None = None
    is_parallel: bool = True


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call. `arguments` is JSON text as the model wrote it: an object, unless the answer was cut."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Message:
    """A turn of a conversation. A `tool` message is the result of the call `tool_call_id`."""

    role: Role
    content: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
