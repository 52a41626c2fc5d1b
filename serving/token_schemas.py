"""POST /tokenize and /detokenize: vLLM's shapes."""

from typing import Annotated

from pydantic import BaseModel, Field, StringConstraints, model_validator

from engine import ParameterError
from serving.chat_schemas import ChatMessage
from serving.schemas import Strict, StrictBool, TokenId
from serving.tools.schemas import MAX_TOOLS, ChatTool

Model = Annotated[str, StringConstraints(min_length=1)]


class TokenizeRequest(Strict):
    """A text (`prompt`) or a conversation (`messages`), under the model's chat template."""

    model: Model | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    tools: Annotated[list[ChatTool], Field(max_length=MAX_TOOLS)] | None = None
    """What a conversation's model may call."""
    add_special_tokens: StrictBool | None = None
    """Of a text, default true. A chat template brings its own."""
    add_generation_prompt: StrictBool | None = None
    """Of a conversation, default true: open the assistant's turn."""
    return_token_strs: StrictBool = False

    @model_validator(mode="after")
    def _text_or_conversation(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise ParameterError("prompt", "give either prompt or messages")
        if self.messages is not None and self.add_special_tokens:
            raise ParameterError(
                "add_special_tokens",
                "must be false with messages: the chat template brings its own",
            )
        if self.prompt is not None and self.tools is not None:
            raise ParameterError("tools", "is only allowed with messages")
        if self.prompt is not None and self.add_generation_prompt is not None:
            raise ParameterError("add_generation_prompt", "is only allowed with messages")
        return self


class TokenizeResponse(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(Strict):
    model: Model | None = None
    tokens: Annotated[list[TokenId], Field(max_length=2**20)]


class DetokenizeResponse(BaseModel):
    prompt: str
