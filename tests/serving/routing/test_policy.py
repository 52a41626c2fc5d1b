"""The failure modes known from other routers."""

import dataclasses
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.routing import (
    Decision,
    FleetFullError,
    LeastRequests,
    Overloaded,
    PowerOfTwo,
    PrefixAffinity,
    ReplicaStats,
    RequestKind,
    RoundRobin,
    Router,
    UnknownReplicaError,
    chain_hashes,
)
from tests.serving.routing.helpers import COST, ManualClock, make_router, request

ROOMY = dataclasses.replace(COST, max_num_seqs=64, kv_capacity_tokens=1_000_000)


def sent_to(router: Router, request_id: str, prompt_tokens: int = 100, **rest) -> str:
    decision = router.route(request(request_id, prompt_tokens, **rest))
    assert isinstance(decision, Decision)
    return decision.replica_id


def test_the_prediction_is_the_closed_form():
    router, _, _ = make_router(1)
    decision = router.route(request("a", 250))
    assert isinstance(decision, Decision)
    assert decision.predicted_ttft_s == pytest.approx(0.072)  # as in test_predictor
    assert decision.predicted_tpot_s == pytest.approx(0.01125)  # 10 + 1 + 250 x 0.001 ms
    assert decision.reason == "the only replica"


def test_work_counts_and_not_requests():
    router, _, _ = make_router(2, cost=ROOMY)
    busy = sent_to(router, "long", 5000)
    others = [sent_to(router, f"short{i}", 100) for i in range(5)]
    assert busy not in others


def test_the_urgent_go_where_the_fewest_urgent_are():
    router, _, _ = make_router(2, cost=dataclasses.replace(ROOMY, max_num_seqs=2))
    urgent = [sent_to(router, f"voice{i}", 100, priority=0) for i in range(2)]
    assert set(urgent) == {"r0", "r1"}
    router.first_token("voice0")
    router.finished("voice0", 10)
    free = urgent[0]
    for i in range(12):  # batch work fills the replica without voice, and waits there
        router.adopt(request(f"batch{i}", 100, priority=4), free, 10)
    assert sent_to(router, "voice2", 100, priority=0) == free
    assert sent_to(router, "batch", 100, priority=4) != free


def test_ties_of_the_urgent_go_to_the_fewer_urgent():
    # Places enough, so that nobody waits for one, and every step takes the same.
    flat = dataclasses.replace(ROOMY, step_per_active_s=0.0, step_per_kv_token_s=0.0)
    router, _, _ = make_router(2, cost=flat)
    for i in range(3):
        router.adopt(request(f"voice{i}", 1, priority=0), "r0", 10)
        router.first_token(f"voice{i}")
    for i in range(9):
        router.adopt(request(f"batch{i}", 1, priority=4), "r1", 10)
        router.first_token(f"batch{i}")
    assert {sent_to(router, f"q{i}", 1, priority=0) for i in range(2)} == {"r1"}


def test_work_that_gave_way_is_not_taken_for_others_work():
    router, _, clock = make_router(1, cost=ROOMY)
    for i in range(4):
        router.adopt(request(f"q{i}", 100), "r0", 20)
        router.first_token(f"q{i}")
    # Two of the four wait again, with what they have computed; nobody else's work is there.
    router.report("r0", ReplicaStats(clock.now_s, 230, 2, 0))
    assert router.fleet.foreign(clock.now_s)[0].tolist() == [0.0]
    router.report("r0", ReplicaStats(clock.now_s, 1000, 4, 0))
    assert router.fleet.foreign(clock.now_s)[0].tolist() == [1000.0]


def test_what_batch_waits_for_does_not_make_a_replica_slow_for_voice():
    router, policy, clock = make_router(2, cost=ROOMY)
    for i in range(40):  # on r0 it is always made to wait
        replica_id = sent_to(router, f"batch{i}", 100, priority=4)
        clock.now_s += 9.0 if replica_id == "r0" else 0.03
        router.first_token(f"batch{i}")
        router.finished(f"batch{i}", 1)
    factors = [policy.residuals[p].ttft_factors(2, clock.now_s) for p in (0, 4)]
    assert factors[0].tolist() == [1.0, 1.0]
    assert factors[1][0] > 1.2 * factors[1][1]


