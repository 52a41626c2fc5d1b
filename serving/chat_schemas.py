"""Chat completions' requests and responses."""

from collections.abc import Sequence
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, BeforeValidator, Field, model_validator

from engine import ParameterError, SamplingParams
from serving.schemas import SamplingFields, Seed, Strict, StrictBool, StrictInt, Usage, one_of
from serving.tools import Message, ToolChoice, ToolDefinition
from serving.tools.schemas import (
    MAX_TOOLS,
    ChatTool,
    MessageToolCall,
    NonEmpty,
    ToolChoiceParam,
    tool_choice,
    tool_definitions,
)


def _refuse_functions(value: Any) -> None:
    if value is not None:
        raise ValueError("is deprecated and not supported; use tools, tool_choice and tool_calls")


_use_tools = BeforeValidator(_refuse_functions)


class TextPart(Strict):
    type: Literal["text"]
    text: str


Content = Annotated[str | list[TextPart], one_of("a string", "an array of content parts")]


class ChatMessage(Strict):
    """`checked_conversation` checks what a message has to have by its role and by the messages before it."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: str | None = None
    refusal: None = None
    audio: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    prefix: Literal[False] | None = None
    """Mistral's clients send it; an answer that goes on from a message's text is not served here."""
    function_call: Annotated[None, _use_tools] = None
    tool_calls: Annotated[list[MessageToolCall], Field(min_length=1)] | None = None
    tool_call_id: NonEmpty | None = None

    def as_message(self) -> Message:
        content = self.content or ""
        return Message(
            # Templates know "system"; "developer" is OpenAI's newer name for it.
            role="system" if self.role == "developer" else self.role,
            content=content if isinstance(content, str) else "".join(part.text for part in content),
            tool_calls=tuple(call.as_call() for call in self.tool_calls or ()),
            tool_call_id=self.tool_call_id,
        )


def checked_conversation(messages: Sequence[ChatMessage]) -> tuple[Message, ...]:
    """The messages, each of which has what its role asks for, and each call its result right behind it.

    Raises ParameterError naming the message and the field.
    """
    unanswered: list[str] = []
    for number, message in enumerate(messages):
        field = f"messages[{number}]"
        if message.content is None and not message.tool_calls:
            raise ParameterError(
                f"{field}.content", "is required unless an assistant's message has tool_calls"
            )
        if message.tool_calls and message.role != "assistant":
            raise ParameterError(f"{field}.tool_calls", "is only allowed in messages of role 'assistant'")
        if message.role == "tool":
            _check_result(message, field, unanswered)
            continue
        if message.tool_call_id is not None:
            raise ParameterError(f"{field}.tool_call_id", "is only allowed in messages of role 'tool'")
        if unanswered:
            raise ParameterError(field, _MISSING_RESULTS + ", ".join(unanswered))
        unanswered = [call.id for call in message.tool_calls or ()]
        if len(set(unanswered)) < len(unanswered):
            raise ParameterError(f"{field}.tool_calls", "the ids of a message's calls must differ")
    if unanswered:
        raise ParameterError("messages", _MISSING_RESULTS + ", ".join(unanswered))
    return tuple(message.as_message() for message in messages)


_MISSING_RESULTS = "a message with tool_calls must be followed by a tool message for each; there is none for "


def _check_result(message: ChatMessage, field: str, unanswered: list[str]) -> None:
    if message.tool_call_id is None:
        raise ParameterError(f"{field}.tool_call_id", "is required in messages of role 'tool'")
    if message.tool_call_id not in unanswered:
        raise ParameterError(
            f"{field}.tool_call_id",
            f"{message.tool_call_id!r} is not the id of a call that the assistant's message before has made "
            "and no message has answered",
        )
    unanswered.remove(message.tool_call_id)


class ChatCompletionRequest(SamplingFields):
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_tokens: Annotated[StrictInt, Field(ge=1, le=2**31 - 1)] | None = None
    max_completion_tokens: Annotated[StrictInt, Field(ge=1, le=2**31 - 1)] | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None
    metadata: dict[str, str] | None = None
    store: Literal[False] | None = None
    modalities: list[Literal["text"]] | None = None
    tools: Annotated[list[ChatTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoiceParam | None = None
    parallel_tool_calls: StrictBool | None = None
    functions: Annotated[None, _use_tools] = None
    function_call: Annotated[None, _use_tools] = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    seed: Annotated[Seed | None, Field(validation_alias=AliasChoices("seed", "random_seed"))] = None
    """`random_seed` is Mistral's name for it, `safe_prompt` a field of theirs."""
    safe_prompt: Literal[False] | None = None
    reasoning_effort: Literal["none"] | None = None
    verbosity: Literal["medium"] | None = None

    @model_validator(mode="after")
    def _top_logprobs_need_logprobs(self) -> "ChatCompletionRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise ParameterError("top_logprobs", "is only allowed when logprobs is true")
        return self

    @model_validator(mode="after")
    def _tools_and_results_fit(self) -> "ChatCompletionRequest":
        _ = self.conversation, self.choice  # each raises what is wrong with it
        return self

    @cached_property
    def conversation(self) -> tuple[Message, ...]:
        return checked_conversation(self.messages)

    @cached_property
    def definitions(self) -> tuple[ToolDefinition, ...]:
        return tool_definitions(self.tools or ())

    @cached_property
    def choice(self) -> ToolChoice:
        return tool_choice(self.tool_choice, self.definitions, self.parallel_tool_calls is not False)

    @property
    def max_new_tokens(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    def sampling_params(self) -> SamplingParams:
        return self._sampling(self.max_new_tokens, (self.top_logprobs or 0) if self.logprobs else None, None)


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[ChatLogprob]
    refusal: None = None


class FunctionCall(BaseModel):
    name: str
    arguments: str


class AssistantToolCall(BaseModel):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class AssistantMessage(BaseModel):
    """`content` is None where there are only calls; `tool_calls` is left out where there are none."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    tool_calls: Annotated[list[AssistantToolCall] | None, Field(exclude_if=lambda calls: calls is None)] = (
        None
    )


class ChatChoice(BaseModel):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: Literal["stop", "length", "tool_calls"]
    stop_reason: str | int | None = None


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    service_tier: str
    choices: list[ChatChoice]
    usage: Usage
