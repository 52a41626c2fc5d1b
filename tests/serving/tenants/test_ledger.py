"""The ledger's arithmetic, on a clock that the tests hold."""

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.tenants.ledger import Ledger, Limits
from serving.tenants.window import MINUTE_S, Window

REPLICAS = ("a", "b", "c")


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def ledger(clock):
    return Ledger(clock)


def test_requests_of_all_replicas_count_together(ledger):
    limits = Limits(requests=3)
    reasons = [ledger.ask(replica, "acme", limits, 1, 0).reason for replica in "abca"]
    assert reasons == [None, None, None, "requests"]
    assert ledger.ask("a", "other", limits, 1, 0).is_granted


def test_a_refusal_says_when_the_first_of_a_minute_ago_goes(ledger, clock):
    limits = Limits(requests=2)
    ledger.ask("a", "acme", limits, 1, 0)
    clock.now += 20
    ledger.ask("b", "acme", limits, 1, 0)
    clock.now += 10
    refused = ledger.ask("a", "acme", limits, 1, 0)
    assert (refused.reason, refused.remaining_requests) == ("requests", 0)
    assert refused.retry_after_s == pytest.approx(30.1)
    assert refused.reset_requests_s == pytest.approx(50.1)
    clock.now += refused.retry_after_s - 0.01
    assert not ledger.ask("a", "acme", limits, 1, 0).is_granted
    clock.now += 0.02
    assert ledger.ask("a", "acme", limits, 1, 0).is_granted


def test_tokens_are_the_prompt_at_once_and_the_output_as_it_comes(ledger):
    limits = Limits(tokens=100)
    assert ledger.ask("a", "acme", limits, 40, 0).remaining_tokens == 60
    ledger.use("a", "acme", 50, 0, 0)
    refused = ledger.ask("b", "acme", limits, 11, 0)
    assert (refused.reason, refused.remaining_tokens) == ("tokens", 10)
    assert ledger.ask("b", "acme", limits, 10, 0).is_granted


def test_output_that_is_expected_is_held_back_until_it_came_or_the_request_ended(ledger):
    limits = Limits(tokens=100)
    ledger.ask("a", "acme", limits, 10, 80)
    assert ledger.ask("b", "acme", limits, 11, 0).reason == "tokens"
    ledger.use("a", "acme", 30, 0, 30)
    assert ledger.ask("b", "acme", limits, 11, 0).reason == "tokens"
    ledger.use("a", "acme", 0, 1, 50)
    assert ledger.ask("b", "acme", limits, 60, 0).is_granted


def test_a_prompt_above_the_limit_is_told_apart(ledger):
    assert ledger.ask("a", "acme", Limits(tokens=100), 101, 0).reason == "too_large"


def test_expected_output_leaves_room_for_the_prompt():
    limits = Limits(tokens=100)
    assert limits.expected(90, 50) == 10
    assert limits.expected(200, 50) == 0
    assert Limits().expected(200, 50) == 50


def test_places_come_back_when_requests_end_or_their_replica_dies(ledger):
    limits = Limits(concurrency=2)
    assert ledger.ask("a", "acme", limits, 1, 0).is_granted
    assert ledger.ask("b", "acme", limits, 1, 0).is_granted
    assert ledger.ask("b", "acme", limits, 1, 0).reason == "concurrency"
    ledger.use("a", "acme", 0, 1, 0)
    assert ledger.ask("b", "acme", limits, 1, 0).is_granted
    ledger.close_all("b")
    assert [ledger.ask("a", "acme", limits, 1, 0).is_granted for _ in range(3)] == [True, True, False]


def test_what_a_dead_replica_let_in_counts_for_its_minute(ledger, clock):
    limits = Limits(requests=1)
    ledger.ask("a", "acme", limits, 1, 0)
    ledger.close_all("a")
    ledger.sweep()
    assert not ledger.ask("b", "acme", limits, 1, 0).is_granted
    clock.now += MINUTE_S + 0.2
    ledger.sweep()
    assert list(ledger.accounts_of("a")) == []
    assert ledger.ask("b", "acme", limits, 1, 0).is_granted


