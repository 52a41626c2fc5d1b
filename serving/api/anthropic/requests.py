"""The Messages API's requests. A field that is not served is refused, never ignored."""

import json
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, StringConstraints, model_validator

from engine import Constraint, ParameterError, SamplingParams
from engine.sampling_params import MAX_STOP_STRINGS
from serving.api.anthropic.blocks import CacheControl, Content, NonEmpty, TextContent
from serving.schemas import Strict, StrictBool, StrictFloat, StrictInt
from serving.tools import ToolChoice, ToolDefinition
from serving.tools.parameters import check_parameters

_MAX_MESSAGES = 100_000
_MAX_INT = 2**31 - 1


def _refuse_other(supported: str, reason: str) -> BeforeValidator:
    """A type of another name is refused by it, with the reason."""

    def check(value: Any) -> Any:
        if isinstance(value, str) and value != supported:
            raise ValueError(f"{value!r} is not supported, only {supported!r}: {reason}")
        return value

    return BeforeValidator(check)


class InputMessage(Strict):
    role: Literal["user", "assistant", "system"]
    content: Content


class Tool(Strict):
    type: Annotated[Literal["custom"], _refuse_other("custom", "no tools run on the server")] | None = None
    name: Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_-]{1,128}$")]
    description: str | None = None
    input_schema: dict[str, Any]
    strict: StrictBool | None = None
    eager_input_streaming: StrictBool | None = None
    defer_loading: Literal[False] | None = None
    cache_control: CacheControl | None = None


class ToolChoiceParam(Strict):
    type: Literal["auto", "any", "tool", "none"]
    name: NonEmpty | None = None
    disable_parallel_tool_use: StrictBool | None = None

    @model_validator(mode="after")
    def _combinations(self) -> "ToolChoiceParam":
        if (self.type == "tool") != (self.name is not None):
            raise ParameterError("tool_choice.name", "is needed with type 'tool', and only allowed there")
        if self.type == "none" and self.disable_parallel_tool_use is not None:
            raise ParameterError("tool_choice.disable_parallel_tool_use", "is not allowed with type 'none'")
        return self

    def as_choice(self) -> ToolChoice:
        match self.type:
            case "none":
                return ToolChoice("none")
            case "auto":
                return ToolChoice("auto", is_parallel=not self.disable_parallel_tool_use)
            case "any":
                return ToolChoice("required", is_parallel=not self.disable_parallel_tool_use)
            case "tool":
                names = (self.name or "",)
                return ToolChoice("required", names, is_parallel=not self.disable_parallel_tool_use)


class Thinking(Strict):
    type: Annotated[Literal["disabled"], _refuse_other("disabled", "thinking is part of the text")]


class OutputFormat(Strict):
    type: Literal["json_schema"]
    json_schema: dict[str, Any] = Field(alias="schema")

    def as_constraint(self) -> Constraint:
        return Constraint("json_schema", json.dumps(self.json_schema), "output_config.format.schema")


class OutputConfig(Strict):
    effort: None = None
    format: OutputFormat | None = None


class Metadata(Strict):
    user_id: Annotated[str, StringConstraints(max_length=512)] | None = None


class CountTokensRequest(Strict):
    """What the model reads: the part that counting tokens and answering have in common."""

    model: NonEmpty
    messages: Annotated[list[InputMessage], Field(min_length=1, max_length=_MAX_MESSAGES)]
    system: TextContent = Field(default_factory=list)
    tools: list[Tool] | None = None
    tool_choice: ToolChoiceParam | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    cache_control: CacheControl | None = None
    thread: dict[str, Any] | None = None
    """Refused, in the way that clients expect (`conversation_of`)."""

    @model_validator(mode="after")
    def _choice_of_the_given_tools(self) -> "CountTokensRequest":
        names = [tool.name for tool in self.tools or ()]
        if repeated := next((name for i, name in enumerate(names) if name in names[:i]), None):
            raise ParameterError("tools", f"names must be unique, {repeated!r} is there twice")
        if self.tool_choice is None:
            return self
        if not names:
            raise ParameterError("tool_choice", "is only allowed with tools")
        if self.tool_choice.name is not None and self.tool_choice.name not in names:
            raise ParameterError("tool_choice.name", f"must be one of {', '.join(names)}")
        return self

    def definitions(self) -> list[ToolDefinition]:
        """Raises ParameterError for an input_schema that is no JSON schema of an object."""
        definitions = []
        for number, tool in enumerate(self.tools or ()):
            field = f"tools[{number}].input_schema"
            check_parameters(tool.input_schema, field)
            definitions.append(
                ToolDefinition(tool.name, tool.description or "", tool.input_schema, bool(tool.strict), field)
            )
        return definitions

    @property
    def constraint(self) -> Constraint | None:
        """What the answer's text is held to."""
        shape = self.output_config.format if self.output_config is not None else None
        return None if shape is None else shape.as_constraint()

    @property
    def choice(self) -> ToolChoice:
        return ToolChoice() if self.tool_choice is None else self.tool_choice.as_choice()


class MessagesRequest(CountTokensRequest):
    max_tokens: Annotated[StrictInt, Field(ge=1, le=_MAX_INT)]
    """More than the context has room for is allowed: the answer then ends with the context."""
    stream: StrictBool | None = None
    stop_sequences: Annotated[list[NonEmpty], Field(max_length=MAX_STOP_STRINGS)] | None = None
    temperature: Annotated[StrictFloat, Field(ge=0, le=1)] | None = None
    top_p: Annotated[StrictFloat, Field(gt=0, le=1)] | None = None
    top_k: Annotated[StrictInt, Field(ge=0, le=_MAX_INT)] | None = None
    metadata: Metadata | None = None
    service_tier: Annotated[str, StringConstraints(min_length=1, max_length=64)] | None = None
    """`auto`, `standard_only`, or one of this server's tiers."""

    def sampling_params(self) -> SamplingParams:
        return SamplingParams(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=self.top_k or 0,
            stop=tuple(self.stop_sequences or ()),
            max_tokens=self.max_tokens,
            constraint=self.constraint,
        )
