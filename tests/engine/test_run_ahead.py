"""The scheduler with a step in flight: exact plans behind pending tokens; the core over a late runner."""

import pytest

from engine.core import EngineCore
from engine.kv_cache_manager import KVCacheManager
from engine.messages import AbortRequests
from engine.model_runner import StepResult
from engine.pooling import PooledPrompts
from engine.request import RequestStatus
from engine.sampler import SampledToken
from engine.scheduler import Scheduler, SchedulerOutput
from engine.speculation import DraftPolicy
from engine.step_cost import StepCostMeter
from engine.structured import ConstrainedArrivals
from tests.engine.test_scheduler import EOS, add, make_scheduler, plan


def ahead(scheduler: Scheduler) -> SchedulerOutput:
    output = scheduler.schedule()
    scheduler.run_ahead(output)
    return output


def tokens(output: SchedulerOutput, token_id: int = 7) -> dict[str, list[int]]:
    return {p.request.request_id: [token_id] for p in output.scheduled if p.is_sampled}


def test_a_decode_goes_on_behind_its_pending_token():
    scheduler = make_scheduler()
    request = add(scheduler, "a", 5)
    first = ahead(scheduler)
    assert (request.num_tokens, request.num_computed_tokens, request.num_pending_tokens) == (5, 5, 1)
    assert request.is_decoding
    second = ahead(scheduler)
    assert [(p.num_computed_tokens, p.num_scheduled_tokens) for p in second.scheduled] == [(5, 1)]
    assert second.scheduled[0].is_sampled
    assert (request.num_tokens, request.num_computed_tokens, request.num_pending_tokens) == (5, 6, 2)
    assert len(scheduler.update(first, tokens(first))) == 1
    assert (request.num_tokens, request.num_computed_tokens, request.num_pending_tokens) == (6, 6, 1)
    scheduler.update(second, tokens(second, 8))
    assert request.output_token_ids == [7, 8]
    assert request.num_pending_tokens == 0


def test_a_chunk_that_samples_nothing_leaves_nothing_pending():
    scheduler = make_scheduler(token_budget=4)
    request = add(scheduler, "a", 6)
    first, second = ahead(scheduler), ahead(scheduler)
    assert [p.is_sampled for p in (*first.scheduled, *second.scheduled)] == [False, True]
    assert (plan(first), plan(second), request.num_pending_tokens) == ({"a": 4}, {"a": 2}, 1)
    assert scheduler.update(first, {}) == []
    [(_, new)] = scheduler.update(second, {"a": [9]})
    assert list(new) == [9]


@pytest.mark.parametrize(("num_blocks", "max_tokens"), [(16, 2), (2, 100)])
def test_a_request_whose_pending_token_is_its_last_is_not_scheduled(num_blocks, max_tokens):
    scheduler = make_scheduler(num_blocks=num_blocks)
    request = add(scheduler, "a", 6, max_tokens=max_tokens)
    first, second = ahead(scheduler), ahead(scheduler)  # its two tokens
    assert plan(scheduler.schedule()) == {}
    scheduler.update(first, tokens(first))
    assert request.status is RequestStatus.RUNNING
    assert plan(scheduler.schedule()) == {}
    scheduler.update(second, tokens(second))
    assert request.status is RequestStatus.FINISHED_LENGTH
    assert request.num_output_tokens == 2


def test_an_end_found_late_costs_one_token():
    scheduler = make_scheduler()
    request = add(scheduler, "a", 3)
    first, second = ahead(scheduler), ahead(scheduler)
    scheduler.update(first, {"a": [EOS]})
    assert request.status is RequestStatus.FINISHED_STOPPED
    assert scheduler.kv_cache.pool.num_free_blocks == 16
    assert scheduler.update(second, {"a": [8]}) == []
    assert request.output_token_ids == [EOS]


def test_blocks_are_findable_up_to_the_known_tokens():
    scheduler = make_scheduler()
    request = add(scheduler, "a", [1, 2, 3])
    first, second = ahead(scheduler), ahead(scheduler)
    assert request.num_computed_tokens == 4
    assert request.num_remembered_blocks == 0  # the fourth token has no id yet
    scheduler.update(first, {"a": [4]})
    assert request.num_remembered_blocks == 1
    other = add(scheduler, "b", [1, 2, 3, 4, 5])
    third = ahead(scheduler)
    assert other.num_cached_tokens == 4
    assert plan(third) == {"a": 1, "b": 1}
    scheduler.update(second, {"a": [6]})
    assert request.all_token_ids == [1, 2, 3, 4, 6]


