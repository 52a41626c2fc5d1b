"""Content blocks of a request. Those that this server cannot read are refused by their type's name."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, StringConstraints, Tag

from serving.schemas import Strict, StrictBool

NonEmpty = Annotated[str, StringConstraints(min_length=1)]


class CacheControl(Strict):
    """Prefixes are cached without being asked, so that a breakpoint changes nothing."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class TextBlock(Strict):
    type: Literal["text"]
    text: NonEmpty
    cache_control: CacheControl | None = None
    citations: None = None


class DirectCaller(Strict):
    """The model itself, not a program of its."""

    type: Literal["direct"]


class ToolUseBlock(Strict):
    type: Literal["tool_use"]
    id: NonEmpty
    name: NonEmpty
    input: dict[str, Any]
    cache_control: CacheControl | None = None
    caller: DirectCaller | None = None


def _as_blocks(value: Any) -> Any:
    """A string is short for one block of text; the empty string for none."""
    if isinstance(value, str):
        return [{"type": "text", "text": value}] if value else []
    if not isinstance(value, list):
        raise ValueError("must be a string or an array of content blocks")
    return value


def _only(*kinds: str) -> BeforeValidator:
    def check(value: Any) -> Any:
        given = value.get("type") if isinstance(value, dict) else None
        if isinstance(given, str) and given not in kinds:
            raise ValueError(f"{given!r} blocks are not supported here; supported are {', '.join(kinds)}")
        return value

    return BeforeValidator(check)


def _tag_of(value: Any) -> str:
    # The space keeps the tag out of an error's path, which has only identifiers (`serving.errors`).
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return f"a {kind} block" if kind in ("tool_use", "tool_result") else "a text block"


TextContent = Annotated[
    list[Annotated[TextBlock, _only("text")]],
    BeforeValidator(_as_blocks, json_schema_input_type=str | list[TextBlock]),
]


class ToolResultBlock(Strict):
    type: Literal["tool_result"]
    tool_use_id: NonEmpty
    content: TextContent = Field(default_factory=list)
    is_error: StrictBool | None = None
    cache_control: CacheControl | None = None


Block = Annotated[
    Annotated[TextBlock, Tag("a text block")]
    | Annotated[ToolUseBlock, Tag("a tool_use block")]
    | Annotated[ToolResultBlock, Tag("a tool_result block")],
    Discriminator(_tag_of),
    _only("text", "tool_use", "tool_result"),
]
Content = Annotated[
    list[Block],
    BeforeValidator(
        _as_blocks, json_schema_input_type=str | list[TextBlock | ToolUseBlock | ToolResultBlock]
    ),
]


def text_of(blocks: Sequence[Any]) -> str:
    """The text blocks' texts, each in lines of its own."""
    return "\n".join(block.text for block in blocks if isinstance(block, TextBlock))
