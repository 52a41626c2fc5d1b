"""Who starts first, who gives way, and how large prompt chunks are beside running streams."""

import math

import pytest

from engine.errors import ParameterError
from engine.pacing import StepPacer
from engine.request import Request, RequestStatus
from engine.sampling_params import SamplingParams
from engine.scheduler import Scheduler
from engine.urgency import Urgency
from tests.engine.test_scheduler import make_scheduler, plan, step


def add(scheduler: Scheduler, name: str, prompt: int, deadline: float = math.inf, priority: int = 0):
    tokens = [1000 * (1 + ord(name)) + i for i in range(prompt)]
    request = Request(
        name,
        tokens,
        SamplingParams(max_tokens=100),
        max_model_len=scheduler.max_model_len,
        urgency=Urgency(deadline, priority),
    )
    scheduler.add_request(request)
    return request


def test_the_earliest_deadline_starts_first_and_none_comes_last():
    scheduler = make_scheduler(token_budget=8, max_num_seqs=8)
    for name, deadline in (("a", math.inf), ("b", 5.0), ("c", 2.0), ("d", 5.0)):
        add(scheduler, name, 4, deadline)
    assert [r.request_id for r in scheduler.waiting] == ["c", "b", "d", "a"]
    assert step(scheduler) == {"c": 4, "b": 4}


def test_an_urgent_prompt_does_not_wait_behind_the_rest_of_a_long_one():
    scheduler = make_scheduler(token_budget=8)
    add(scheduler, "a", 40, deadline=60.0)
    assert step(scheduler) == {"a": 8}
    add(scheduler, "b", 5, deadline=1.0)
    assert step(scheduler) == {"b": 5, "a": 3}
    assert step(scheduler) == {"b": 1, "a": 7}


def test_work_of_a_larger_number_gives_its_room_to_who_arrives():
    scheduler = make_scheduler(num_blocks=4, enable_prefix_caching=False)
    batch = add(scheduler, "a", 12, deadline=60.0, priority=3)
    step(scheduler)
    step(scheduler)
    assert batch.is_decoding
    voice = add(scheduler, "b", 7, deadline=1.0, priority=0)
    output = scheduler.schedule()
    assert (plan(output), output.preempted_ids) == ({"b": 7}, ("a",))
    assert (batch.status, voice.status) == (RequestStatus.PREEMPTED, RequestStatus.RUNNING)


def test_nobody_gives_way_in_vain_nor_to_an_equal():
    scheduler = make_scheduler(num_blocks=4, token_budget=16, enable_prefix_caching=False)
    add(scheduler, "a", 5, priority=1)
    add(scheduler, "b", 4, priority=3)
    step(scheduler)
    step(scheduler)
    add(scheduler, "c", 15, deadline=1.0, priority=2)  # not even with b's blocks
    assert step(scheduler).keys() == {"a", "b"}
    assert scheduler.total_preemptions == 0


def test_a_full_batch_makes_a_place_for_the_urgent():
    scheduler = make_scheduler(max_num_seqs=2)
    add(scheduler, "a", 1, priority=2)
    add(scheduler, "b", 1, priority=3)
    step(scheduler)
    add(scheduler, "c", 1, deadline=1.0, priority=1)
    output = scheduler.schedule()
    assert (plan(output), output.preempted_ids) == ({"a": 1, "c": 1}, ("b",))


def test_who_finds_no_room_holds_up_no_more_important_one():
    scheduler = make_scheduler(max_num_seqs=2)
    for name in "ab":
        add(scheduler, name, 1, priority=2)
    step(scheduler)
    add(scheduler, "c", 1, deadline=1.0, priority=2)
    add(scheduler, "d", 1, deadline=2.0, priority=2)
    add(scheduler, "e", 1, deadline=3.0, priority=0)
    output = scheduler.schedule()
    assert (plan(output), output.preempted_ids) == ({"a": 1, "e": 1}, ("b",))
    assert [r.request_id for r in scheduler.waiting] == ["c", "d", "b"]


def test_several_urgent_ones_start_in_one_step():
    scheduler = make_scheduler(max_num_seqs=3)
    for name in "abc":
        add(scheduler, name, 1, priority=3)
    step(scheduler)
    add(scheduler, "d", 1, deadline=1.0, priority=0)
    add(scheduler, "e", 1, deadline=2.0, priority=1)
    add(scheduler, "f", 1, deadline=3.0, priority=3)  # the room of those who gave way is not for it
    output = scheduler.schedule()
    assert (plan(output), set(output.preempted_ids)) == ({"a": 1, "d": 1, "e": 1}, {"b", "c"})


def test_the_important_are_preempted_last_whatever_their_age():
    scheduler = make_scheduler(num_blocks=4, enable_prefix_caching=False)
    old = add(scheduler, "a", 4, priority=3)
    young = add(scheduler, "b", 4, priority=0)
    for _ in range(6):
        step(scheduler)
    assert old.status is RequestStatus.PREEMPTED
    assert young.status is RequestStatus.RUNNING


