"""Speculative decoding: exact proposals, policies and plans."""

import random

import pytest

from engine import EngineConfig, ParameterError, SamplingParams
from engine.kv_cache_manager import KVCacheManager
from engine.request import Request, RequestStatus
from engine.scheduler import Scheduler, SchedulerOutput
from engine.speculation import Drafter, DraftPolicy, NgramProposer, num_kept

FREE = DraftPolicy(max_tokens=4, token_cost=0.0)  # a draft always pays
BLOCK_SIZE = 4
LOOP = [5, 6, 7, 8] * 2


# The proposer


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([1, 2, 3, 9, 1, 2], (2, (3, 9, 1))),
        ([1, 2, 3, 9, 1, 2, 4, 8, 1, 2], (2, (4, 8, 1))),  # the latest occurrence
        ([0, 1, 2, 3, 9, 5, 1, 2, 4, 9, 0, 1, 2], (3, (3, 9, 5))),  # a longer match wins over a later one
        ([7, 0, 1, 2, 3, 4, 7, 0, 1, 2], (4, (3, 4, 7))),
        ([1, 2, 3, 4, 5], (0, ())),
        ([1, 2, 3, 2], (0, ())),  # one token is no match
        ([4, 4, 4], (2, (4, 4, 4))),  # a match with itself, shifted: the loop goes on
        ([9, 1, 2, 1, 2], (2, (1, 2, 1))),
        ([1], (0, ())),
        ([1, 2], (0, ())),
    ],
)
def test_what_followed_the_longest_latest_match(tokens, expected):
    assert NgramProposer(tokens).propose(3) == expected


def test_the_index_follows_a_growing_list():
    rng = random.Random(0)
    tokens: list[int] = []
    growing = NgramProposer(tokens)
    for _ in range(300):
        tokens.extend(rng.randrange(3) for _ in range(rng.randrange(1, 4)))
        assert growing.propose(5) == NgramProposer(list(tokens)).propose(5) == searched(tokens, 5)


def searched(tokens: list[int], num: int) -> tuple[int, tuple[int, ...]]:
    """The definition, by search."""
    for n in (4, 3, 2):
        for end in range(len(tokens) - 1, n - 1, -1):
            if tokens[end - n : end] == tokens[len(tokens) - n :]:
                looped = list(tokens)
                while len(looped) < end + num:
                    looped.append(looped[len(looped) - (len(tokens) - end)])
                return n, tuple(looped[end : end + num])
    return 0, ()


def test_a_long_prompt_is_indexed_over_several_steps():
    proposer = NgramProposer(list(range(1000)) * 3)
    assert [proposer.propose(2) for _ in range(3)] == [(0, ()), (0, ()), (4, (0, 1))]


# How many drafts pay


@pytest.mark.parametrize(
    ("acceptance", "token_cost", "num_decodes", "expected"),
    [
        (0.4, 0.5, 1, 0),  # CPU: half a step for 0.4 tokens
        (0.7, 0.5, 1, 1),
        (1.0, 0.5, 1, 7),
        (0.7, 0.03, 1, 7),
        (0.1, 0.03, 1, 1),
        (0.02, 0.03, 1, 0),
        (0.9, 0.5, 16, 0),  # a large batch on a CPU is bound by arithmetic already
        (0.3, 0.03, 16, 0),
        (0.7, 0.03, 16, 3),
        (0.0, 0.0, 1, 0),
    ],
)
def test_the_number_of_drafts_follows_acceptance_cost_and_batch(
    acceptance, token_cost, num_decodes, expected
):
    assert DraftPolicy(7, token_cost).num_worthwhile(acceptance, num_decodes) == expected


def test_no_other_number_of_drafts_is_faster():
    for acceptance in (0.1, 0.3, 0.5, 0.7, 0.9, 0.99):
        for cost in (0.03, 0.1, 0.5):
            speeds = [sum(acceptance**i for i in range(k + 1)) / (1 + cost * k) for k in range(8)]
            assert speeds[DraftPolicy(7, cost).num_worthwhile(acceptance, 1)] == max(speeds)


