"""What a run measures, and how long it may take."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from deploy.bench.article.workloads import DEADLINES, Deadline


@dataclass(frozen=True)
class Rounds:
    """Counts up to `count`; one that would begin after `seconds` does not."""

    count: int
    seconds: float = math.inf

    def __iter__(self) -> Iterator[int]:
        begin = time.monotonic()
        for number in range(self.count):
            if number and time.monotonic() - begin > self.seconds:
                return
            yield number


FIRST_TOKENS = Rounds(20, 1.5)
"""Of each length of prompt: a difference of a few milliseconds wants more than a few requests."""


@dataclass(frozen=True)
class Plan:
    """Lengths in tokens, times in seconds.

    engine_batches: streams of the engine alone; streams: over HTTP, up to saturation; output: of each of
    them. rounds: medians are over so many; none but the first is begun after rounds_s. long_s: a long answer
    that would take longer is left out. workload_share: of the workloads' outputs. rates: of goodput, at most
    so many a tier, rate_factor apart and rate_s long; answers that are late by drain_s are given up.
    is_shared: one Ray for all shapes, in which the next server's processes start while the engine alone is
    loaded. budget_s: of one shape, all told; a part that does not fit any more becomes a row that says so.
    """

    prompts: Sequence[int] = (128, 512, 2048)
    engine_batches: Sequence[int] = (1, 16, 64)
    streams: Sequence[int] = (1, 4, 16, 64, 128, 256)
    output: int = 128  # as many as the engine alone is timed for: contexts are as long
    rounds: int = 3
    rounds_s: float = math.inf
    long_output: int = 2000
    long_s: float = math.inf
    workload_share: float = 1.0
    deadlines: Sequence[Deadline] = DEADLINES
    rates: int = 7
    rate_factor: float = 2.0
    rate_s: float = 10.0
    drain_s: float = 60.0
    is_shared: bool = False
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
BRIEF = Plan(
    streams=(1, 16, 64, 128, 256),
    rounds_s=3.0,
    long_s=12.0,
    workload_share=0.1,
    rates=3,
    rate_s=3.0,
    drain_s=6.0,
    is_shared=True,
    budget_s=120.0,
    start_s=120.0,
    part_s=60.0,
)


@dataclass(frozen=True)
class Options:
    """budgets: of shapes whose budget is not the plan's, in seconds.

    quantized: another checkpoint of SmolLM2 for the CPU row, and for all of its rows where the default one
    was not fetched.
    """

    out: Path
    shapes: Sequence[str]
    plan: Plan
    quantized: Path | None = None
    budgets: Mapping[str, float] = field(default_factory=dict)
