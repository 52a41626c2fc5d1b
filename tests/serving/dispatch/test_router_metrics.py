"""What a router shows of its books."""

from prometheus_client.parser import text_string_to_metric_families

from serving.dispatch.dispatcher import STALL_S, Dispatcher
from tests.serving.dispatch.helpers import BODY, hello, make_dispatcher, report, send


def shown(dispatcher: Dispatcher) -> dict[str, float]:
    dispatcher.record_fleet()
    return {
        f"{s.name.removeprefix('peregrine_router_')}{''.join(s.labels.values())}": s.value
        for family in text_string_to_metric_families(dispatcher.recorder.exposition().decode())
        for s in family.samples
    }


def test_decisions_and_refusals():
    dispatcher, _ = make_dispatcher(num_replicas=2)
    send(dispatcher)
    send(dispatcher)
    for replica in ("r0", "r1"):
        dispatcher.router.set_healthy(replica, False)
    dispatcher.route(BODY, len(BODY))
    dispatcher.record_decisions()
    found = shown(dispatcher)
    assert found["decision_seconds_count"] == 3
    assert found["refusals_total"] == 1
    assert found["requests_inflight"] == 2
    assert sum(value for name, value in found.items() if name.startswith("decisions_total")) == 2


def test_the_age_is_that_of_the_replica_that_is_silent_longest():
    dispatcher, clock = make_dispatcher()
    assert shown(dispatcher)["stats_age_seconds"] == 0
    for replica in ("r0", "r1"):
        dispatcher.connected(hello(replica))
        dispatcher.receive(replica, report(1))
    clock.now_s += 7
    dispatcher.receive("r1", report(2))
    clock.now_s += 1
    assert shown(dispatcher)["stats_age_seconds"] == 8
    dispatcher.disconnected("r0")  # gone, which is another matter
    found = shown(dispatcher)
    assert found["stats_age_seconds"] == 1
    assert (found["replicaslisted"], found["replicasroutable"]) == (2, 1)


def test_a_replica_with_work_and_no_steps_is_stalled():
    dispatcher, clock = make_dispatcher(num_replicas=1)
    _, replica = send(dispatcher)
    for _ in range(2):
        dispatcher.receive(replica, report(5))
        clock.now_s += STALL_S + 1
    found = shown(dispatcher)
    assert (found["replicasstalled"], found["replicasroutable"]) == (1, 0)
