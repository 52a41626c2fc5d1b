"""Fields that hold an answer to a form: OpenAI's response_format, vLLM's guided_* and structured_outputs."""

import json
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, model_validator

from engine import Constraint, ParameterError
from serving.schema_types import Strict, StrictBool, one_of

JsonSchema = Annotated[str | dict[str, Any], one_of("a string", "an object", "null")]
Choices = Annotated[
    list[Annotated[str, StringConstraints(min_length=1)]], Field(min_length=1, max_length=10_000)
]


class NamedSchema(Strict):
    """`strict` changes nothing: every schema is held to the letter, or refused. `name` is for the client."""

    name: Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    json_schema: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: StrictBool | None = None


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None

    @model_validator(mode="after")
    def _schema_where_it_belongs(self) -> "ResponseFormat":
        if (self.json_schema is not None) != (self.type == "json_schema"):
            reason = "is required" if self.json_schema is None else "is only allowed"
            raise ParameterError("response_format.json_schema", f"{reason} with type 'json_schema'")
        return self

    @property
    def constraint(self) -> Constraint | None:
        if self.type == "text":
            return None
        if self.json_schema is None or self.json_schema.json_schema is None:
            return Constraint("json_object", name="response_format")
        schema = json.dumps(self.json_schema.json_schema)
        return Constraint("json_schema", schema, "response_format.json_schema.schema")


class StructuredOutputs(Strict):
    """vLLM's newer spelling of guided_*. One of the fields is set."""

    json_schema: Annotated[JsonSchema | None, Field(alias="json")] = None
    regex: str | None = None
    choice: Choices | None = None
    grammar: str | None = None
    json_object: StrictBool | None = None

    @property
    def constraints(self) -> list[Constraint]:
        found = _constraints("structured_outputs.", self.json_schema, self.regex, self.choice, self.grammar)
        if self.json_object:
            found.append(Constraint("json_object", name="structured_outputs.json_object"))
        return found

    @model_validator(mode="after")
    def _one(self) -> "StructuredOutputs":
        if len(self.constraints) != 1:
            raise ParameterError(
                "structured_outputs", "must have one of json, regex, choice, grammar and json_object"
            )
        return self


class StructuredFields(Strict):
    """The fields that say what the answer is held to, of which at most one may be set."""

    response_format: ResponseFormat | None = None
    guided_json: JsonSchema | None = None
    guided_regex: str | None = None
    guided_choice: Choices | None = None
    guided_grammar: str | None = None
    structured_outputs: StructuredOutputs | None = None

    @model_validator(mode="after")
    def _at_most_one_form(self) -> "StructuredFields":
        self.constraint  # noqa: B018  (raises what is wrong)
        return self

    @cached_property
    def constraint(self) -> Constraint | None:
        """Raises ParameterError naming the fields where there are several."""
        found = _constraints(
            "guided_", self.guided_json, self.guided_regex, self.guided_choice, self.guided_grammar
        )
        if self.response_format is not None and (own := self.response_format.constraint) is not None:
            found.append(own)
        if self.structured_outputs is not None:
            found += self.structured_outputs.constraints
        if len(found) > 1:
            names = [constraint.name.partition(".")[0] for constraint in found]
            raise ParameterError(names[1], f"only one of these may be set: {', '.join(names)}")
        return found[0] if found else None


def _constraints(
    prefix: str,
    json_schema: str | dict[str, Any] | None,
    regex: str | None,
    choice: list[str] | None,
    grammar: str | None,
) -> list[Constraint]:
    found = []
    if json_schema is not None:
        text = json_schema if isinstance(json_schema, str) else json.dumps(json_schema)
        found.append(Constraint("json_schema", text, f"{prefix}json"))
    if regex is not None:
        found.append(Constraint("regex", regex, f"{prefix}regex"))
    if choice is not None:
        found.append(Constraint("choice", json.dumps(choice), f"{prefix}choice"))
    if grammar is not None:
        found.append(Constraint("grammar", grammar, f"{prefix}grammar"))
    return found
