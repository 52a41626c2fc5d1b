"""Streams beside arriving prompts, on a clock that only moves by steps' durations, as measured on an H100."""

import math
import random
from bisect import bisect_left

import pytest

from engine.kv_cache_manager import KVCacheManager
from engine.pacing import StepPacer
from engine.request import Request
from engine.sampling_params import SamplingParams
from engine.scheduler import Scheduler, SchedulerOutput

# docs/benchmarks/h100.md, an 8B model at 4.25 bits: ms of a chunk, and of a decode step of 16 streams.
CHUNK_MS = {32: 3.6, 64: 4.1, 96: 4.7, 128: 5.3, 160: 6.3, 192: 7.2, 224: 8.2, 256: 9.1, 320: 10.4, 512: 12.6,
            1024: 18.7, 2048: 34.1}  # fmt: skip
DECODE_MS, DECODE_ATTENTION_MS = 3.3, 1.1
NUM_STREAMS = 16


def is_joint(num_decodes: int, num_tokens: int) -> bool:
    return num_tokens > 0 and num_decodes >= 16 and num_decodes + num_tokens <= 256


def chunk_ms(num_tokens: int) -> float:
    sizes = list(CHUNK_MS)
    return CHUNK_MS[sizes[bisect_left(sizes, num_tokens)]]


def step_ms(plan: SchedulerOutput) -> float:
    num_decodes, num_tokens = plan.num_decodes, plan.num_prompt_tokens
    if is_joint(num_decodes, num_tokens):
        return chunk_ms(num_decodes + num_tokens) + 1.5 * DECODE_ATTENTION_MS
    decodes = DECODE_MS + DECODE_ATTENTION_MS if num_decodes else 0.0
    return decodes + (chunk_ms(num_tokens) if num_tokens else 0.0)


def simulate(
    pacer: StepPacer, prompts_per_s: float, seconds: float = 20.0
) -> tuple[list[float], list[float]]:
    """Gaps of the streams, and times to the prompts' first tokens, in ms; one step stays in flight."""
    random_ = random.Random(0)
    scheduler = Scheduler(
        KVCacheManager(20_000, 16, enable_prefix_caching=False),
        max_num_seqs=64, token_budget=2048, max_model_len=8192, pacer=pacer,
    )  # fmt: skip

    def add(name: str, num_prompt: int, num_output: int) -> None:
        params = SamplingParams(max_tokens=num_output, ignore_eos=True)
        scheduler.add_request(Request(name, [1] * num_prompt, params, max_model_len=8192))

    for i in range(NUM_STREAMS):
        add(f"stream{i}", 128, 8000)
    due, at = [], 0.5
    while (at := at + random_.expovariate(prompts_per_s)) < seconds:
        due.append(at)
    now, waiting, last = 0.0, {}, {}
    gaps: list[float] = []
    ttft: list[float] = []
    in_flight = None
    while due or waiting:
        while due and due[0] <= now:
            waiting[f"prompt{len(due)}"] = due[0]
            add(f"prompt{len(due)}", 2048, 8)
            due.pop(0)
        plan = scheduler.schedule()
        scheduler.run_ahead(plan)
        if in_flight is not None:
            duration = 1e-3 * step_ms(in_flight) * random_.gauss(1.0, 0.02)
            now += duration
            scheduler.observe(in_flight, duration)
            sampled = {p.request.request_id: [7] for p in in_flight.scheduled if p.is_sampled}
            for request, _ in scheduler.update(in_flight, sampled):
                name = request.request_id
                if name in waiting:
                    ttft.append(1e3 * (now - waiting.pop(name)))
                elif name in last and now > 0.5:
                    gaps.append(1e3 * (now - last[name]))
                last[name] = now
        in_flight = plan
    return sorted(gaps), sorted(ttft)


def paced(target_s: float | None) -> StepPacer:
    pacer = StepPacer.for_device("cuda", target_s, is_joint)
    pacer.profile = {n: 1e-3 * ms for n, ms in CHUNK_MS.items()}
    return pacer


def test_streams_keep_their_pace_beside_two_long_prompts_a_second():
    gaps, ttft = simulate(paced(None), 2.0)
    assert gaps[int(0.99 * len(gaps))] < 10
    assert gaps[-1] < 11
    assert ttft[len(ttft) // 2] < 200
    assert simulate(paced(math.inf), 2.0)[0][-1] > 35  # what a whole prompt in a step costs them


@pytest.mark.parametrize("prompts_per_s", [6.0, 10.0])
def test_prompts_that_come_faster_get_larger_chunks_and_no_endless_queue(prompts_per_s):
    gaps, ttft = simulate(paced(None), prompts_per_s)
    assert ttft[-1] < 1200
    assert gaps[int(0.99 * len(gaps))] < 35
