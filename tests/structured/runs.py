"""Constrained completions by the real model, and what the jsonschema library says of them."""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal

import jsonschema

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


async def complete(
    engine: InferenceEngine, name: str, schema: Schema, temperature: float, seed: int
) -> Outcome:
    """One completion, its deltas put together."""
    question = f"Give an example of JSON of this schema: {json.dumps(schema, ensure_ascii=False)}"
    prompt = await engine.tokenize_chat([{"role": "user", "content": question}])
    ends = _ENDS if name.startswith("recursive") else ()
    params = SamplingParams(
        logit_bias={token_id: _END_BIAS for end in ends for token_id in await engine.tokenize(end)},
        temperature=temperature,
        seed=seed,
        max_tokens=MAX_TOKENS,
        constraint=Constraint("json_schema", json.dumps(schema)),
    )
    text, num_tokens, finish_reason = "", 0, ""
    async for output in engine.generate(prompt, params, request_id=f"{name}-{temperature}"):
        text += output.text
        num_tokens, finish_reason = output.num_output_tokens, output.finish_reason or ""
    error = error_of(text, schema) if finish_reason == "stop" else None
    return Outcome(name, temperature, text, num_tokens, finish_reason, error)


async def complete_all(
    engine: InferenceEngine,
    schemas: Sequence[tuple[str, Schema]],
    temperatures: Sequence[float] = (0.0, 1.0),
    num_at_once: int = 16,
) -> AsyncIterator[Outcome]:
    """Outcomes as they come."""
    places = asyncio.Semaphore(num_at_once)

    async def one(name: str, schema: Schema, temperature: float, seed: int) -> Outcome:
        async with places:
            return await complete(engine, name, schema, temperature, seed)

    tasks = [
        asyncio.create_task(one(name, schema, temperature, seed))
        for seed, (name, schema) in enumerate(schemas)
        for temperature in temperatures
    ]
    for task in asyncio.as_completed(tasks):
        yield await task
