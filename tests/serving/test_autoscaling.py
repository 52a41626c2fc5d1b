"""The wish for replicas: up with the load, down with a margin, within bounds, never to and fro."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from serving.autoscaling import Attainment, AutoscalingSettings, ReplicaLoad, desired_replicas

SETTINGS = AutoscalingSettings(min_replicas=1, max_replicas=8)


def loads(count: int, backlog_s: float = 0.0, busy: float = 0.0, kept: float = 0.0, total: float = 0.0):
    return [ReplicaLoad(backlog_s, busy, kept, total)] * count


def test_a_backlog_or_a_full_batch_asks_for_as_many_as_it_takes():
    assert desired_replicas(2, loads(2, backlog_s=1.0), SETTINGS) == 4  # twice the target
    assert desired_replicas(2, loads(2, busy=0.9), SETTINGS) == 3
    assert desired_replicas(2, loads(2, backlog_s=100.0), SETTINGS) == 8


def test_those_that_start_are_not_asked_for_twice():
    assert desired_replicas(4, loads(2, backlog_s=1.0), SETTINGS) == 4


def test_missed_deadlines_ask_for_one_more_where_load_may_be_the_reason():
    missed = {"kept": 5.0, "total": 10.0}
    assert desired_replicas(2, loads(2, busy=0.4, **missed), SETTINGS) == 3
    assert desired_replicas(2, loads(2, busy=0.0, **missed), SETTINGS) == 2
    assert desired_replicas(2, loads(2, busy=0.4, kept=10.0, total=10.0), SETTINGS) == 2
    assert desired_replicas(3, loads(2, busy=0.4, **missed), SETTINGS) == 3  # the third is starting


def test_down_one_at_a_time_with_a_margin_and_not_while_deadlines_are_missed():
    assert desired_replicas(4, loads(4), SETTINGS) == 3
    assert desired_replicas(4, loads(4, busy=0.3), SETTINGS) == 3  # 2.0 of 3 * 0.8
    assert desired_replicas(4, loads(4, busy=0.4), SETTINGS) == 4  # 2.7
    assert desired_replicas(4, loads(4, kept=1.0, total=10.0), SETTINGS) == 4
    assert desired_replicas(1, loads(1), SETTINGS) == 1


def test_nothing_reported_changes_nothing():
    assert desired_replicas(3, [], SETTINGS) == 3
    assert desired_replicas(0, [], SETTINGS) == 1
    assert desired_replicas(20, [], SETTINGS) == 8


@given(st.integers(1, 8), st.floats(0, 50))
def test_a_wish_that_came_true_is_not_taken_back(current, work):
    """Work that spreads evenly: where it sends the number up or down, it does not send it back."""

    def wish(replicas: int) -> int:
        return desired_replicas(replicas, loads(replicas, busy=work / replicas), SETTINGS)

    changed = wish(current)
    if changed > current:
        assert wish(changed) >= changed
    if changed < current:
        assert wish(changed) <= changed


def test_bounds_are_checked():
    with pytest.raises(ValidationError, match=r"at least min_replicas \(4\), got 2"):
        AutoscalingSettings(min_replicas=4, max_replicas=2)


def test_old_deadlines_fade():
    attainment = Attainment()
    attainment.add(True, 100.0)
    attainment.add(False, 100.0)
    assert attainment.counts(100.0) == (1.0, 2.0)
    assert attainment.counts(100.0 + Attainment.HALF_LIFE_S) == (0.5, 1.0)
