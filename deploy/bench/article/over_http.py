"""A running server, over HTTP: first tokens, 2,000 tokens, growing concurrency, the fifteen workloads."""

import math
import time
from collections.abc import AsyncIterator, Sequence
from statistics import median
from typing import Any

from deploy.bench import report
from deploy.bench.article.gpu_meter import GpuMeter
from deploy.bench.article.plan import FIRST_TOKENS, Rounds
from deploy.bench.article.workloads import Workload
from deploy.bench.client import Timeline
from deploy.bench.idle import WAKE_S
from deploy.bench.peers import Client, together

Row = dict[str, Any]
PROMPT = 128  # tokens before decoding is timed
_WARM = 8
_SATURATED = 1.03  # more streams that bring no more than this have brought the last of it
REQUEST_TIMEOUT_S = 300.0


async def first_tokens(
    client: Client, prompts: Sequence[int], rounds: Rounds = FIRST_TOKENS, wake_s: float = WAKE_S
) -> AsyncIterator[Row]:
    """One request of one output token at a time; medians, after one that does not count.

    wake_s: so many seconds of those that do not count come first.
    """
    end = time.monotonic() + wake_s
    while time.monotonic() < end:
        await client.batch(1, PROMPT, 1)
    for num_prompt in prompts:
        await client.batch(1, num_prompt, 1)
        times = [(await client.batch(1, num_prompt, 1))[0].ttft * 1e3 for _ in rounds]
        yield {
            "prompt_tokens": num_prompt,
            "rounds": len(times),
            "ttft_ms": round(median(times), 3),
            "ttft_ms_max": round(max(times), 3),
        }


async def long_answer(
    client: Client, num_output: int, itl_ms: float = 0.0, limit_s: float = math.inf
) -> AsyncIterator[Row]:
    """One request alone, from sending to its last token.

    itl_ms: as one stream was measured. Raises TimeoutError where the answer would take longer than limit_s.
    """
    if (expected_s := num_output * itl_ms / 1e3) > limit_s:
        raise TimeoutError(f"left out: at {itl_ms:.2f} ms a token it takes {expected_s:.1f} s")
    (timeline,) = await client.batch(1, PROMPT, num_output)
    seconds = timeline.arrivals[-1] - timeline.due
    yield {
        "output_tokens": num_output,
        "e2e_s": round(seconds, 3),
        "tok_s": round(num_output / seconds, 1),
    }


async def concurrency(
    client: Client, streams: Sequence[int], num_output: int, rounds: Rounds, meter: GpuMeter | None
) -> AsyncIterator[Row]:
    """Batches of growing size until more streams bring no more tokens a second (but for the next one).

    Each stream has one more output token for every stream beside it: the first ones decode while prompts of
    the others are computed. Joules are those of whole batches, prompts included, over their output tokens.
    """
    best = 0.0
    for size in streams:
        await client.batch(size, _WARM, _WARM)  # connections, and nothing that takes long
        joules, begin = meter.joules() if meter else None, time.perf_counter()
        length = num_output + size
        runs = [await client.batch(size, PROMPT, length) for _ in rounds]
        seconds = time.perf_counter() - begin
        figures = [together(run) for run in runs]
        row: Row = {"streams": size, "prompt_tokens": PROMPT, "output_tokens": length}
        row["rounds"] = len(runs)
        row |= {k: round(median(f[k] for f in figures), 3) for k in figures[0]}
        row["ttft_ms_p50"] = round(report.percentile(_ttft_ms(runs), 0.5), 1)
        row["ttft_ms_p99"] = round(report.percentile(_ttft_ms(runs), 0.99), 1)
        if meter is not None and joules is not None and (after := meter.joules()) is not None:
            row["joules_per_token"] = round((after - joules) / (len(runs) * size * length), 4)
            row["watts"] = round((after - joules) / seconds, 1)
        yield row
        if row["tok_s"] < best * _SATURATED:
            return
        best = max(best, row["tok_s"])


def _ttft_ms(runs: Sequence[Sequence[Timeline]]) -> list[float]:
    return [1e3 * t.ttft for run in runs for t in run]


async def workloads(client: Client, kinds: Sequence[Workload], share: float) -> AsyncIterator[Row]:
    """One request of each kind alone. share: of the outputs' lengths, for short runs."""
    for kind in kinds:
        num_output = max(2, round(kind.output_tokens * share))
        (timeline,) = await client.batch(1, kind.prompt_tokens, num_output)
        seconds = timeline.arrivals[-1] - timeline.due
        yield {
            "workload": kind.name,
            "prompt_tokens": kind.prompt_tokens,
            "output_tokens": num_output,
            "ttft_ms": round(1e3 * timeline.ttft, 2),
            "itl_ms": round(1e3 * timeline.tpot, 3),
            "e2e_s": round(seconds, 3),
        }
