"""The circuit breaker's states, one replica at a time."""

import numpy as np

from serving.routing.gates import ErrorGate, kv_admits


def opened() -> ErrorGate:
    gate = ErrorGate(2, pause_s=1.0)
    for i in range(2):
        gate.dispatched(f"f{i}", 0)
        gate.failed(f"f{i}", 0, 10.0)
    return gate


def test_opens_at_the_second_failure_and_leaves_the_others_alone():
    gate = ErrorGate(2)
    gate.failed("a", 0, 10.0)
    assert gate.admits(2, 10.0).tolist() == [True, True]
    gate.failed("b", 0, 10.0)
    assert gate.admits(2, 10.0).tolist() == [False, True]


def test_a_few_failures_among_many_successes_do_not_open_it():
    gate = ErrorGate(1)
    for i in range(20):
        gate.finished(f"s{i}", 0, 10.0)
    gate.failed("a", 0, 10.0)
    gate.failed("b", 0, 10.0)
    assert gate.admits(1, 10.0).all()


def test_old_failures_are_forgotten():
    gate = ErrorGate(1, half_life_s=10.0)
    gate.failed("a", 0, 10.0)
    gate.failed("b", 0, 60.0)
    assert gate.admits(1, 60.0).all()


def test_half_open_lets_one_probe_through_and_a_success_closes_it():
    gate = opened()
    assert np.allclose(gate.waits_s(2, 10.4), [0.6, 0.0])
    assert not gate.admits(1, 10.9).any()
    assert gate.admits(1, 11.0).all()
    gate.dispatched("probe", 0)
    assert not gate.admits(1, 11.0).any()
    gate.finished("straggler", 0, 11.0)  # sent before it opened: no proof
    assert not gate.admits(1, 11.0).any()
    gate.finished("probe", 0, 11.5)
    assert gate.admits(1, 11.5).all()


def test_a_failed_probe_doubles_the_pause_and_an_aborted_one_gives_its_place_back():
    gate = opened()
    gate.dispatched("p1", 0)
    gate.failed("p1", 0, 11.0)
    assert not gate.admits(1, 12.9).any()
    assert gate.admits(1, 13.0).all()
    gate.dispatched("p2", 0)
    gate.aborted("p2")
    assert gate.admits(1, 13.0).all()


def test_a_new_replica_in_the_slot_starts_clean():
    gate = opened()
    gate.dispatched("probe", 0)
    gate.reset(0)
    assert gate.admits(1, 10.0).all()
    gate.failed("probe", 0, 10.0)
    assert gate.admits(1, 10.0).all()


def test_kv_gate():
    kv = np.array([0.0, 900.0, 901.0])
    assert kv_admits(kv, np.full(3, 50.0), 1000, 0.95).tolist() == [True, True, False]
    assert kv_admits(kv, np.full(3, 5000.0), 1000, 0.95).tolist() == [True, False, False]
