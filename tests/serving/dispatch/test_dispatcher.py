"""The router's books under everything that replicas, proxy and clients may do."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import StepCost
from serving.dispatch.dispatcher import ARRIVAL_TIMEOUT_S, STALL_S
from serving.dispatch.headers import (
    FLIGHT,
    REFUSE,
    ROUTE,
    predicted_ttft_s,
)
from serving.dispatch.messages import Arrived, Ended, FirstToken, Held, Report
from tests.serving.dispatch.helpers import BODY, hello, is_empty, make_dispatcher, note_of, report, send


def test_an_answer_names_a_replica_and_explains_the_choice():
    dispatcher, _ = make_dispatcher()
    answer = dispatcher.route(BODY, len(BODY))
    assert answer.replica_id in ("r0", "r1")
    assert note_of(answer).reply_to == "h:1"
    assert answer.headers[ROUTE].startswith("policy=latency; reason=")
    assert predicted_ttft_s(answer.headers[ROUTE]) > 0
    # HAProxy reads the answer with a simple pattern: a flat object, no quotes or braces inside values.
    assert not set('"{}') & set("".join(answer.headers.values()))


def test_one_life_of_a_request():
    dispatcher, _ = make_dispatcher()
    flight, replica = send(dispatcher)
    dispatcher.receive(replica, Arrived(flight, 4, 5))
    assert dispatcher.counters()["pending_prefill"] > 0
    dispatcher.receive(replica, FirstToken(flight))
    assert (dispatcher.counters()["pending_prefill"], dispatcher.counters()["active_decodes"]) == (0, 1)
    dispatcher.receive(replica, Ended(flight, "finished", 5))
    assert is_empty(dispatcher)


def test_a_router_learns_of_prefixes_that_another_one_sent():
    first, second = make_dispatcher()[0], make_dispatcher()[0]
    body = json.dumps({"prompt": "A river runs through the old town. " * 40}).encode()
    answer = first.route(body, len(body))
    prefixes = list(note_of(answer).prefixes)
    second.receive(answer.replica_id, Arrived(note_of(answer).flight_id, 350, 16, 3, prefixes))
    second.receive(answer.replica_id, FirstToken(note_of(answer).flight_id))
    second.receive(answer.replica_id, Ended(note_of(answer).flight_id, "finished", 16))
    again = second.route(body, len(body))
    assert again.replica_id == answer.replica_id
    assert "saved-tokens=320" in again.headers[ROUTE]


def test_a_router_that_is_new_is_told_what_is_cached():
    first, second = make_dispatcher()[0], make_dispatcher()[0]
    body = json.dumps({"prompt": "A river runs through the old town. " * 40}).encode()
    answer = first.route(body, len(body))
    prefixes = list(note_of(answer).prefixes)
    second.receive(answer.replica_id, Held(prefixes))
    again = second.route(body, len(body))
    assert again.replica_id == answer.replica_id
    assert "saved-tokens=320" in again.headers[ROUTE]


def test_a_replica_that_has_requests_is_known_to_the_proxy_and_waits_no_longer():
    dispatcher, _ = make_dispatcher(2, new_replica_delay_s=60.0)
    dispatcher.list_replicas(["r0", "r1", "r2", "r3"])
    assert "r3" not in dispatcher.router.fleet
    dispatcher.receive("r3", Arrived("f", 350, 16))
    assert "r3" in dispatcher.router.fleet
    assert dispatcher.counters()["in_flight"] == 1
    dispatcher.receive("not listed", Arrived("g", 350, 16))
    assert "not listed" not in dispatcher.router.fleet


def test_it_waits_for_those_that_are_listed_and_not_connected():
    dispatcher, _ = make_dispatcher(2)
    for replica_id in ("r0", "r1"):
        assert dispatcher.is_waiting_for_replicas
        dispatcher.connected(hello(replica_id))
    assert not dispatcher.is_waiting_for_replicas
    dispatcher.disconnected("r0")
    assert dispatcher.is_waiting_for_replicas
    dispatcher.list_replicas(["r1"])
    assert not dispatcher.is_waiting_for_replicas


def test_the_first_prediction_is_by_what_the_replicas_measured_of_themselves():
    dispatcher, _ = make_dispatcher(2, new_replica_delay_s=60.0)
    for replica_id, factor in (("r0", 1.0), ("r1", 2.0)):
        dispatcher.connected(hello(replica_id))
        cost = StepCost(factor * 0.02, 0.0, 0.0, factor * 0.001)
        dispatcher.receive(replica_id, Report(0, 0, 0, 1, cost))
        dispatcher.receive(replica_id, Held([]))  # one of them is admitted only now
    body = json.dumps({"prompt": "x" * 400}).encode()
    answer = dispatcher.route(body, len(body))
    assert answer.replica_id == "r0"
    # 2 ms on the way, one step of 20 ms, 100 tokens of 1 ms
    assert predicted_ttft_s(answer.headers[ROUTE]) == pytest.approx(0.122)
    dispatcher.disconnected("r0")
    answer = dispatcher.route(body, len(body))
    assert predicted_ttft_s(answer.headers[ROUTE]) == pytest.approx(0.242)


def test_what_no_replica_saw_is_given_up():
    dispatcher, clock = make_dispatcher()
    send(dispatcher)
    clock.now_s += ARRIVAL_TIMEOUT_S + 1
    dispatcher.sweep()
    assert is_empty(dispatcher)


def test_a_stream_of_any_length_is_not_given_up():
    dispatcher, clock = make_dispatcher()
    flight, replica = send(dispatcher)
    dispatcher.receive(replica, Arrived(flight, 4, 5))
    clock.now_s += 100 * ARRIVAL_TIMEOUT_S
    dispatcher.sweep()
    assert dispatcher.counters()["flights"] == 1


def test_a_request_that_the_proxy_sent_elsewhere_moves_with_it():
    dispatcher, _ = make_dispatcher()
    flight, replica = send(dispatcher)
    (other,) = {"r0", "r1"} - {replica}
    dispatcher.receive(other, Arrived(flight, 4, 5))
    ledger, fleet = dispatcher.router.fleet.ledger, dispatcher.router.fleet
    assert ledger.in_flight[fleet.slot(other)] == 1
    assert ledger.in_flight[fleet.slot(replica)] == 0
    dispatcher.receive(replica, Ended(flight, "failed", 0))  # too late: it is no longer there
    assert ledger.in_flight[fleet.slot(other)] == 1
    dispatcher.receive(other, Ended(flight, "finished", 3))
    assert is_empty(dispatcher)


def test_a_broken_connection_takes_the_replica_out_until_it_says_hello():
    dispatcher, _ = make_dispatcher()
    flight, replica = send(dispatcher)
    (other,) = {"r0", "r1"} - {replica}
    dispatcher.connected(hello(replica))
    dispatcher.receive(replica, Arrived(flight, 4, 5))
    dispatcher.disconnected(replica)
    assert dispatcher.counters()["flights"] == 0
    dispatcher.list_replicas(["r0", "r1"])  # the controller has not noticed yet
    assert {send(dispatcher)[1] for _ in range(5)} == {other}
    dispatcher.receive(other, Arrived(flight, 4, 5))  # retried by the proxy
    assert dispatcher.router.fleet.ledger.find(flight) is not None
    dispatcher.connected(hello(replica))
    assert set(dispatcher.router.fleet.replica_ids()) == {"r0", "r1"}


def test_a_replica_that_left_takes_its_requests_off_the_books():
    dispatcher, _ = make_dispatcher()
    for _ in range(6):
        send(dispatcher)
    dispatcher.list_replicas(["r0"])
    assert dispatcher.router.fleet.replica_ids() == ["r0"]
    dispatcher.list_replicas([])
    assert is_empty(dispatcher)
    assert dispatcher.route(BODY, len(BODY)) is None


def test_a_new_replica_waits_until_the_proxy_knows_it():
    dispatcher, clock = make_dispatcher(2, new_replica_delay_s=2.0)
    clock.now_s += 2.0
    dispatcher.list_replicas(["r0", "r1", "r2"])
    assert set(dispatcher.router.fleet.replica_ids()) == {"r0", "r1"}
    clock.now_s += 1.9
    dispatcher.sweep()
    assert set(dispatcher.router.fleet.replica_ids()) == {"r0", "r1"}
    clock.now_s += 0.2
    dispatcher.sweep()
    assert set(dispatcher.router.fleet.replica_ids()) == {"r0", "r1", "r2"}


def test_a_new_replica_does_not_wait_where_the_others_have_left():
    dispatcher, _ = make_dispatcher(2, new_replica_delay_s=2.0)
    assert len(dispatcher.router.fleet) > 0
    dispatcher.list_replicas(["r2", "r3"])
    assert send(dispatcher)[1] in ("r2", "r3")


def test_a_replica_that_makes_no_steps_gets_nothing_until_it_does():
    dispatcher, clock = make_dispatcher()
    flight, stuck = send(dispatcher)
    (other,) = {"r0", "r1"} - {stuck}
    dispatcher.receive(stuck, Arrived(flight, 4, 5))
    dispatcher.receive(stuck, report(7))
    clock.now_s += STALL_S + 0.1
    dispatcher.receive(stuck, report(7))
    assert {send(dispatcher)[1] for _ in range(5)} == {other}
    dispatcher.receive(stuck, report(8))
    assert stuck in {send(dispatcher)[1] for _ in range(10)}


def test_an_idle_replica_makes_no_steps_and_is_well():
    dispatcher, clock = make_dispatcher(1)
    for _ in range(3):
        dispatcher.receive("r0", report(7, num_running=0))
        clock.now_s += 2 * STALL_S
    assert send(dispatcher)[1] == "r0"


def test_where_all_are_gated_a_replica_is_asked_to_refuse():
    dispatcher, _ = make_dispatcher(1)
    dispatcher.router.set_healthy("r0", False)
    answer = dispatcher.route(BODY, len(BODY))
    assert answer.replica_id == "r0"
    assert float(answer.headers[REFUSE]) > 0
    assert FLIGHT not in answer.headers
    assert is_empty(dispatcher)


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"\xff", json.dumps({"messages": [5, {}]}).encode()])
def test_any_body_is_routed(body):
    dispatcher, _ = make_dispatcher()
    assert dispatcher.route(body, len(body)) is not None


EVENTS = st.lists(
    st.tuples(
        st.sampled_from("route arrived elsewhere first ended lost hello held report list time".split()),
        st.integers(0, 7),
    ),
    max_size=60,
)


@settings(max_examples=200, deadline=None)
@given(EVENTS)
def test_no_order_of_events_leaves_anything_in_the_books(events):
    dispatcher, clock = make_dispatcher(3)
    flights: list[tuple[str, str]] = []
    for what, number in events:
        flight, replica = flights[number % len(flights)] if flights else ("?", "r0")
        match what:
            case "route":
                answer = dispatcher.route(BODY, len(BODY))
                if answer is not None and FLIGHT in answer.headers:
                    flights.append((note_of(answer).flight_id, answer.replica_id))
            case "arrived":
                dispatcher.receive(replica, Arrived(flight, 4, 5))
            case "elsewhere":
                dispatcher.receive(f"r{number % 3}", Arrived(flight, 4, 5))
            case "first":
                dispatcher.receive(replica, FirstToken(flight))
            case "ended":
                reason = ("finished", "aborted", "failed")[number % 3]
                dispatcher.receive(f"r{number % 3}", Ended(flight, reason, 4))
            case "lost":
                dispatcher.disconnected(f"r{number % 3}")
            case "hello":
                dispatcher.connected(hello(f"r{number % 3}"))
            case "held":
                dispatcher.receive(f"r{number % 3}", Held([1, 2]))
            case "report":
                dispatcher.receive(f"r{number % 3}", report(number))
            case "list":
                dispatcher.list_replicas(f"r{i}" for i in range(1 + number % 3))
            case "time":
                clock.now_s += number
        assert min(dispatcher.counters().values()) >= 0
    for flight in {f for f, _ in flights} | {"?"}:  # each replica says the end of what it said arrived
        for replica in ("r0", "r1", "r2"):
            dispatcher.receive(replica, Ended(flight, "aborted", 0))
    assert is_empty(dispatcher)
