"""What a run measures, and how long it may take."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deploy.bench.article.workloads import DEADLINES, Deadline


@dataclass(frozen=True)
class Plan:
    """Lengths in tokens, times in seconds.

    engine_batches: streams of the engine alone; streams: over HTTP, up to saturation; output: of each of
    them. rounds: medians are over so many. workload_share: of the workloads' outputs. rates: of goodput, each
    rate_factor times the one before and rate_s long. budget_s: of one shape, all told; a part that does not
    fit any more becomes a row that says so.
    """

    prompts: Sequence[int] = (128, 512, 2048)
    engine_batches: Sequence[int] = (1, 16, 64)
    streams: Sequence[int] = (1, 4, 16, 64, 128, 256)
    output: int = 128  # as many as the engine alone is timed for: contexts are as long
    rounds: int = 3
    long_output: int = 2000
    workload_share: float = 1.0
    deadlines: Sequence[Deadline] = DEADLINES
    rates: int = 7
    rate_factor: float = 2.0
    rate_s: float = 10.0
    budget_s: float = 1500.0
    start_s: float = 420.0
    part_s: float = 420.0


FULL = Plan()
QUICK = Plan(
    rounds=1,
    workload_share=0.25,
    rates=4,
    rate_factor=3.0,
    rate_s=4.0,
    budget_s=420.0,
    start_s=240.0,
    part_s=120.0,
)


@dataclass(frozen=True)
class Options:
    """quantized: another checkpoint of SmolLM2 for the CPU row."""

    out: Path
    shapes: Sequence[str]
    plan: Plan
    quantized: Path | None = None
