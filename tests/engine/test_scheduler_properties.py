"""Random arrivals, lengths, aborts, drafts and pool sizes: nothing leaks, starves or is lost."""

import math
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from engine.kv_cache_manager import KVCacheManager
from engine.request import Request, RequestStatus
from engine.sampling_params import SamplingParams
from engine.scheduler import ScheduledRequest, Scheduler, SchedulerOutput
from engine.speculation import DraftPolicy, num_kept
from engine.urgency import Urgency

BLOCK_SIZE = 4


def token_at(request_id: str, position: int) -> int:
    """The pretended model: what it says depends on the request and the position alone.

    Runs of eight positions alternate between a loop of three tokens, where drafts come true, and noise.
    """
    if position % 16 < 8:
        return 1 + position % 3
    return 1 + (hash((request_id, position)) % 50)


def tokens_of(part: ScheduledRequest) -> list[int]:
    """What the pretended runner returns: it samples at each drafted position, and accepts."""
    request, drafts = part.request, part.draft_token_ids
    first = part.num_computed_tokens + part.num_scheduled_tokens - len(drafts)
    sampled = [token_at(request.request_id, first + i) for i in range(len(drafts) + 1)]
    return sampled[: num_kept(drafts, sampled)]


@st.composite
def workloads(draw: st.DrawFn) -> dict:
    num_blocks = draw(st.integers(2, 12))
    capacity = num_blocks * BLOCK_SIZE
    max_num_seqs = draw(st.integers(1, 5))
    requests = draw(
        st.lists(
            st.tuples(
                st.integers(0, 30),  # step of arrival
                st.integers(1, capacity - 1),  # prompt length
                st.integers(1, 40),  # output length
                st.integers(0, 2),  # prompts of one family share a prefix
                st.none() | st.integers(0, 40),  # step of an abort
                st.builds(Urgency, st.just(math.inf) | st.integers(0, 60), st.integers(0, 2)),
            ),
            min_size=1,
            max_size=12,
        )
    )
    return {
        "num_blocks": num_blocks,
        "max_num_seqs": max_num_seqs,
        "token_budget": draw(st.integers(max_num_seqs, 24)),
        "enable_prefix_caching": draw(st.booleans()),
        "draft_policy": draw(
            st.none() | st.builds(DraftPolicy, st.integers(0, 9), st.sampled_from([0.0, 0.03, 0.5]))
        ),
        "runs_ahead": draw(st.booleans()),
        "requests": requests,
    }


def check_ownership(scheduler: Scheduler) -> None:
    pool = scheduler.kv_cache.pool
    owners = Counter(block_id for r in scheduler.requests.values() for block_id in r.block_ids)
    for block in pool.blocks:
        assert block.ref_count == owners[block.block_id]
    assert pool.num_free_blocks == pool.num_blocks - len(owners)
    assert pool.num_cached_blocks == sum(b.ref_count == 0 and b.block_hash is not None for b in pool.blocks)
    prefixes: dict[int, tuple[int, ...]] = {}
    for request in scheduler.running:
        assert len(set(request.block_ids)) == len(request.block_ids)
        assert len(request.block_ids) * BLOCK_SIZE >= request.num_computed_tokens
        for i, block_id in enumerate(request.block_ids):
            # Two owners of one block agree on everything up to its end.
            prefix = tuple(request.all_token_ids[: (i + 1) * BLOCK_SIZE])
            assert prefixes.setdefault(block_id, prefix) == prefix
    for request in scheduler.waiting:
        assert request.block_ids == []


def check_drafts(scheduler: Scheduler, output: SchedulerOutput) -> None:
    drafting = [p for p in output.scheduled if p.draft_token_ids]
    if output.preempted_ids:
        assert not drafting
    elif drafting:
        # No decode is left out for them, and prompts go on beside them.
        scheduled = {p.request.request_id for p in output.scheduled}
        assert all(r.request_id in scheduled for r in scheduler.running if r.is_decoding)
        if any(not r.is_decoding for r in scheduler.running):
            assert any(not p.request.is_decoding for p in output.scheduled)
    for part in drafting:
        request = part.request
        assert part.num_scheduled_tokens == 1 + len(part.draft_token_ids)
        assert part.num_computed_tokens == request.num_tokens - 1
        assert request.num_pending_tokens == 0
        end = part.num_computed_tokens + part.num_scheduled_tokens
        assert end <= len(request.block_ids) * BLOCK_SIZE
        assert end < scheduler.max_model_len
        assert request.num_output_tokens + len(part.draft_token_ids) < request.params.max_tokens


