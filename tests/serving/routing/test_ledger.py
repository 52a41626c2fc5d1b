"""Any order of events leaves the counters equal to the sums over what is open."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import MAX_PRIORITY
from serving.routing import Decision, Overloaded, ReplicaStats, Router
from tests.serving.routing.helpers import assert_empty, counters, make_router, request

EVENTS = st.lists(
    st.tuples(
        st.sampled_from(
            ["dispatch"] * 3 + "first_token finished aborted failed remove add drain health report".split()
        ),
        st.integers(0, 7),  # which request, or which replica
        st.integers(0, 3000),  # tokens
        st.floats(0, 2),  # seconds until then
    ),
    max_size=60,
)


def check_books(router: Router) -> None:
    ledger = router.fleet.ledger
    sums = {name: [0] * router.fleet.max_replicas for name in counters(router)}
    for flight in ledger._flights.values():
        is_decoding = flight.first_token_at_s is not None
        sums["in_flight"][flight.slot] += 1
        sums["active_decodes"][flight.slot] += is_decoding
        sums["pending_prefill"][flight.slot] += 0 if is_decoding else flight.prefill_tokens
        sums["expected_output"][flight.slot] += flight.expected_output_tokens
        sums["saved_tokens"][flight.slot] += flight.saved_tokens
        sums["kv_tokens"][flight.slot] += flight.kv_tokens
    assert counters(router) == sums
    for priority in range(MAX_PRIORITY + 1):
        flights = [f for f in ledger._flights.values() if f.request.priority <= priority]
        waiting = [f for f in flights if f.first_token_at_s is None]
        assert ledger.in_flight_from[priority].sum() == len(flights)
        assert ledger.pending_from[priority].sum() == sum(f.prefill_tokens for f in waiting)
    n = router.fleet.num_slots
    remaining = ledger.remaining_prefill(n, router._clock(), np.full(n, 1000.0))
    assert (remaining >= 0).all()
    for replica_id in router.fleet.replica_ids():
        assert router.fleet.replica_id(router.fleet.slot(replica_id)) == replica_id


def apply(router: Router, clock, event: tuple[str, int, int, float]) -> None:
    kind, which, tokens, wait_s = event
    clock.now_s += wait_s
    known = router.fleet.replica_ids()
    replica_id = known[which % len(known)] if known else None
    request_id = f"q{which}"
    before = counters(router)
    is_open = router.fleet.ledger.find(request_id) is not None
    match kind:
        case "dispatch":
            if not is_open:
                hashes = [(which % 2, i) for i in range(tokens // 16)]
                own = request(
                    request_id, tokens + 1, block_hashes=[hash(h) for h in hashes], priority=tokens % 10
                )
                answer = router.route(own)
                assert isinstance(answer, Decision | Overloaded)
                if isinstance(answer, Overloaded):
                    assert answer.predicted_wait_s >= 0
        case "first_token":
            assert router.first_token(request_id) <= is_open
        case "finished":
            assert router.finished(request_id, tokens) == is_open
        case "aborted" | "failed":
            assert getattr(router, kind)(request_id) == is_open
        case "add":
            if len(known) < 5:
                router.add_replica(f"r{which}")
        case "remove" if replica_id:
            lost = router.remove_replica(replica_id)
            assert all(router.fleet.ledger.find(r.request_id) is None for r in lost)
        case "drain" if replica_id:
            router.set_draining(replica_id, tokens % 2 == 0)
        case "health" if replica_id:
            router.set_healthy(replica_id, tokens % 2 == 0)
        case "report" if replica_id:
            router.report(replica_id, ReplicaStats(clock.now_s - wait_s, tokens, which, tokens))
    if kind in ("drain", "health", "report", "add"):
        assert counters(router) == before, f"{kind} wrote to the ledger"


@settings(max_examples=200, deadline=None)
@given(EVENTS)
def test_no_order_of_events_leaks_or_goes_below_zero(events):
    router, policy, clock = make_router(3)
    for event in events:
        apply(router, clock, event)
        check_books(router)
    for i in range(8):
        router.aborted(f"q{i}")
    assert_empty(router)
    assert not policy.errors._probes
    assert not policy.errors._is_probing.any()


def test_repeated_late_and_unknown_events_change_nothing():
    router, _, _ = make_router(2)
    assert not router.first_token("nobody")
    assert not router.finished("nobody", 5)
    router.route(request("a"))
    assert router.first_token("a")
    assert not router.first_token("a")
    assert router.finished("a", 5)
    for repeat in (router.first_token, router.aborted, router.failed, lambda i: router.finished(i, 5)):
        assert not repeat("a")
    assert_empty(router)


def test_events_of_a_dead_replica_do_not_reach_the_next_one_in_its_slot():
    router, _, _ = make_router(1)
    router.route(request("old"))
    assert [r.request_id for r in router.remove_replica("r0")] == ["old"]
    router.add_replica("new")
    router.route(request("young"))
    before = counters(router)
    assert not router.first_token("old")
    assert not router.finished("old", 3)
    assert counters(router) == before


def test_ten_thousand_requests_with_aborts_leave_every_counter_at_zero():
    rng = random.Random(7)
    router, _, clock = make_router(4)
    open_ids: list[str] = []
    for i in range(10_000):
        clock.now_s += rng.expovariate(100)
        tokens = rng.randint(1, 800)
        if isinstance(router.route(request(f"q{i}", tokens, block_hashes=range(tokens // 16))), Decision):
            open_ids.append(f"q{i}")
        while len(open_ids) > 20:
            request_id = open_ids.pop(rng.randrange(len(open_ids)))
            if rng.random() < 0.1:
                if rng.random() < 0.5:
                    router.first_token(request_id)
                router.aborted(request_id)
            else:
                router.first_token(request_id)
                router.finished(request_id, rng.randint(1, 200))
    for request_id in open_ids:
        router.finished(request_id, 1)
    assert_empty(router)


def test_the_oldest_prompt_progresses_but_never_vanishes():
    router, _, clock = make_router(1)
    ledger = router.fleet.ledger
    router.route(request("a", 400))
    router.route(request("b", 100))
    rate = np.array([1000.0])
    clock.now_s += 0.125
    assert ledger.remaining_prefill(1, clock.now_s, rate).tolist() == [375.0]
    clock.now_s += 60  # a hung replica does not look idle
    assert ledger.remaining_prefill(1, clock.now_s, rate).tolist() == [200.0]
    router.first_token("a")
    assert ledger.remaining_prefill(1, clock.now_s, rate).tolist() == [100.0]


def test_less_important_prompts_are_not_ahead_of_more_important_ones():
    router, _, clock = make_router(1)
    ledger = router.fleet.ledger
    router.route(request("a", 400, priority=3))
    router.route(request("b", 100, priority=1))
    rate = np.array([1000.0])
    assert [ledger.remaining_prefill(1, clock.now_s, rate, p).item() for p in (0, 1, 2, 3)] == [
        0,
        100,
        100,
        500,
    ]
    clock.now_s += 0.05
    assert ledger.remaining_prefill(1, clock.now_s, rate, 1).item() == pytest.approx(50)
