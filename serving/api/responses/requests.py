"""POST /v1/responses' body. What is not served is refused by name, never ignored."""

import json
from collections.abc import Sequence
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, StringConstraints, model_validator

from engine import Constraint, ParameterError, SamplingParams
from serving.api.responses.items import Item, MessageItem
from serving.api.responses.tools import Choice, Tools, choice_of, definitions_of
from serving.schema_types import Strict, StrictBool, StrictFloat, StrictInt
from serving.tools import ToolChoice, ToolDefinition


def _text_or_items(value: Any) -> Any:
    if not isinstance(value, str | list) or not value:
        raise ValueError("must be a non-empty string or a non-empty array of items")
    return value


def _unserved(reason: str) -> BeforeValidator:
    def refuse(value: Any) -> Any:
        if value is not None and value is not False:
            raise ValueError(f"is not supported: {reason}")
        return None

    return BeforeValidator(refuse)


class TextFormat(Strict):
    """`name`, `description` and `strict` say nothing more: every schema is held to the letter."""

    type: Literal["text", "json_object", "json_schema"]
    name: Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_-]{1,64}$")] | None = None
    json_schema: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    description: str | None = None
    strict: StrictBool | None = None

    @model_validator(mode="after")
    def _schema_where_it_belongs(self) -> "TextFormat":
        if (self.json_schema is not None) != (self.type == "json_schema"):
            reason = "is required" if self.json_schema is None else "is only allowed"
            raise ParameterError("text.format.schema", f"{reason} with type 'json_schema'")
        return self

    @property
    def constraint(self) -> Constraint | None:
        if self.type == "text":
            return None
        if self.json_schema is None:
            return Constraint("json_object", name="text.format")
        return Constraint("json_schema", json.dumps(self.json_schema), "text.format.schema")


class TextConfig(Strict):
    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class Reasoning(Strict):
    """The models served do not reason apart from their answers."""

    effort: Literal["none"] | None = None
    summary: None = None
    generate_summary: None = None


class StreamOptions(Strict):
    """Deltas are not padded: who reads along learns their lengths."""

    include_obfuscation: Literal[False] | None = None


Metadata = Annotated[
    dict[Annotated[str, StringConstraints(max_length=64)], Annotated[str, StringConstraints(max_length=512)]],
    Field(max_length=16),
]
Includable = Literal["message.output_text.logprobs", "reasoning.encrypted_content"]
"""Of the second there is never any; clients ask for it all the same."""


class ResponseRequest(Strict):
    """The last block is an extension, named as other servers name it."""

    model: Annotated[str, StringConstraints(min_length=1)]
    input: Annotated[str | list[Item], BeforeValidator(_text_or_items)]
    instructions: str | None = None
    previous_response_id: Annotated[str, StringConstraints(min_length=1, max_length=128)] | None = None
    store: StrictBool | None = None
    tools: Tools | None = None
    tool_choice: Choice | None = None
    parallel_tool_calls: StrictBool | None = None
    max_tool_calls: Annotated[StrictInt, Field(ge=1)] | None = None
    """Of built-in tools, of which there are none."""
    text: TextConfig | None = None
    max_output_tokens: Annotated[StrictInt, Field(ge=1, le=2**31 - 1)] | None = None
    temperature: Annotated[StrictFloat, Field(ge=0, le=2)] | None = None
    top_p: Annotated[StrictFloat, Field(gt=0, le=1)] | None = None
    include: list[Includable] | None = None
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None
    metadata: Metadata | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    reasoning: Reasoning | None = None
    truncation: Literal["disabled"] | None = None
    service_tier: Annotated[str, StringConstraints(min_length=1, max_length=64)] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: Literal["in_memory"] | None = None
    background: Annotated[None, _unserved("a response is computed while its client waits")] = None
    conversation: Annotated[None, _unserved("use previous_response_id")] = None
    prompt: Annotated[None, _unserved("this server keeps no prompts")] = None

    seed: Annotated[StrictInt, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    top_k: Annotated[StrictInt, Field(ge=0, le=2**31 - 1)] | None = None

    @model_validator(mode="after")
    def _combinations(self) -> "ResponseRequest":
        if self.stream_options is not None and not self.stream:
            raise ParameterError("stream_options", "is only allowed when stream is true")
        if self.top_logprobs and not self.has_logprobs:
            raise ParameterError("top_logprobs", "needs message.output_text.logprobs in include")
        if self.has_logprobs and self.tools and self.choice.mode != "none":
            raise ParameterError("include", "message.output_text.logprobs is not served together with tools")
        self.choice  # noqa: B018  (raises what is wrong)
        return self

    @property
    def items(self) -> Sequence[Item]:
        return [MessageItem(role="user", content=self.input)] if isinstance(self.input, str) else self.input

    @property
    def has_logprobs(self) -> bool:
        return "message.output_text.logprobs" in (self.include or ())

    @cached_property
    def definitions(self) -> tuple[ToolDefinition, ...]:
        return definitions_of(self.tools or ())

    @cached_property
    def choice(self) -> ToolChoice:
        return choice_of(
            self.tool_choice, self.definitions, is_parallel=self.parallel_tool_calls is not False
        )

    def sampling_params(self) -> SamplingParams:
        text_format = self.text.format if self.text else None
        return SamplingParams(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=self.top_k or 0,
            seed=self.seed,
            max_tokens=self.max_output_tokens,
            logprobs=(self.top_logprobs or 0) if self.has_logprobs else None,
            constraint=text_format.constraint if text_format else None,
        )
