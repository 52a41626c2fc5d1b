"""All 200 schemas with the real model, at temperatures 0 and 1.

    python -m tests.structured.schemas [--json docs/benchmarks/structured.json]
    python -m tests.structured.schemas --url http://127.0.0.1:8000 ...

With a URL they come from that server, once whole and once streamed.

Prints each completion that is not of its schema; exits with 1 where there is any, or one was cut off.
"""

import argparse
import asyncio
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import openai

from deploy.bench import report
from deploy.models import fetch_default_model
from engine import EngineConfig
from engine.async_engine import AsyncEngine
from engine.checkpoint import open_checkpoint
from tests.structured.collection import FEATURES, SCHEMAS
from tests.structured.runs import EngineRun, HttpRun, Outcome, complete_all


async def run_server(url: str) -> dict[str, list[Outcome]]:
    model = fetch_default_model()
    backend = open_checkpoint(model).load_tokenizer().backend_tokenizer
    outcomes = {}
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        for way in ("whole", "streamed"):
            run = HttpRun(
                client, model.stem, lambda text: backend.encode(text).ids, is_stream=way == "streamed"
            )
            outcomes[way] = await complete_all(run, SCHEMAS)
    return outcomes


async def run_engine() -> dict[str, list[Outcome]]:
    engine = await AsyncEngine.start(
        EngineConfig(model=str(fetch_default_model()), device="cpu", num_blocks=1200)
    )
    try:
        return {"engine": await complete_all(EngineRun(engine), SCHEMAS)}
    finally:
        await engine.shutdown()


def row(way: str, feature: str, temperature: float, outcomes: Sequence[Outcome]) -> report.Row:
    return {
        "way": way,
        "feature": feature,
        "temperature": temperature,
        "completions": len(outcomes),
        "valid": sum(o.is_valid for o in outcomes),
        "cut_off": sum(o.finish_reason == "length" for o in outcomes),
        "invalid": sum(o.error is not None for o in outcomes),
        "tokens": sum(o.num_tokens for o in outcomes),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the rows there")
    parser.add_argument("--url", help="of a server of the default model")
    chosen = parser.parse_args()
    start = time.monotonic()
    by_way = asyncio.run(run_server(chosen.url) if chosen.url else run_engine())
    outcomes = [outcome for of_way in by_way.values() for outcome in of_way]
    for bad in (o for o in outcomes if not o.is_valid):
        print(
            f"{bad.name} at {bad.temperature}: {bad.finish_reason}, {bad.error}: {bad.text!r}",
            file=sys.stderr,
        )
    rows = [
        row(way, feature, t, [o for o in of_way if o.temperature == t and feature in ("all", o.feature)])
        for way, of_way in by_way.items()
        for feature in (*FEATURES, "all")
        for t in (0.0, 1.0)
    ]
    report.publish(rows, f"constrained completions, {time.monotonic() - start:.0f} s", chosen.json)
    sys.exit(any(not o.is_valid for o in outcomes))


if __name__ == "__main__":
    main()
