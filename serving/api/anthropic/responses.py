"""The Messages API's responses."""

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel

StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"]
ServiceTier = Literal["standard", "priority", "batch"]


class TextContentBlock(BaseModel):
    type: Literal["text"] = "text"
    text: str


class ToolUseContentBlock(BaseModel):
    type: Literal["tool_use"] = "tool_use"
    id: str
    name: str
    input: dict[str, Any]


class MessageUsage(BaseModel):
    """The prompt's tokens are `input_tokens` and `cache_read_input_tokens` together: the latter came from the
    prefix cache, which needs no tokens to be created.
    """

    input_tokens: int
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int
    output_tokens: int


class UsageAndTier(MessageUsage):
    service_tier: ServiceTier


class MessageResponse(BaseModel):
    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[TextContentBlock | ToolUseContentBlock]
    stop_reason: StopReason | None
    """None at the beginning of a stream."""
    stop_sequence: str | None = None
    usage: UsageAndTier


class TokenCount(BaseModel):
    input_tokens: int


class AnthropicModel(BaseModel):
    type: Literal["model"] = "model"
    id: str
    display_name: str
    created_at: datetime
    lifecycle: Literal["active"] = "active"
    max_input_tokens: int
    max_tokens: int


class AnthropicModels(BaseModel):
    data: list[AnthropicModel]
    has_more: bool = False
    first_id: str | None
    last_id: str | None