def test_drafts_stop_where_they_fail_and_come_back_where_they_would_have_come_true():
    tokens = [1, 2]
    drafter = Drafter(DraftPolicy(7, 0.5), tokens)
    sizes = []
    for i in range(60):  # every second token makes a known pair, that goes on differently each time
        sizes.append(len(drafter.draft(7, 1)))
        new = [100 + i] if i % 3 == 0 else [i % 3]
        drafter.observe(new)
        tokens.extend(new)
    assert sum(sizes[30:]) == 0
    for _ in range(30):  # now the pair is always followed by the same token
        new = [tokens[-3]]
        drafter.draft(7, 1)
        drafter.observe(new)
        tokens.extend(new)
    assert len(drafter.draft(7, 1)) > 0


def test_drafts_respect_the_limit():
    drafter = Drafter(FREE, list(LOOP))
    assert drafter.draft(2, 1) == (5, 6)
    assert drafter.draft(0, 1) == ()
    assert drafter.draft(-1, 1) == ()
    assert drafter.draft(9, 1) == (5, 6, 7, 8)


@pytest.mark.parametrize(
    ("drafts", "sampled", "kept"),
    [
        ((), (3,), 1),
        ((3,), (3, 4), 2),
        ((3,), (4, 4), 1),
        ((3, 4, 5), (3, 4, 6, 7), 3),
        ((3, 4), (5, 4, 6), 1),
    ],
)
def test_tokens_count_up_to_the_first_that_is_not_its_draft(drafts, sampled, kept):
    assert num_kept(drafts, sampled) == kept


def test_defaults_by_device_and_what_is_refused():
    assert DraftPolicy.for_device("cpu", None).max_tokens == 0
    assert DraftPolicy.for_device("cuda", None).max_tokens == 7
    assert DraftPolicy.for_device("cpu", 3).max_tokens == 3
    with pytest.raises(ParameterError, match="speculative_tokens"):
        EngineConfig(model="m", speculative_tokens=-1)


# The scheduler


def make_scheduler(num_blocks: int = 16, token_budget: int = 16, policy: DraftPolicy = FREE) -> Scheduler:
    return Scheduler(
        KVCacheManager(num_blocks, BLOCK_SIZE),
        max_num_seqs=4,
        token_budget=token_budget,
        max_model_len=num_blocks * BLOCK_SIZE,
        eos_token_ids=frozenset({0}),
        draft_policy=policy,
        clock=lambda: 0.0,
    )


def add(scheduler: Scheduler, request_id: str, prompt: list[int], **params: object) -> Request:
    values = {"max_tokens": 100, **params}
    request = Request(
        request_id,
        prompt,
        SamplingParams(**values),  # type: ignore[arg-type]
        max_model_len=scheduler.max_model_len,
    )
    scheduler.add_request(request)
    return request


def prefilled(scheduler: Scheduler, request_id: str = "a", **params: object) -> Request:
    """A request in a loop of 5, 6, 7, 8 whose next tokens are 6, 7, 8."""
    request = add(scheduler, request_id, list(LOOP), **params)
    scheduler.update(scheduler.schedule(), {request_id: [5]})
    return request


def drafts_of(output: SchedulerOutput) -> dict[str, tuple[int, ...]]:
    return {p.request.request_id: p.draft_token_ids for p in output.scheduled}


def test_accepted_drafts_are_tokens_and_rejected_ones_are_computed_again():
    scheduler = make_scheduler()
    request = prefilled(scheduler)
    output = scheduler.schedule()
    assert drafts_of(output) == {"a": (6, 7, 8, 5)}
    assert output.scheduled[0].num_scheduled_tokens == 5
    assert output.scheduled[0].is_sampled
    [(_, new)] = scheduler.update(output, {"a": [6, 7, 99]})
    assert list(new) == [6, 7, 99]
    # 11 of the 12 tokens: the prompt, 5, and the two accepted drafts.
    assert (request.num_tokens, request.num_computed_tokens) == (12, 11)
    assert request.is_decoding
    assert (scheduler.total_drafts, scheduler.total_draft_tokens, scheduler.total_accepted_tokens) == (
        1,
        4,
        2,
    )
    output = scheduler.schedule()
    assert drafts_of(output) == {"a": ()}  # nothing ends with 7, 99
    assert output.scheduled[0].num_computed_tokens == 11


