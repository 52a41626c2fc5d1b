"""Scheduler: exact plans on tiny pools."""

import pytest

from engine.kv_cache_manager import KVCacheManager
from engine.request import Request, RequestStatus
from engine.sampling_params import SamplingParams
from engine.scheduler import Scheduler, SchedulerOutput

BLOCK_SIZE = 4
EOS = 0


def make_scheduler(
    num_blocks: int = 16, token_budget: int = 8, max_num_seqs: int = 4, **kw: bool
) -> Scheduler:
    kv_cache = KVCacheManager(num_blocks, BLOCK_SIZE, **kw)
    return Scheduler(
        kv_cache,
        max_num_seqs=max_num_seqs,
        token_budget=token_budget,
        max_model_len=num_blocks * BLOCK_SIZE,
        eos_token_ids=frozenset({EOS}),
        clock=lambda: 0.0,
    )


def add(scheduler: Scheduler, request_id: str, prompt: int | list[int], **params: object) -> Request:
    # Prompts of different requests have nothing in common unless a test gives the tokens.
    tokens = (
        [1000 * (1 + ord(request_id[0])) + i for i in range(prompt)] if isinstance(prompt, int) else prompt
    )
    params = {"max_tokens": 100, **params}
    request = Request(
        request_id,
        tokens,
        SamplingParams(**params),
        max_model_len=scheduler.max_model_len,  # type: ignore[arg-type]
    )
    scheduler.add_request(request)
    return request


def plan(output: SchedulerOutput) -> dict[str, int]:
    return {part.request.request_id: part.num_scheduled_tokens for part in output.scheduled}


def step(scheduler: Scheduler, token_id: int = 7) -> dict[str, int]:
    """Schedule and pretend that every sampled token is `token_id`."""
    output = scheduler.schedule()
    scheduler.update(output, {p.request.request_id: [token_id] for p in output.scheduled if p.is_sampled})
    return plan(output)


def test_prompts_share_the_budget_in_order_of_arrival():
    scheduler = make_scheduler()
    add(scheduler, "a", 5)
    add(scheduler, "b", 6)
    assert step(scheduler) == {"a": 5, "b": 3}
    assert step(scheduler) == {"a": 1, "b": 3}
    assert step(scheduler) == {"a": 1, "b": 1}


def test_decodes_come_before_the_chunks_of_an_older_prompt():
    scheduler = make_scheduler(token_budget=4)
    add(scheduler, "a", 2)
    assert step(scheduler) == {"a": 2}
    add(scheduler, "b", 9)
    assert list(step(scheduler).items()) == [("a", 1), ("b", 3)]
    assert list(step(scheduler).items()) == [("a", 1), ("b", 3)]


def test_a_chunk_that_does_not_reach_the_last_token_samples_nothing():
    scheduler = make_scheduler(token_budget=4)
    request = add(scheduler, "a", 6)
    output = scheduler.schedule()
    assert [p.is_sampled for p in output.scheduled] == [False]
    scheduler.update(output, {})
    assert (request.num_computed_tokens, request.num_output_tokens) == (4, 0)
    output = scheduler.schedule()
    assert [p.is_sampled for p in output.scheduled] == [True]


def test_max_num_seqs_holds_the_rest_back():
    scheduler = make_scheduler(max_num_seqs=2)
    for name in "abc":
        add(scheduler, name, 1)
    assert step(scheduler) == {"a": 1, "b": 1}
    assert [r.request_id for r in scheduler.waiting] == ["c"]


def test_nothing_overtakes_a_waiting_request_that_finds_no_room():
    scheduler = make_scheduler(num_blocks=4)
    add(scheduler, "a", 8)
    step(scheduler)
    add(scheduler, "b", 8)
    add(scheduler, "c", 1)
    assert step(scheduler) == {"a": 1}  # one block is left: b needs two for its chunk of seven tokens
    assert [r.request_id for r in scheduler.waiting] == ["b", "c"]


def test_the_youngest_is_preempted_and_comes_back_first():
    scheduler = make_scheduler(num_blocks=4, enable_prefix_caching=False)
    a, b = add(scheduler, "a", 4), add(scheduler, "b", 4)
    assert step(scheduler) == {"a": 4, "b": 4}
    assert step(scheduler) == {"a": 1, "b": 1}
    for _ in range(3):
        step(scheduler)
    assert (a.num_computed_tokens, b.num_computed_tokens) == (8, 8)
    add(scheduler, "c", 1)
    output = scheduler.schedule()
    assert plan(output) == {"a": 1}
    assert output.preempted_ids == ("b",)
    assert b.status is RequestStatus.PREEMPTED
    assert (b.num_computed_tokens, b.block_ids) == (0, [])
    assert [r.request_id for r in scheduler.waiting] == ["b", "c"]
    assert (scheduler.total_preemptions, scheduler.num_preempted) == (1, 1)
    scheduler.update(output, {"a": [EOS]})
    assert step(scheduler) == {"b": 8}  # all nine known tokens are computed again, eight now
    assert step(scheduler) == {"b": 1, "c": 1}
    assert b.num_output_tokens == 6


