"""The closed form, by hand, and what residuals may learn."""

import dataclasses

import numpy as np
import pytest

from serving.routing import CostModel
from serving.routing.costs import FleetCosts
from serving.routing.ledger import Flight
from serving.routing.predictor import OutputLengths, Residuals
from tests.serving.routing.helpers import COST, request

COSTS = FleetCosts(COST, 4)


def test_ttft_on_an_idle_replica():
    # 250 tokens are 3 steps: 2 ms + 3 x (10 + 5 ms) + 250 x 0.1 ms
    ttft = COSTS.ttft_s(np.zeros(1), np.array([250.0]), np.array([0.010]), np.zeros(1))
    assert ttft.tolist() == pytest.approx([0.072])


def test_ttft_behind_others():
    # 4 decodes over 1,000 tokens: a step of 10 + 4 + 1 = 15 ms, half of which is left on arrival.
    step = COSTS.decode_step_s(np.array([4.0]), np.array([1000.0]))
    assert step.tolist() == pytest.approx([0.015])
    # 120 ahead and 100 own are 3 steps: 2 + 7.5 + 3 x (15 + 5) + 22 ms
    ttft = COSTS.ttft_s(np.array([120.0]), np.array([100.0]), step, np.array([4.0]))
    assert ttft.tolist() == pytest.approx([0.0915])
    assert COSTS.prefill_rate(step).tolist() == pytest.approx([100 / 0.030])


def test_wait_for_a_seat_and_for_blocks():
    answers = np.array([0.8, 0.8, 0.8, 0.8])
    wait = COSTS.admission_wait_s(
        np.array([7, 8, 10, 1]), np.array([0.0, 0.0, 0.0, 10_500.0]), 500.0, answers
    )
    # A free seat; the first of 8 leavers; the third; a tenth of the cache has to come free.
    assert wait.tolist() == pytest.approx([0.0, 0.1, 0.3, 0.08])


def test_each_replica_has_its_own_costs_and_silent_ones_those_that_were_heard_last():
    costs = FleetCosts(COST, 3)
    idle = np.zeros(3)
    costs.set(1, dataclasses.replace(COST, step_base_s=0.030))
    costs.set(2, dataclasses.replace(COST, step_base_s=0.020, max_num_seqs=1))
    assert costs.decode_step_s(idle, idle).tolist() == pytest.approx([0.020, 0.030, 0.020])
    assert costs.admission_wait_s(np.array([0, 1, 1]), idle, 1.0, np.ones(3)).tolist() == [0.0, 0.0, 1.0]
    costs.reset(1)
    assert costs.decode_step_s(idle, idle).tolist() == pytest.approx([0.020] * 3)


def test_costs_are_checked():
    with pytest.raises(ValueError, match="chunk_tokens"):
        CostModel(1, 1, 1, 1, 1, 0, 1, 1)


def flight(actual_ttft_s: float, predicted_ttft_s: float = 0.1, predicted_tpot_s: float = 0.01) -> Flight:
    made = Flight(request("a"), 0, 0, 10, 5.0, predicted_ttft_s, predicted_tpot_s)
    made.first_token_at_s = 5.0 + actual_ttft_s
    return made


def ttft_factors(residuals: Residuals, now_s: float) -> list[float]:
    return residuals.ttft_factors(2, now_s).tolist()


def test_a_residual_tells_the_fleet_from_the_replica():
    residuals = Residuals(3, weight=0.1, fleet_weight=0.1)
    for _ in range(300):  # all are twice as slow as predicted, and nobody asked the third
        for slot in (0, 1):
            made = dataclasses.replace(flight(0.2), slot=slot)
            residuals.observe(made, 11, now_s=5.2 + 10 * 0.015)
    assert residuals.ttft_factors(3, 5.2).tolist() == pytest.approx([2.0, 2.0, 2.0])
    assert residuals.tpot_factors(3, 5.2).tolist() == pytest.approx([1.5, 1.5, 1.5])


def test_a_residual_is_bounded_and_its_deviation_fades():
    residuals = Residuals(2, weight=1.0, fleet_weight=1e-9, half_life_s=30.0)
    residuals.observe(flight(1000.0), 1, now_s=100.0)
    assert ttft_factors(residuals, 100.0) == pytest.approx([4.0, 1.0])
    assert ttft_factors(residuals, 130.0) == pytest.approx([2.0, 1.0])
    residuals.observe(flight(0.1), 1, now_s=130.0)
    assert ttft_factors(residuals, 130.0) == pytest.approx([1.0, 1.0])
    residuals.observe(flight(0.05), 1, now_s=130.0)
    residuals.reset(0)
    assert ttft_factors(residuals, 130.0) == pytest.approx([1.0, 1.0])


def test_factors_kept_for_a_moment_show_a_new_observation_at_once():
    residuals = Residuals(2, weight=1.0, fleet_weight=1e-9, half_life_s=30.0)
    assert ttft_factors(residuals, 100.0) == [1.0, 1.0]
    residuals.observe(flight(0.2), 1, now_s=100.1)
    assert ttft_factors(residuals, 100.1) == pytest.approx([2.0, 1.0])
    residuals.reset(0)
    assert ttft_factors(residuals, 100.1) == pytest.approx([1.0, 1.0])


def test_what_did_not_start_teaches_nothing():
    residuals = Residuals(1)
    made = flight(0.2)
    made.first_token_at_s = None
    residuals.observe(made, 0, now_s=6.0)
    assert residuals.ttft_factors(1, 6.0).tolist() == [1.0]
    with pytest.raises(ValueError, match="weight"):
        Residuals(1, weight=0)


def test_expected_lengths():
    lengths = OutputLengths(initial=100, weight=0.5)
    assert (lengths.expect(None), lengths.expect(20), lengths.expect(1000)) == (100, 20, 100)
    lengths.observe(0)
    assert lengths.expect(None) == 50
