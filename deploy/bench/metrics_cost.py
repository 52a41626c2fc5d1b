"""What metrics cost beside a decode step: everything that exists for them, in processor time.

Counted: noting each token's time, keeping each step's, taking the sums in twice a second, finished sequences,
and the scrapes. On a GPU none of it is on the step's own path: the engine core is a process of its own there.
"""

import gc
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from engine import EngineStats, ModelInfo, RequestTimings, StepKind, StepTimes
from engine.token_times import Gaps, TokenTimes
from monitoring import Recorder
from serving.tiers import TIERS

_PERIOD_S = 0.5  # of taking in, as in serving.state
_SCRAPE_PERIOD_S = 15.0
_ANSWER_TOKENS = 128
_ROUNDS = 7
_MODEL = ModelInfo("m", "llama", 1, 8192, 100, 10**9, "w4")


def run(engine_json: Path, cpu_json: Path) -> list[dict[str, Any]]:
    """One row for each step whose duration is known.

    engine_json: of `peregrine bench engine` on a GPU; its 8B steps are the shortest there are.
    cpu_json: of `peregrine bench cpu`.
    """
    rows = []
    for device, steps in (("8B on a GPU", _gpu_ms(engine_json)), ("135M on a CPU", _cpu_ms(cpu_json))):
        for batch, step_ms in steps.items():
            parts = _costs_us(batch, step_ms / 1e3)
            total_us = sum(parts.values())
            rows.append(
                {
                    "step_of": device,
                    "batch": batch,
                    "step_ms": round(step_ms, 3),
                    **{f"{name}_us": round(us, 2) for name, us in parts.items()},
                    "total_us": round(total_us, 2),
                    "share_of_step": round(total_us / (step_ms * 1e3), 5),
                }
            )
    return rows


def _cpu_ms(cpu_json: Path) -> dict[int, float]:
    """Batch -> milliseconds of a step."""
    rows = json.loads(cpu_json.read_text())["rows"]
    return {row["batch"]: 1e3 * row["batch"] / row["tok_s"] for row in rows if row["runtime"] == "peregrine"}


def _gpu_ms(engine_json: Path) -> dict[int, float]:
    """Batch -> milliseconds of a step, of the 8B shape."""
    rows = json.loads(engine_json.read_text())["rows"]
    return {row["batch"]: row["itl_ms"] for row in rows if row["shape"] == "8b" and row.get("itl_ms")}


def _costs_us(batch: int, step_s: float) -> dict[str, float]:
    """Microseconds a step, by what they are for."""
    num_steps = max(1, round(_PERIOD_S / step_s))
    tiers = list(TIERS)
    recorder = Recorder(tiers)
    recorder.describe("r", "0", _MODEL, 16, 1000, 1e12)
    sequences = [TokenTimes(tiers[i % len(tiers)]) for i in range(batch)]
    gaps = Gaps()
    times: list[tuple[StepKind, float]] = []
    now = 0.0

    def note() -> None:
        nonlocal now
        for number in range(num_steps):
            now += step_s + number * 1e-9  # no two steps take exactly as long
            times.append(("decode", step_s))
            for sequence in sequences:
                sequence.note(now, gaps)

    def take_in() -> None:
        recorder.record_stats(_stats(num_steps), batch)
        recorder.record_steps(StepTimes(gaps, tuple(times)))

    def forget() -> None:
        gaps.clear()
        times.clear()
        for sequence in sequences:
            sequence.itl_s.clear()

    num_answers = max(1, round(batch * num_steps / _ANSWER_TOKENS))
    itl_s = (step_s,) * (_ANSWER_TOKENS - 1)
    answer = RequestTimings("r", "stop", 9, 0, _ANSWER_TOKENS, 0.0, 0.1, 1.0, itl_s, tiers[0], True)

    def finish() -> None:
        for _ in range(num_answers):
            recorder.record_timings(answer)
            recorder.record_deadline(tiers[0], True)
            recorder.record_http("/v1/chat/completions", 200, 1.0)

    measured: dict[str, list[float]] = {"tokens": [], "taking_in": [], "answers": [], "scrapes": []}
    for _ in range(_ROUNDS):
        measured["tokens"].append(_seconds(note) / num_steps)
        measured["taking_in"].append(_seconds(take_in) / num_steps)
        measured["answers"].append(_seconds(finish) / num_answers * batch / _ANSWER_TOKENS)
        measured["scrapes"].append(_seconds(recorder.exposition) * step_s / _SCRAPE_PERIOD_S)
        forget()
    return {name: median(values) * 1e6 for name, values in measured.items()}


def _seconds(work: Callable[[], object]) -> float:
    gc.collect()
    start = time.process_time()
    work()
    return time.process_time() - start


def _stats(num_steps: int) -> EngineStats:
    return EngineStats(1, 0, 10, 5, 1, 0, num_steps, 1, 0, num_steps, 0, 0.002)