def test_the_tokens_in_flight_of_a_preempted_request_are_dropped():
    scheduler = make_scheduler(num_blocks=3, enable_prefix_caching=False)
    a, b = add(scheduler, "a", 4), add(scheduler, "b", 4)
    first = ahead(scheduler)
    second = ahead(scheduler)
    assert (plan(second), second.preempted_ids) == ({"a": 1}, ("b",))
    assert (b.num_computed_tokens, b.num_pending_tokens, b.block_ids) == (0, 0, [])
    assert [r.request_id for r, _ in scheduler.update(first, tokens(first))] == ["a"]
    assert (a.num_output_tokens, b.num_output_tokens) == (1, 0)
    scheduler.update(second, {"a": [EOS]})
    third = ahead(scheduler)
    assert plan(third) == {"b": 4}
    scheduler.update(third, {"b": [7]})
    assert b.output_token_ids == [7]


def test_an_aborted_request_leaves_its_steps_alone():
    scheduler = make_scheduler()
    add(scheduler, "a", 3)
    first, second = ahead(scheduler), ahead(scheduler)
    scheduler.finish_request("a", RequestStatus.FINISHED_ABORTED)
    again = add(scheduler, "a", 3)
    assert scheduler.update(first, tokens(first)) == []
    third = ahead(scheduler)
    assert scheduler.update(second, tokens(second)) == []
    scheduler.update(third, tokens(third, 9))
    assert again.output_token_ids == [9]


def looping(scheduler: Scheduler) -> SchedulerOutput:
    """A request in a loop of 5, 6, 7, 8, its next token in flight."""
    add(scheduler, "a", [5, 6, 7, 8, 5, 6, 7, 8])
    return ahead(scheduler)


def test_drafts_that_pay_wait_for_the_step_in_flight():
    scheduler = Scheduler(
        KVCacheManager(16, 4),
        max_num_seqs=4,
        token_budget=16,
        max_model_len=64,
        draft_policy=DraftPolicy(3, 0.0),
    )
    first = looping(scheduler)
    assert scheduler.wants_drafts()
    scheduler.update(first, {"a": [5]})
    second = ahead(scheduler)
    assert second.scheduled[0].draft_token_ids == (6, 7, 8)
    assert scheduler.wants_drafts()  # how many of them count is not known
    scheduler.update(second, {"a": [6, 7, 1]})
    assert not scheduler.wants_drafts()  # nothing is pending
    ahead(scheduler)
    assert not scheduler.wants_drafts()  # nothing ends with 7, 1


def test_without_drafts_nothing_waits():
    scheduler = make_scheduler()
    looping(scheduler)
    assert not scheduler.wants_drafts()


class LateRunner:
    """Samples 1, 2, 3 and so on by position, and counts the steps in flight."""

    runs_ahead = True

    def __init__(self) -> None:
        self.num_in_flight = self.most_in_flight = 0
        self.forgotten: list[str] = []

    def launch(self, output: SchedulerOutput) -> SchedulerOutput:
        self.num_in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.num_in_flight)
        return output

    def collect(self, ticket: SchedulerOutput) -> StepResult:
        self.num_in_flight -= 1
        sampled = {
            p.request.request_id: [SampledToken(p.num_computed_tokens + p.num_scheduled_tokens, None)]
            for p in ticket.scheduled
            if p.is_sampled
        }
        return StepResult(sampled, {})

    def forget(self, request_id: str) -> None:
        self.forgotten.append(request_id)


@pytest.fixture
def core() -> EngineCore:
    core = object.__new__(EngineCore)
    core.scheduler = make_scheduler()
    core.kv_cache = core.scheduler.kv_cache
    core.runner = LateRunner()  # type: ignore[assignment]
    core._constrained = ConstrainedArrivals(None)  # type: ignore[arg-type]
    core._step_costs = StepCostMeter()
    core._in_flight = None
    core._prompt_logprobs = {}
    core._pooled = PooledPrompts()
    core._total_steps = core._total_prompt_tokens = core._total_cached_tokens = core._total_output_tokens = 0
    core._last_step_s = 0.0
    return core


def drain(core: EngineCore) -> list[tuple[str, int | None]]:
    got = []
    while core.has_work:
        got += [(o.request_id, o.token_id) for o in core.step().outputs]
    return got


def test_one_step_stays_in_flight(core):
    add(core.scheduler, "a", 3, max_tokens=4)
    assert [o.token_id for o in core.step().outputs] == [3]
    assert core.runner.num_in_flight == 1
    assert drain(core) == [("a", 4), ("a", 5), ("a", 6)]
    assert (core.runner.num_in_flight, core.runner.most_in_flight) == (0, 2)
    assert core.runner.forgotten == ["a"]
    assert core.stats().num_free_blocks == 16


def test_an_abort_leaves_a_step_to_be_taken_in(core):
    add(core.scheduler, "a", 3)
    core.step()
    assert len(core.abort(AbortRequests(("a",)))) == 1
    assert core.has_work
    assert core.step().outputs == ()
    assert not core.has_work
    assert core.runner.num_in_flight == 0


def test_a_request_that_comes_while_a_step_runs_joins_the_next(core):
    add(core.scheduler, "a", 3, max_tokens=3)
    core.step()
    add(core.scheduler, "b", 2, max_tokens=2)
    assert drain(core) == [("a", 4), ("a", 5), ("b", 2), ("b", 3)]