def test_only_blocks_of_real_tokens_become_findable():
    scheduler = make_scheduler()
    request = prefilled(scheduler)
    scheduler.update(scheduler.schedule(), {"a": [6, 9]})  # 11 tokens, 10 computed; 13 slots were written
    assert (request.num_remembered_blocks, len(request.block_hashes)) == (2, 2)
    scheduler.update(scheduler.schedule(), {"a": [1]})
    scheduler.update(scheduler.schedule(), {"a": [2]})
    assert request.num_remembered_blocks == 3
    other = add(scheduler, "b", [*LOOP, 5, 6, 9, 1, 3])
    scheduler.schedule()
    assert other.num_cached_tokens == 12


@pytest.mark.parametrize(
    ("params", "sampled", "kept", "status"),
    [
        ({"stop_token_ids": (7,)}, [6, 7, 8, 5, 6], [6, 7], RequestStatus.FINISHED_STOPPED),
        ({}, [6, 0], [6, 0], RequestStatus.FINISHED_STOPPED),
        ({"ignore_eos": True}, [6, 0], [6, 0], RequestStatus.RUNNING),
        ({"max_tokens": 3}, [6, 7], [6, 7], RequestStatus.FINISHED_LENGTH),
        ({"max_tokens": 3}, [6, 7, 8], [6, 7], RequestStatus.FINISHED_LENGTH),
        ({}, [6, 7, 8, 5, 6], [6, 7, 8, 5, 6], RequestStatus.RUNNING),
    ],
)
def test_nothing_counts_after_the_token_that_ends_a_request(params, sampled, kept, status):
    scheduler = make_scheduler()
    request = prefilled(scheduler, **params)
    [(_, new)] = scheduler.update(scheduler.schedule(), {"a": sampled})
    assert list(new) == kept
    assert request.output_token_ids == [5, *kept]
    assert request.status is status
    if status.is_finished:
        assert scheduler.kv_cache.pool.num_free_blocks == 16


def test_no_more_is_drafted_than_the_request_may_get():
    scheduler = make_scheduler(num_blocks=3)
    prefilled(scheduler)
    assert drafts_of(scheduler.schedule()) == {"a": (6, 7)}  # 9 of 12 tokens: 2 drafts and one after them
    scheduler = make_scheduler()
    prefilled(scheduler, max_tokens=2)
    assert drafts_of(scheduler.schedule()) == {"a": ()}


def test_every_decode_comes_before_any_draft():
    scheduler = make_scheduler(token_budget=24)
    for name in "abc":
        add(scheduler, name, list(LOOP))
    scheduler.update(scheduler.schedule(), {name: [5] for name in "abc"})
    scheduler.token_budget = 9
    # 9 tokens: three decodes, four drafts of the oldest and what is left, for the next.
    assert drafts_of(scheduler.schedule()) == {"a": (6, 7, 8, 5), "b": (6, 7), "c": ()}


def test_prompts_keep_at_least_half_of_what_the_decodes_leave():
    scheduler = make_scheduler(token_budget=8)
    prefilled(scheduler)
    add(scheduler, "b", list(range(100, 120)))
    output = scheduler.schedule()
    assert drafts_of(output) == {"a": (6, 7, 8), "b": ()}
    assert [p.num_scheduled_tokens for p in output.scheduled] == [4, 4]


@pytest.mark.parametrize(("num_blocks", "num_drafts"), [(5, 4), (4, 3)])
def test_drafts_take_no_block_that_a_running_request_may_need(num_blocks, num_drafts):
    scheduler = make_scheduler(num_blocks=num_blocks)
    request = prefilled(scheduler)
    # Of the 9 tokens the last lies in the third block: three drafts fit, the fourth needs another one.
    assert len(drafts_of(scheduler.schedule())["a"]) == num_drafts
    assert len(request.block_ids) == num_drafts


def test_a_step_that_preempts_has_no_drafts():
    scheduler = make_scheduler(num_blocks=5)
    for name, first in (("a", 0), ("b", 20)):
        add(scheduler, name, [first + t for t in LOOP])
    scheduler.update(scheduler.schedule(), {"a": [5], "b": [25]})
    output = scheduler.schedule()
    assert output.preempted_ids == ("b",)
    assert drafts_of(output) == {"a": ()}


def test_a_request_aborted_while_its_drafts_are_verified_is_left_alone():
    scheduler = make_scheduler()
    request = prefilled(scheduler)
    output = scheduler.schedule()
    scheduler.finish_request("a", RequestStatus.FINISHED_ABORTED)
    assert scheduler.update(output, {"a": [6, 7]}) == []
    assert request.num_tokens == 9
    assert scheduler.total_draft_tokens == 0
