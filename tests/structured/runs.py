"""Constrained completions by the real model, and what the jsonschema library says of them."""

import asyncio
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from functools import partial

import jsonschema
import openai

from engine import Constraint, InferenceEngine, SamplingParams
from tests.structured.collection import Schema

MAX_TOKENS = 400
# What a recursive schema lets end. A small model goes on: each level is as the one before.
_ENDS = ("null", " null", "]", "[]", "}", " }")
_END_BIAS = 10.0
_FORMATS = jsonschema.FormatChecker()


@_FORMATS.checks("date-time", raises=ValueError)
def _is_date_time(value: object) -> bool:
    """RFC 3339, which the library checks only with another package."""
    if not isinstance(value, str):
        return True
    leap = value.upper().replace(":60", ":59", 1)
    return datetime.fromisoformat(leap).tzinfo is not None and "T" in leap


@_FORMATS.checks("time", raises=ValueError)
def _is_time(value: object) -> bool:
    return not isinstance(value, str) or _is_date_time(f"2000-01-01T{value}")


@_FORMATS.checks("duration")
def _is_duration(value: object) -> bool:
    days = r"(?:\d+D|\d+M(?:\d+D)?|\d+Y(?:\d+M(?:\d+D)?)?)"
    time = r"T(?:\d+S|\d+M(?:\d+S)?|\d+H(?:\d+M(?:\d+S)?)?)"
    form = rf"P(?:{days}(?:{time})?|{time}|\d+W)"
    return not isinstance(value, str) or re.fullmatch(form, value, re.ASCII) is not None


@_FORMATS.checks("hostname")
def _is_hostname(value: object) -> bool:
    label = "[a-zA-Z0-9](?:[a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?"
    return not isinstance(value, str) or re.fullmatch(rf"{label}(?:\.{label})*", value) is not None


@dataclass(frozen=True, slots=True)
class Outcome:
    """error: why the text is not of the schema; None where it is, or was cut off."""

    name: str
    temperature: float
    text: str
    num_tokens: int
    finish_reason: str
    error: str | None

    @property
    def feature(self) -> str:
        return self.name.rpartition("-")[0]

    @property
    def is_valid(self) -> bool:
        return self.finish_reason == "stop" and self.error is None


def error_of(text: str, schema: Schema) -> str | None:
    """What the jsonschema library, its formats asserted, has against the text.

    Numbers are decimal, as they are in JSON: as binary floats 1.2 is no multiple of 0.1.
    """
    validator = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)
    decimal = json.loads(json.dumps(schema), parse_float=Decimal)
    try:
        validator(decimal, format_checker=_FORMATS).validate(json.loads(text, parse_float=Decimal))
    except (ValueError, jsonschema.ValidationError) as error:
        return str(error).partition("\n")[0]
    return None


class EngineRun:
    """Completions by an engine, their deltas put together."""

    def __init__(self, engine: InferenceEngine) -> None:
        self._engine = engine

    async def complete(self, name: str, schema: Schema, temperature: float, seed: int) -> Outcome:
        engine = self._engine
        prompt = await engine.tokenize_chat(question(schema))
        ends = _ENDS if is_recursive(name) else ()
        params = SamplingParams(
            temperature=temperature,
            seed=seed,
            max_tokens=MAX_TOKENS,
            logit_bias={token_id: _END_BIAS for end in ends for token_id in await engine.tokenize(end)},
            constraint=Constraint("json_schema", json.dumps(schema)),
        )
        text, num_tokens, finish_reason = "", 0, ""
        async for output in engine.generate(prompt, params, request_id=f"{name}-{temperature}"):
            text += output.text
            num_tokens, finish_reason = output.num_output_tokens, output.finish_reason or ""
        return outcome_of(name, schema, temperature, text, num_tokens, finish_reason)


class HttpRun:
    """Completions by a server, whole or streamed, with OpenAI's client.

    tokenize: of the served model, for biases.
    """

    def __init__(
        self, client: openai.AsyncOpenAI, model: str, tokenize: Callable[[str], list[int]], *, is_stream: bool
    ) -> None:
        self._client, self._model, self._is_stream = client, model, is_stream
        self._bias = {str(token_id): int(_END_BIAS) for end in _ENDS for token_id in tokenize(end)}

    async def complete(self, name: str, schema: Schema, temperature: float, seed: int) -> Outcome:
        named = {"name": name.replace("$", ""), "schema": schema, "strict": True}
        create = partial(
            self._client.chat.completions.create,
            model=self._model,
            messages=question(schema),  # type: ignore[arg-type]
            temperature=temperature,
            seed=seed,
            max_tokens=MAX_TOKENS,
            logit_bias=self._bias if is_recursive(name) else {},
            response_format={"type": "json_schema", "json_schema": named},
        )
        if not self._is_stream:
            answer = await create()
            [choice] = answer.choices
            num_tokens = answer.usage.completion_tokens
            return outcome_of(
                name, schema, temperature, choice.message.content, num_tokens, choice.finish_reason
            )
        text, num_tokens, finish_reason = "", 0, ""
        async for chunk in await create(stream=True, stream_options={"include_usage": True}):
            for choice in chunk.choices:
                text += choice.delta.content or ""
                finish_reason = choice.finish_reason or finish_reason
            if chunk.usage is not None:
                num_tokens = chunk.usage.completion_tokens
        return outcome_of(name, schema, temperature, text, num_tokens, finish_reason)


def question(schema: Schema) -> list[dict[str, str]]:
    text = f"Give an example of JSON of this schema: {json.dumps(schema, ensure_ascii=False)}"
    return [{"role": "user", "content": text}]


def is_recursive(name: str) -> bool:
    return name.startswith("recursive")


def outcome_of(
    name: str, schema: Schema, temperature: float, text: str, num_tokens: int, finish_reason: str
) -> Outcome:
    error = error_of(text, schema) if finish_reason == "stop" else None
    return Outcome(name, temperature, text, num_tokens, finish_reason, error)


async def complete_all(
    run: EngineRun | HttpRun,
    schemas: Sequence[tuple[str, Schema]],
    temperatures: Sequence[float] = (0.0, 1.0),
    num_at_once: int = 16,
) -> list[Outcome]:
    places = asyncio.Semaphore(num_at_once)

    async def one(name: str, schema: Schema, temperature: float, seed: int) -> Outcome:
        async with places:
            return await run.complete(name, schema, temperature, seed)

    return await asyncio.gather(
        *(
            one(name, schema, temperature, seed)
            for seed, (name, schema) in enumerate(schemas)
            for temperature in temperatures
        )
    )