def test_stale_statistics_do_not_make_a_herd():
    router, _, clock = make_router(8, cost=ROOMY)
    for i in range(8):  # one looks idle and the others busy, and no newer report comes
        router.report(f"r{i}", ReplicaStats(clock.now_s, 0 if i == 3 else 200, 0 if i == 3 else 2, 0))
    clock.now_s += 0.9
    counts = Counter(sent_to(router, f"q{i}", 100) for i in range(80))
    assert len(counts) == 8
    assert max(counts.values()) <= 14
    clock.now_s += 0.2  # older than a second: only the ledger counts
    assert not any(array.any() for array in router.fleet.foreign(clock.now_s))


def test_simultaneous_routers_with_the_same_view_do_not_choose_alike():
    chosen = [sent_to(make_router(8, seed=seed)[0], "a") for seed in range(40)]
    assert len(set(chosen)) >= 6


def test_a_replica_that_fails_fast_attracts_nothing():
    router, _, clock = make_router(4, cost=ROOMY)
    counts: Counter[str] = Counter()
    for i in range(400):
        clock.now_s += 0.05
        replica_id = sent_to(router, f"q{i}")
        counts[replica_id] += 1
        if replica_id == "r0":
            clock.now_s += 0.001
            router.failed(f"q{i}")
        else:
            clock.now_s += 0.02
            router.first_token(f"q{i}")
            router.finished(f"q{i}", 20)
    assert counts["r0"] <= 8  # two to notice, then probes at doubling pauses
    assert min(counts[r] for r in ("r1", "r2", "r3")) > 100


def test_a_replica_that_was_slow_once_is_tried_again():
    router, _, clock = make_router(2, cost=ROOMY)
    slow_until_s = clock.now_s + 10
    late: Counter[str] = Counter()
    for i in range(1200):
        clock.now_s += 0.1
        replica_id = sent_to(router, f"q{i}")
        is_slow = replica_id == "r0" and clock.now_s < slow_until_s
        start_s = clock.now_s
        clock.now_s = start_s + (0.3 if is_slow else 0.03)
        router.first_token(f"q{i}")
        clock.now_s += 0.2
        router.finished(f"q{i}", 20)
        if i >= 600:
            late[replica_id] += 1
    assert min(late["r0"], late["r1"]) > 60


def test_failures_and_aborts_teach_the_residual_nothing():
    router, policy, clock = make_router(1)
    for i, end in enumerate([router.failed, router.aborted] * 3):
        router.route(request(f"q{i}"))
        clock.now_s += 0.0001
        router.first_token(f"q{i}")
        end(f"q{i}")
        clock.now_s += 100
    assert policy.residuals[0].ttft_factors(1, clock.now_s).tolist() == [1.0]


@settings(max_examples=60, deadline=None)
@given(loads=st.lists(st.integers(0, 30), min_size=3, max_size=3), seed=st.integers(0, 99))
def test_a_prefix_miss_is_placed_by_load_and_not_by_the_emptiest_tree(loads, seed):
    router, policy, _ = make_router(3, seed=seed, cost=ROOMY)
    for slot, load in enumerate(loads):  # the busiest replica gets the emptiest tree
        policy.prefixes.add(slot, chain_hashes([slot] * 16 * 4 * (40 - load)))
        router.report(f"r{slot}", ReplicaStats(100.0, 100 * load, load, 0))
    chosen = sent_to(router, "miss", 200, block_hashes=chain_hashes([77] * 200))
    assert loads[int(chosen[1:])] == min(loads)


def test_affinity_is_worth_the_tokens_it_saves_and_no_more():
    document = [5] * 1024
    hashes = chain_hashes(document)
    router, _, _ = make_router(2, cost=ROOMY)
    home = sent_to(router, "first", 1024, block_hashes=hashes)
    router.first_token("first")
    router.finished("first", 10)
    again = router.route(request("again", 1024, block_hashes=hashes))
    assert isinstance(again, Decision)
    assert (again.replica_id, again.saved_tokens) == (home, 1024)
    router.finished("again", 10)
    router.report(home, ReplicaStats(100.0, 5000, 0, 0))  # more work ahead than the prefix saves
    assert sent_to(router, "third", 1024, block_hashes=hashes) != home