def test_shares_add_up_to_no_more_than_the_whole():
    assert Limits(100, 1001, 5).share(3) == Limits(33, 333, 1)
    assert Limits(None, None, 1).share(3) == Limits(None, None, 1)


arrivals = st.lists(
    st.tuples(
        st.floats(0, 5, allow_nan=False),  # seconds since the one before
        st.sampled_from(REPLICAS),
        st.integers(1, 40),  # prompt tokens
        st.integers(0, 20),  # output tokens
        st.floats(0, 10, allow_nan=False),  # seconds until the end
    ),
    max_size=200,
)


@dataclass(order=True)
class InFlight:
    end: float
    replica: str
    output_tokens: int
    held_tokens: int


def within_a_minute(events: list[tuple[float, int]], now: float, slack_s: float = 0.0) -> int:
    return sum(amount for when, amount in events if when > now - MINUTE_S - slack_s)


@settings(max_examples=150, deadline=None)
@given(arrivals, st.integers(1, 20), st.integers(40, 400), st.integers(1, 6))
def test_no_minute_and_no_moment_holds_more_than_the_limits(arrivals, requests, tokens, concurrency):
    clock = Clock()
    ledger, limits = Ledger(clock), Limits(requests, tokens, concurrency)
    entered: list[tuple[float, int]] = []
    used: list[tuple[float, int]] = []
    in_flight: list[InFlight] = []
    for gap_s, replica, prompt_tokens, output_tokens, length_s in arrivals:
        arrival = clock.now + gap_s
        for request in sorted(r for r in in_flight if r.end <= arrival):
            clock.now = request.end
            ledger.use(request.replica, "acme", request.output_tokens, 1, request.held_tokens)
            used.append((clock.now, request.output_tokens))
            in_flight.remove(request)
        clock.now = arrival
        held = sum(request.held_tokens for request in in_flight)
        expected = limits.expected(prompt_tokens, output_tokens)
        if ledger.ask(replica, "acme", limits, prompt_tokens, expected).is_granted:
            entered.append((arrival, 1))
            used.append((arrival, prompt_tokens))
            in_flight.append(InFlight(arrival + length_s, replica, expected, expected))
        else:
            # For a reason: nobody is refused while there is room, but for the minute's oldest slice.
            assert (
                within_a_minute(entered, arrival, 0.11) + 1 > requests
                or within_a_minute(used, arrival, 0.11) + held + prompt_tokens + expected > tokens
                or len(in_flight) + 1 > concurrency
            )
        assert within_a_minute(entered, arrival) <= requests
        assert within_a_minute(used, arrival) <= tokens
        assert len(in_flight) <= concurrency


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 3), st.integers(1, 5)), max_size=100))
def test_a_window_is_the_sum_of_its_minute_and_outlives_a_copy(steps):
    now, window, had = 0.0, Window(), []
    for gap_s, amount in steps:
        now += gap_s
        window.add(now, amount)
        had.append((now, amount))
        total = window.total(now)
        assert total >= sum(n for t, n in had if t > now - MINUTE_S)
        assert total <= sum(n for t, n in had if t > now - MINUTE_S - 0.11)
        copy = Window(window.entries(now), now + 5000)  # another clock
        assert copy.total(now + 5000) == total
    assert window.total(now + MINUTE_S + 0.2) == 0
    assert len(window.entries(now)) <= 601


def test_a_tenant_that_always_asks_gets_nearly_all_of_its_limit():
    clock = Clock()
    ledger = Ledger(clock)
    limits = Limits(requests=600)
    granted = []
    for step in range(5 * 600 * 4):  # four asks each tenth of a second for 20 minutes
        clock.now = 1000.0 + step / 10
        for replica in ("a", "b"):
            granted += [clock.now] * ledger.ask(replica, "acme", limits, 1, 0).is_granted
    minutes = (clock.now - 1000.0) / MINUTE_S
    assert 0.98 * 600 * minutes <= len(granted) <= 600 * (minutes + 1)
    for start in range(0, len(granted), 50):
        assert sum(granted[start] <= t < granted[start] + MINUTE_S for t in granted) <= 600
