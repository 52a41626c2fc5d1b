"""The cost model follows what engines publish."""

import pytest

from serving.routing import CostEstimator, EngineLimits, EngineSample
from tests.serving.routing.helpers import COST


def sample(num_running: int, step_s: float, waiting: int = 0, rate: float = 0.0) -> EngineSample:
    return EngineSample(num_running, waiting, 0, 1, step_s, rate)


def test_the_line_is_found():
    estimator = CostEstimator(COST)
    for i in range(400):
        estimator.observe(sample(1 + i % 8, 0.02 + 0.003 * (1 + i % 8)))
    assert estimator.model.step_base_s == pytest.approx(0.02, rel=0.01)
    assert estimator.model.step_per_active_s == pytest.approx(0.003, rel=0.01)


def test_one_batch_size_gives_its_own_step_and_no_slope():
    estimator = CostEstimator(COST)
    for _ in range(5):
        estimator.observe(sample(3, 0.05))
    assert estimator.model.step_base_s == pytest.approx(0.05)
    assert estimator.model.step_per_active_s == 0.0


def test_neither_part_becomes_negative():
    estimator = CostEstimator(COST)
    for i in range(50):
        estimator.observe(sample(1 + i % 4, 0.05 / (1 + i % 4)))
    assert estimator.model.step_per_active_s == 0.0
    assert estimator.model.step_base_s > 0
    for i in range(2000):
        estimator.observe(sample(10 + i % 4, 0.0001 + 0.02 * (i % 4)))
    assert estimator.model.step_base_s > 0


def test_steps_with_prompts_in_them_and_idle_ones_are_left_out():
    estimator = CostEstimator(COST)
    estimator.observe(sample(3, 0.5, waiting=100))
    estimator.observe(sample(0, 0.5))
    assert estimator.model == COST


def test_rate_and_limits():
    estimator = CostEstimator(COST)
    estimator.observe(sample(0, 0.0, rate=5000.0))
    estimator.set_limits(EngineLimits(16, 2048, 50_000))
    model = estimator.model
    assert model.prefill_token_s == pytest.approx(0.0002)
    assert (model.max_num_seqs, model.chunk_tokens, model.kv_capacity_tokens) == (16, 2048, 50_000)
