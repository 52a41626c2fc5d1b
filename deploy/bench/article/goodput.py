"""Requests a second that keep a tier's deadline, at rising rates. Open loop.

Requests arrive by a seeded Poisson schedule, whatever became of earlier ones; a deadline counts from
the moment at which its request was due. What the server refuses (429) or fails is not good.
"""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from deploy.bench import report
from deploy.bench.article.workloads import Deadline
from deploy.bench.client import RefusedError, Streams, Timeline
from serving.tiers import SLO_HEADER

Row = dict[str, Any]
GOOD_SHARE = 0.9  # of a rate's requests; below it the rate is past what the tier promises
_TOKEN_IDS = range(1000, 30_000)  # in every vocabulary, no special tokens among them
_RECOVERY_S = 5.0  # after too high a rate the server refuses by what it saw then, and forgets it in seconds
_MOST_REQUESTS = 4000  # of one rate, so that a small model's rates end


@dataclass(frozen=True)
class Rates:
    """first: requests a second; factor: from one to the next; seconds: of each; count: of them, at most.

    drain_s: after a rate's time, for answers that are on their way.
    """

    first: float
    factor: float
    count: int
    seconds: float
    drain_s: float = 60.0

    def after(self, tried: Mapping[int, bool]) -> int | None:
        """The place of the next rate, first * factor ** place; None where the search has ended.

        tried: whether the promise was kept, by place. Up from the first while it is, else down until it is.
        """
        if len(tried) >= self.count:
            return None
        if not tried:
            return 0
        place = max(tried) + 1 if tried[max(tried)] else min(tried) - 1
        is_found = any(tried.values()) and not all(tried.values())
        return None if is_found else place

    def rate(self, place: int) -> float:
        return self.first * self.factor**place


@dataclass
class Outcome:
    """What became of the requests of one rate. Times in seconds from when each was due."""

    first_token_s: list[float] = field(default_factory=list)
    answer_s: list[float] = field(default_factory=list)
    num_refused: int = 0
    num_failed: int = 0

    @property
    def num_sent(self) -> int:
        return len(self.answer_s) + self.num_refused + self.num_failed

    def row(self, deadline: Deadline, rate: float, seconds: float) -> Row:
        times = self.first_token_s if deadline.ends == "first token" else self.answer_s
        num_good = sum(t <= deadline.seconds for t in times)
        row: Row = {
            "tier": deadline.tier,
            "deadline_ms": round(1e3 * deadline.seconds),
            "ends": deadline.ends,
            "workload": deadline.workload.name,
            "rate_req_s": round(rate, 2),
            "num_sent": self.num_sent,
            "num_refused": self.num_refused,
            "num_failed": self.num_failed,
            "share_good": round(num_good / max(1, self.num_sent), 3),
            "goodput_req_s": round(num_good / seconds, 2),
            "goodput_tok_s": round(num_good * deadline.workload.output_tokens / seconds, 1),
        }
        if times:
            row["ttft_ms_p50"] = round(1e3 * report.percentile(self.first_token_s, 0.5), 1)
            row["ttft_ms_p99"] = round(1e3 * report.percentile(self.first_token_s, 0.99), 1)
            row["e2e_ms_p99"] = round(1e3 * report.percentile(self.answer_s, 0.99), 1)
        return row


def arrivals(rate: float, seconds: float, seed: int = 0) -> list[float]:
    """When requests are due, in seconds from the start."""
    generator, due, found = random.Random(seed), 0.0, [0.0]
    while (due := due + generator.expovariate(rate)) < seconds and len(found) < _MOST_REQUESTS:
        found.append(due)
    return found


async def measure(
    streams: Streams, url: str, model: str, deadline: Deadline, rates: Rates
) -> AsyncIterator[Row]:
    """A row for each rate tried, until one that keeps the promise has a neighbour that does not."""
    tried: dict[int, bool] = {}
    while (place := rates.after(tried)) is not None:
        if place < 0:
            await asyncio.sleep(_RECOVERY_S)
        row = await _at(streams, url, model, deadline, rates, rates.rate(place))
        yield row
        tried[place] = row["share_good"] >= GOOD_SHARE


async def _at(streams: Streams, url: str, model: str, deadline: Deadline, rates: Rates, rate: float) -> Row:
    seconds = rates.seconds
    outcome, due_times = Outcome(), arrivals(rate, seconds)
    generator = random.Random(time.time_ns())  # prompts that no earlier run has left in a cache
    kind = deadline.workload
    fields = {"service_tier": deadline.service_tier} if deadline.service_tier else {}
    headers = {} if deadline.service_tier else {SLO_HEADER: f"{1e3 * deadline.seconds:g}"}

    prompts = [generator.choices(_TOKEN_IDS, k=kind.prompt_tokens) for _ in due_times]
    start = time.perf_counter()

    async def one(due: float, prompt: list[int]) -> None:
        timeline = Timeline(start + due)
        await asyncio.sleep(max(0.0, timeline.due - time.perf_counter()))
        try:
            await streams.complete(
                url,
                model,
                prompt,
                kind.output_tokens,
                timeline,
                fields=fields,
                headers=headers,
            )
        except RefusedError:
            outcome.num_refused += 1
        except (RuntimeError, OSError):
            outcome.num_failed += 1
        else:
            outcome.first_token_s.append(timeline.ttft)
            outcome.answer_s.append(timeline.arrivals[-1] - timeline.due)

    jobs = [asyncio.create_task(one(*pair)) for pair in zip(due_times, prompts, strict=True)]
    _, late = await asyncio.wait(jobs, timeout=seconds + rates.drain_s)
    for job in late:
        job.cancel()
    await asyncio.gather(*late, return_exceptions=True)
    outcome.num_failed += len(late)
    return outcome.row(deadline, rate, max(seconds, time.perf_counter() - start))