def test_a_preempted_request_may_be_its_own_victim():
    scheduler = make_scheduler(num_blocks=3, enable_prefix_caching=False)
    add(scheduler, "a", 4)
    b = add(scheduler, "b", 4)
    step(scheduler)
    assert step(scheduler) == {"a": 1}
    assert b.status is RequestStatus.PREEMPTED


def test_a_prefix_hit_is_not_computed_again():
    scheduler = make_scheduler()
    add(scheduler, "a", list(range(100, 108)))
    assert step(scheduler) == {"a": 8}
    b = add(scheduler, "b", [*range(100, 108), 5])
    assert step(scheduler) == {"a": 1, "b": 1}
    assert b.num_cached_tokens == 8
    assert b.block_ids[:2] == scheduler.requests["a"].block_ids[:2]


@pytest.mark.parametrize(
    ("params", "token_id", "status", "stop_reason"),
    [
        ({}, EOS, RequestStatus.FINISHED_STOPPED, None),
        ({"stop_token_ids": (7,)}, 7, RequestStatus.FINISHED_STOPPED, 7),
        ({"max_tokens": 1}, 7, RequestStatus.FINISHED_LENGTH, None),
        ({"max_tokens": 1}, EOS, RequestStatus.FINISHED_STOPPED, None),
        ({"max_tokens": 1, "ignore_eos": True}, EOS, RequestStatus.FINISHED_LENGTH, None),
        ({"ignore_eos": True}, EOS, RequestStatus.RUNNING, None),
        ({}, 7, RequestStatus.RUNNING, None),
    ],
)
def test_finish_reasons(params, token_id, status, stop_reason):
    scheduler = make_scheduler()
    request = add(scheduler, "a", 3, **params)
    step(scheduler, token_id)
    assert request.status is status
    assert request.stop_reason == stop_reason
    assert scheduler.has_work == (not status.is_finished)
    assert (scheduler.kv_cache.pool.num_free_blocks == 16) == status.is_finished


def test_the_context_ends_a_request():
    scheduler = make_scheduler(num_blocks=2)
    request = add(scheduler, "a", 6)
    step(scheduler)
    step(scheduler)
    assert request.status is RequestStatus.FINISHED_LENGTH
    assert request.num_tokens == 8


def test_abort_from_every_state_frees_everything():
    scheduler = make_scheduler(num_blocks=3, max_num_seqs=2, enable_prefix_caching=False)
    running, preempted, waiting = (add(scheduler, name, 4) for name in "abc")
    step(scheduler)
    step(scheduler)
    assert [r.status for r in (running, preempted, waiting)] == [
        RequestStatus.RUNNING,
        RequestStatus.PREEMPTED,
        RequestStatus.WAITING,
    ]
    for name in "abc":
        assert scheduler.finish_request(name, RequestStatus.FINISHED_ABORTED) is not None
        assert scheduler.finish_request(name, RequestStatus.FINISHED_ABORTED) is None
    assert not scheduler.has_work
    assert scheduler.requests == {}
    assert scheduler.kv_cache.pool.num_free_blocks == 3


def test_a_request_aborted_while_its_step_runs_is_left_alone():
    scheduler = make_scheduler()
    request = add(scheduler, "a", 3)
    output = scheduler.schedule()
    scheduler.finish_request("a", RequestStatus.FINISHED_ABORTED)
    assert scheduler.update(output, {"a": [7]}) == []
    assert request.num_tokens == 3
    assert scheduler.kv_cache.pool.num_free_blocks == 16


def test_ids_are_unique():
    scheduler = make_scheduler()
    add(scheduler, "a", 3)
    with pytest.raises(ValueError, match="in use"):
        add(scheduler, "a", 3)


def test_limits_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match="exceeds the KV cache"):
        Scheduler(KVCacheManager(2, BLOCK_SIZE), max_num_seqs=1, token_budget=8, max_model_len=9)
    with pytest.raises(ValueError, match="token_budget"):
        make_scheduler(token_budget=3, max_num_seqs=4)