def test_affinity_survives_joining_and_leaving():
    router, _, _ = make_router(4, cost=ROOMY)
    homes: dict[int, str] = {}
    for i in range(12):
        homes[i] = sent_to(router, f"q{i}", 640, block_hashes=chain_hashes([i] * 640))
    for i in range(12):
        router.first_token(f"q{i}")
        router.finished(f"q{i}", 10)
    assert len(set(homes.values())) == 4
    router.add_replica("r4")
    router.add_replica("r1")  # known already: keeps what is known of it
    router.remove_replica("r2")
    router.add_replica("r5")  # in the slot of r2, without its prefixes
    for i, home in homes.items():
        decision = router.route(request(f"again{i}", 640, block_hashes=chain_hashes([i] * 640)))
        assert isinstance(decision, Decision)
        if home == "r2":
            assert decision.saved_tokens == 0
        else:
            assert (decision.replica_id, decision.saved_tokens) == (home, 640)
        router.first_token(f"again{i}")
        router.finished(f"again{i}", 10)


def test_a_prompt_that_never_ran_is_not_counted_as_cached():
    router, _, _ = make_router(1)
    hashes = chain_hashes([1] * 640)
    router.route(request("a", 640, block_hashes=hashes))
    router.aborted("a")
    decision = router.route(request("b", 640, block_hashes=hashes))
    assert isinstance(decision, Decision)
    assert decision.saved_tokens == 0


def test_gates_and_what_is_said_when_all_are_closed():
    router, _, _ = make_router(2)
    router.set_draining("r0", True)
    router.set_healthy("r1", False)
    assert router.route(request("a")) == Overloaded(1.0, "every replica is draining or unhealthy")
    router.set_draining("r0", False)
    assert sent_to(router, "a") == "r0"
    router.set_healthy("r1", True)
    full = [router.route(request(f"q{i}", 4500)) for i in range(8)]
    refused = [answer for answer in full if isinstance(answer, Overloaded)]
    assert len(refused) == 4
    assert all(answer.predicted_wait_s > 0.1 and "full" in answer.reason for answer in refused)


def test_a_retry_goes_elsewhere_if_there_is_an_elsewhere():
    router, _, _ = make_router(2)
    for i in range(4):
        assert sent_to(router, f"q{i}", failed_on=frozenset({"r0", "gone"})) == "r1"
    assert sent_to(router, "last", failed_on=frozenset({"r0", "r1"})) in ("r0", "r1")


def test_a_batch_request_weighs_its_whole_answer():
    router, _, clock = make_router(2, cost=ROOMY)
    router.report("r0", ReplicaStats(clock.now_s, 0, 20, 0))  # many decodes
    router.report("r1", ReplicaStats(clock.now_s, 2000, 0, 0))  # a long prompt ahead
    assert sent_to(router, "chat") == "r0"
    assert sent_to(router, "batch", kind=RequestKind.BATCH) == "r1"
    assert sent_to(router, "due", kind=RequestKind.BATCH, ttft_budget_s=0.1) == "r0"


def test_errors_of_the_caller():
    router, _, _ = make_router(1)
    router.route(request("a"))
    with pytest.raises(ValueError, match="'a' is on a replica already"):
        router.route(request("a"))
    for call in (router.remove_replica, lambda r: router.set_draining(r, True)):
        with pytest.raises(UnknownReplicaError):
            call("nobody")
    small = Router(RoundRobin(), ManualClock(), max_replicas=1)
    assert small.route(request("b")) == Overloaded(1.0, "no replica")
    small.add_replica("r0")
    with pytest.raises(FleetFullError):
        small.add_replica("r1")


def test_baselines():
    def started(policy) -> Router:
        router = Router(policy, ManualClock(), max_replicas=4)
        for i in range(3):
            router.add_replica(f"r{i}")
        return router

    router = started(RoundRobin())
    assert [sent_to(router, f"q{i}") for i in range(4)] == ["r0", "r1", "r2", "r0"]
    router = started(LeastRequests(random.Random(0)))
    assert {sent_to(router, f"q{i}") for i in range(3)} == {"r0", "r1", "r2"}
    router = started(PowerOfTwo(random.Random(0)))
    counts = Counter(sent_to(router, f"q{i}") for i in range(300))
    assert max(counts.values()) - min(counts.values()) <= 4
    router = started(PrefixAffinity(random.Random(0), 4, max_imbalance=2))
    hashes = chain_hashes([1] * 640)
    first = [sent_to(router, f"q{i}", 640, block_hashes=hashes) for i in range(3)]
    assert len(set(first)) == 1  # until the imbalance is above 2
    assert sent_to(router, "q3", 640, block_hashes=hashes) != first[0]