@pytest.mark.parametrize(("deadline", "priority"), [(math.nan, 0), (1.0, -1), (1.0, 10)])
def test_urgencies_are_checked(deadline, priority):
    with pytest.raises(ParameterError):
        Urgency(deadline, priority)


def test_chunks_shrink_to_what_the_running_streams_can_wait_for():
    pacer = StepPacer(target_s=0.025)
    assert pacer.max_prompt_tokens(4, 2048) == 2048  # nothing is known yet
    pacer.observe(4, 0, 0.005)
    pacer.observe(4, 1000, 0.055)  # 1,000 tokens in 50 ms beside the decodes' 5
    assert pacer.max_prompt_tokens(4, 2048) == 400  # 20 ms are left
    assert pacer.max_prompt_tokens(0, 2048) == 2048  # nobody waits
    assert pacer.max_prompt_tokens(4, 100) == 100
    pacer.observe(4, 0, 10.0)
    assert pacer.max_prompt_tokens(4, 2048) == 368  # one stall counts as twice the usual
    for _ in range(100):
        pacer.observe(4, 0, 10.0)
    assert pacer.max_prompt_tokens(4, 2048) == 16  # prompts go on


PROFILE = {32: 0.003, 64: 0.004, 128: 0.005, 256: 0.009, 1024: 0.019, 2048: 0.034}


def test_chunks_are_of_profiled_sizes():
    pacer = StepPacer(0.010, profile=PROFILE)
    pacer.observe(16, 0, 0.003)
    assert pacer.max_prompt_tokens(16, 2032) == 128
    assert pacer.max_prompt_tokens(16, 200) == 128  # 200 are padded to 256
    assert pacer.max_prompt_tokens(16, 100) == 100  # what is left of the budget
    for _ in range(50):  # a long context: twice as long as alone
        pacer.observe(16, 128, 0.013)
    assert pacer.max_prompt_tokens(16, 2032) == 32
    pacer.target_s = 0.020
    assert pacer.max_prompt_tokens(16, 2032) == 128


@pytest.mark.parametrize(
    ("num_waiting_tokens", "size"), [(2048, 128), (8500, 256), (15_000, 1024), (30_000, 2032)]
)
def test_a_soft_target_gives_way_to_a_long_backlog(num_waiting_tokens, size):
    strict, soft = StepPacer(0.010, profile=PROFILE), StepPacer(0.010, is_soft=True, profile=PROFILE)
    for pacer in (strict, soft):
        pacer.observe(16, 0, 0.003)
    assert strict.max_prompt_tokens(16, 2032, num_waiting_tokens) == 128
    assert soft.max_prompt_tokens(16, 2032, num_waiting_tokens) == size


def test_a_soft_target_gives_way_to_long_decode_steps_and_bounds_no_batch():
    pacer = StepPacer(0.010, is_soft=True, profile=PROFILE)
    pacer.observe(16, 0, 0.012)
    assert pacer.max_prompt_tokens(16, 2032) == 256  # 24 ms
    assert pacer.max_sequences(64) == 64
    assert StepPacer(0.010, profile=PROFILE, _decode_s=0.012, _num_decodes=16).max_sequences(64) == 13


def test_targets_by_device():
    assert StepPacer.for_device("cpu", None).target_s is None
    assert StepPacer.for_device("cuda", math.inf).target_s is None
    assert StepPacer.for_device("cuda", None).is_soft
    assert not StepPacer.for_device("cuda", 0.02).is_soft


def test_as_many_sequences_run_as_decode_within_the_target():
    pacer = StepPacer(target_s=0.05)
    assert pacer.max_sequences(64) == 64
    pacer.observe(10, 0, 0.02)
    assert pacer.max_sequences(64) == 25
    assert pacer.max_sequences(8) == 8
    for _ in range(100):
        pacer.observe(10, 0, 100.0)
    assert pacer.max_sequences(64) == 1  # somebody always runs


def test_without_a_target_the_budget_is_the_limit():
    pacer = StepPacer(target_s=None)
    pacer.observe(4, 1000, 1.0)
    assert pacer.max_prompt_tokens(4, 2048) == 2048


def test_joint_steps_take_what_a_chunk_of_all_their_tokens_takes():
    pacer = StepPacer(0.010, profile=PROFILE, is_joint=lambda decodes, tokens: 0 < tokens <= 256 - decodes)
    pacer.observe(16, 0, 0.005)
    assert pacer.max_prompt_tokens(16, 2032) == 112  # taken to last 6.5 ms, as long as nothing is known
    for _ in range(50):
        pacer.observe(16, 112, 0.0065)
    assert pacer.max_prompt_tokens(16, 2032) == 112  # 240 would take 9 ms and 1.5
    pacer.target_s = 0.011
    assert pacer.max_prompt_tokens(16, 2032) == 240
    pacer.target_s = 0.030
    assert pacer.max_prompt_tokens(16, 2032) == 1024  # beside the decodes: 24 ms
