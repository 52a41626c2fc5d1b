"""A part of the collection with the real model; `python -m tests.structured.schemas` runs all of it."""

import pytest

from engine import EngineConfig
from engine.async_engine import AsyncEngine
from tests.structured.collection import PART, SCHEMAS
from tests.structured.runs import EngineRun, complete_all, error_of


def test_the_collection_is_large():
    assert len(SCHEMAS) == len(dict(SCHEMAS)) == 200


@pytest.mark.parametrize(
    ("text", "schema"),
    [
        ("{", {}),
        ('"2024-02-30"', {"format": "date"}),
        ('"24:00:00Z"', {"format": "time"}),
        ('"12:00:00"', {"format": "time"}),
        ('"2024-01-01 12:00:00"', {"format": "date-time"}),
        ('"P1S"', {"format": "duration"}),
        ('"-a.com"', {"format": "hostname"}),
        ("1.25", {"multipleOf": 0.1}),
        ('{"a": 1}', {"required": ["b"]}),
    ],
)
def test_what_is_not_of_the_schema_is_found_out(text, schema):
    assert error_of(text, schema) is not None


@pytest.mark.model
async def test_completions_are_of_their_schemas(smollm2):
    engine = await AsyncEngine.start(EngineConfig(model=str(smollm2), device="cpu", num_blocks=1200))
    try:
        outcomes = await complete_all(EngineRun(engine), PART)
    finally:
        await engine.shutdown()
    assert len(outcomes) == 2 * len(PART) >= 80
    assert [o for o in outcomes if not o.is_valid] == []
