"""All 200 schemas with the real model, at temperatures 0 and 1.

    python -m tests.structured.schemas [--json docs/benchmarks/structured.json]

Prints each completion that is not of its schema; exits with 1 where there is any, or one was cut off.
"""

import argparse
import asyncio
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from deploy.bench import report
from deploy.models import fetch_default_model
from engine import EngineConfig
from engine.async_engine import AsyncEngine
from tests.structured.collection import FEATURES, SCHEMAS
from tests.structured.runs import Outcome, complete_all


async def run() -> list[Outcome]:
    engine = await AsyncEngine.start(
        EngineConfig(model=str(fetch_default_model()), device="cpu", num_blocks=1200)
    )
    try:
        return [outcome async for outcome in complete_all(engine, SCHEMAS)]
    finally:
        await engine.shutdown()


def row(feature: str, temperature: float, outcomes: Sequence[Outcome]) -> report.Row:
    return {
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
    path: Path | None = parser.parse_args().json
    start = time.monotonic()
    outcomes = asyncio.run(run())
    for bad in (o for o in outcomes if not o.is_valid):
        print(
            f"{bad.name} at {bad.temperature}: {bad.finish_reason}, {bad.error}: {bad.text!r}",
            file=sys.stderr,
        )
    rows = [
        row(feature, t, [o for o in outcomes if o.name.rpartition("-")[0] == feature and o.temperature == t])
        for feature in FEATURES
        for t in (0.0, 1.0)
    ]
    rows += [row("all", t, [o for o in outcomes if o.temperature == t]) for t in (0.0, 1.0)]
    report.publish(rows, f"constrained completions, {time.monotonic() - start:.0f} s", path)
    sys.exit(any(not o.is_valid for o in outcomes))


if __name__ == "__main__":
    main()
