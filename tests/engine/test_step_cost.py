"""The line through what steps took."""

import random

import pytest

from engine import StepCost
from engine.step_cost import StepCostMeter
from tests.engine.helpers import make_core, save_random_llama

TRUE = StepCost(base_s=0.008, per_decode_s=0.002, prefill_step_s=0.003, prefill_token_s=0.0007)
WARM_UP = ((0, 16), (0, 256), (1, 0), (8, 0))


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def observe(meter: StepCostMeter, *steps: tuple[int, int], true: StepCost = TRUE) -> None:
    for num_decodes, num_prompt_tokens in steps:
        meter.observe(num_decodes, num_prompt_tokens, true.step_s(num_decodes, num_prompt_tokens))


def assert_near(found: StepCost | None, true: StepCost, share: float = 0.01) -> None:
    assert found is not None
    for step in (*WARM_UP, (3, 0), (16, 0), (0, 1000), (5, 100)):
        assert found.step_s(*step) == pytest.approx(true.step_s(*step), rel=share)


def test_four_steps_of_a_warm_up_are_enough():
    meter = StepCostMeter(Clock())
    assert meter.cost is None
    observe(meter, *WARM_UP)
    assert_near(meter.cost, TRUE)


def test_one_batch_size_says_nothing_of_larger_ones():
    meter = StepCostMeter(Clock())
    observe(meter, (1, 0))
    assert meter.cost is not None
    assert meter.cost.step_s(1, 0) == pytest.approx(TRUE.step_s(1, 0))
    assert meter.cost.step_s(8, 0) < 1.01 * TRUE.step_s(1, 0)


def test_no_term_is_negative():
    meter = StepCostMeter(Clock())
    for num_decodes in (1, 2, 4, 8):  # the more, the faster
        meter.observe(num_decodes, 0, 0.05 / num_decodes)
    meter.observe(1, 100, 0.001)
    found = meter.cost
    assert found is not None
    assert min(found.base_s, found.per_decode_s, found.prefill_step_s, found.prefill_token_s) >= 0


def test_what_comes_often_does_not_drown_what_comes_seldom():
    clock, rng = Clock(), random.Random(0)
    meter = StepCostMeter(clock)
    observe(meter, *WARM_UP)
    for i in range(2000):
        step = (16, 0) if i % 100 else (4, 500)
        meter.observe(*step, TRUE.step_s(*step) * rng.uniform(0.9, 1.1))
        clock.now_s += 0.02
    assert_near(meter.cost, TRUE, share=0.05)


def test_it_follows_a_machine_that_slows_down_and_no_single_stall():
    clock = Clock()
    meter = StepCostMeter(clock)
    observe(meter, *WARM_UP)
    meter.observe(1, 0, 10.0)
    assert_near(meter.cost, TRUE, share=0.2)
    slow = StepCost(*(3 * s for s in (0.008, 0.002, 0.003, 0.0007)))
    for _ in range(100):
        observe(meter, *WARM_UP, true=slow)
        clock.now_s += 1.0
    assert_near(meter.cost, slow)


def test_a_core_has_measured_itself_before_its_first_request(tmp_path):
    save_random_llama(tmp_path)
    core = make_core(tmp_path)
    assert core.stats().step_cost is None
    core.warm_up()
    cost = core.stats().step_cost
    assert cost is not None
    assert cost.step_s(1, 0) > 0
    assert cost.prefill_token_s > 0
    assert core.stats().token_budget == core.runner.token_budget
    assert core.stats().prompt_tokens_per_s > 0
    assert core.stats().num_free_blocks == core.stats().num_blocks