@settings(max_examples=300, deadline=None)
@given(workloads())
def test_no_block_leaks_no_request_starves_no_token_is_lost(workload):
    scheduler = Scheduler(
        KVCacheManager(
            workload["num_blocks"], BLOCK_SIZE, enable_prefix_caching=workload["enable_prefix_caching"]
        ),
        max_num_seqs=workload["max_num_seqs"],
        token_budget=workload["token_budget"],
        max_model_len=workload["num_blocks"] * BLOCK_SIZE,
        draft_policy=workload["draft_policy"],
    )
    arrivals: dict[int, list[Request]] = {}
    aborts: dict[int, list[str]] = {}
    requests: list[Request] = []
    for i, (arrival, prompt_len, max_tokens, family, abort, urgency) in enumerate(workload["requests"]):
        request = Request(
            f"r{i}",
            [100 * family + j for j in range(prompt_len)],
            SamplingParams(max_tokens=max_tokens),
            max_model_len=scheduler.max_model_len,
            urgency=urgency,
        )
        requests.append(request)
        arrivals.setdefault(arrival, []).append(request)
        if abort is not None and abort >= arrival:
            aborts.setdefault(abort, []).append(request.request_id)

    received: dict[str, list[int]] = {r.request_id: [] for r in requests}
    in_flight: list[SchedulerOutput] = []

    def take_in(output: SchedulerOutput) -> None:
        sampled = {p.request.request_id: tokens_of(p) for p in output.scheduled if p.is_sampled}
        for request, token_ids in scheduler.update(output, sampled):
            received[request.request_id].extend(token_ids)

    # Each request needs at most its own tokens' steps, recomputed after each preemption by another one.
    limit = 31 + 4 * sum(r.num_prompt_tokens + r.params.max_tokens for r in requests) * len(requests)
    for now in range(limit):
        for request in arrivals.pop(now, []):
            scheduler.add_request(request)
        if in_flight and scheduler.wants_drafts():
            take_in(in_flight.pop())
        oldest = scheduler.running[0] if scheduler.running else None
        before = (oldest.num_computed_tokens, oldest.num_tokens) if oldest else None
        output = scheduler.schedule()
        assert output.num_tokens <= scheduler.token_budget
        assert len(scheduler.running) <= scheduler.max_num_seqs
        assert all(p.num_scheduled_tokens > 0 for p in output.scheduled)
        # Work there is, work is done: but for requests whose last token is in flight.
        assert bool(output.scheduled) == scheduler.has_work or (in_flight and not output.scheduled)
        check_ownership(scheduler)
        check_drafts(scheduler, output)
        for request_id in aborts.pop(now, []):
            scheduler.finish_request(request_id, RequestStatus.FINISHED_ABORTED)
        if workload["runs_ahead"]:
            # The step before is taken in only now, its tokens were pending while this one was planned.
            scheduler.run_ahead(output)
            in_flight.append(output)
            if len(in_flight) > 1:
                take_in(in_flight.pop(0))
        else:
            take_in(output)
        assert all(r.num_missing_tokens > 0 for r in scheduler.running)
        check_ownership(scheduler)
        if before is not None and any(p.request is oldest for p in output.scheduled):
            assert oldest.status.is_finished or (oldest.num_computed_tokens, oldest.num_tokens) > before
        if not scheduler.has_work and not arrivals:
            break
    for output in in_flight:
        take_in(output)
    assert not scheduler.has_work, "a request starved"
    pool = scheduler.kv_cache.pool
    assert pool.num_free_blocks == pool.num_blocks
    for request in requests:
        expected = [
            token_at(request.request_id, request.num_prompt_tokens + j)
            for j in range(len(received[request.request_id]))
        ]
        assert received[request.request_id] == expected == request.output_token_ids
        if request.status is not RequestStatus.FINISHED_ABORTED:
            room = scheduler.max_model_len - request.num_prompt_tokens
            assert len(expected) == min(request.params.max_tokens, room)
