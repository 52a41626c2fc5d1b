"""The simulation's replicas keep their own books, and its cases are what they say."""

import dataclasses
import random

import pytest

from deploy.bench import router
from deploy.bench.router_clock import Clock
from deploy.bench.router_engine import H100
from deploy.bench.router_group import RouterGroup
from deploy.bench.router_simulation import Replica, Sequence, Simulation
from deploy.bench.router_traces import MAIN_TRACES, TRACES
from serving.routing import LeastRequests


def test_one_prompt_takes_its_steps():
    clock, engine, times = Clock(), H100, []
    replica = Replica(clock, engine)
    note = lambda: times.append(clock.now_s)  # noqa: E731
    replica.add(Sequence("a", 700, 3, (), note, note))
    clock.run(lambda: False)
    first = engine.prefill_s(512) + engine.prefill_s(188)
    assert times == pytest.approx([first, first + 2 * engine.decode_s(1, 700)], rel=1e-3)


@pytest.mark.parametrize("seed", range(5))
def test_replicas_end_empty_whatever_is_aborted(seed):
    rng = random.Random(seed)
    clock = Clock()
    replica = Replica(clock, dataclasses.replace(H100, kv_capacity_tokens=6000, max_num_seqs=6))
    ended: list[str] = []

    def send(name: str) -> None:
        hashes = tuple(range(rng.randint(0, 60)))
        sequence = Sequence(name, 960, rng.randint(1, 90), hashes, lambda: None, lambda: ended.append(name))
        replica.add(sequence)
        if rng.random() < 0.3:

            def abort() -> None:
                if not sequence.is_gone:
                    ended.append(name)
                replica.abort(sequence)

            clock.after(rng.uniform(0, 1.5), abort)

    for i in range(100):
        clock.after(rng.uniform(0, 5), lambda i=i: send(f"q{i}"))
    clock.run(lambda: False)
    assert sorted(ended) == sorted(f"q{i}" for i in range(100))
    assert (replica.num_active, replica.kv_reserved, replica.kv_decoding) == (0, 0, 0)
    assert not replica.waiting
    assert replica.current is None


def test_traces_repeat_and_have_the_rate_asked_for():
    for trace in TRACES.values():
        first, second = (list(trace.arrivals(random.Random(3), 50.0, 2000, 4)) for _ in range(2))
        assert first == second
        assert len(first) >= 2000
        assert first[-1].at_s == pytest.approx(len(first) / 50, rel=0.3)


def test_every_policy_runs_every_trace():
    names = [trace.name for trace in MAIN_TRACES]
    rows = router.run([4], 0.8, names, router.POLICIES, seeds=1, requests=300)
    assert len(rows) == len(names) * len(router.POLICIES)
    for row in rows:
        assert row["ttft_ms_p99"] >= row["ttft_ms_p50"] > 0
        assert row["failures"] == 0 or row["trace"] == "failing_fast"


def test_routers_that_hear_late_of_each_other_end_with_the_same_books():
    clock, rng = Clock(), random.Random(1)
    fleet = {f"r{i}": Replica(clock, H100) for i in range(3)}
    arrivals = list(TRACES["aborts_chat"].arrivals(rng, 60.0, 300, 3))
    group = RouterGroup([LeastRequests(random.Random(i)) for i in range(2)], clock, 3, 0.02, rng)
    Simulation(fleet, group, clock, rng, 0.5).run(arrivals)
    clock.run(lambda: clock.now_s > arrivals[-1].at_s + 60)
    for each in group.routers:
        assert len(each.fleet.ledger) == 0
        assert not each.fleet.ledger.in_flight.any()
