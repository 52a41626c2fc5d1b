"""Routes requests and keeps the books: the same for every policy, so that policies differ in their choice
alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from serving.routing.costs import CostModel
from serving.routing.fleet import Fleet
from serving.routing.ledger import Flight
from serving.routing.requests import Decision, Outcome, Overloaded, ReplicaStats, RoutedRequest


@dataclass(frozen=True, slots=True)
class Choice:
    """A policy's answer, in slots. Predictions are in seconds, `predicted_*` corrected by the residual,
    `raw_*` not.
    """

    slot: int
    reason: str
    runner_up: int | None = None
    saved_tokens: int = 0
    expected_output_tokens: int = 0
    predicted_ttft_s: float | None = None
    predicted_tpot_s: float | None = None
    raw_ttft_s: float | None = None
    raw_tpot_s: float | None = None


class Policy(Protocol):
    """Chooses a replica, and hears of what the books register."""

    name: str

    def choose(self, request: RoutedRequest, fleet: Fleet, now_s: float) -> Choice | Overloaded: ...

    def dispatched(self, flight: Flight) -> None: ...

    def measured(self, slot: int, cost: CostModel) -> None: ...

    def holds(self, slot: int, block_hashes: Sequence[int]) -> None: ...

    def closed(self, flight: Flight, outcome: Outcome, output_tokens: int, now_s: float) -> None: ...

    def replica_removed(self, slot: int) -> None: ...


class Router:
    """One policy over one fleet. Not thread-safe; the owner calls it from one thread or event loop.

    clock: seconds, monotonic; the clock that `ReplicaStats.published_at_s` is on too.
    """

    def __init__(self, policy: Policy, clock: Callable[[], float], max_replicas: int = 1024) -> None:
        self.policy = policy
        self.fleet = Fleet(max_replicas)
        self._clock = clock

    def add_replica(self, replica_id: str) -> None:
        """A known replica keeps everything that is known of it. Raises FleetFullError."""
        self.fleet.add(replica_id)

    def remove_replica(self, replica_id: str) -> list[RoutedRequest]:
        """Forget a replica; returns the requests that were on it. Raises UnknownReplicaError."""
        slot, now_s = self.fleet.slot(replica_id), self._clock()
        flights = self.fleet.ledger.close_slot(slot, now_s)
        for flight in flights:
            self.policy.closed(flight, Outcome.REPLICA_LOST, 0, now_s)
        self.fleet.remove(replica_id)
        self.policy.replica_removed(slot)
        return [flight.request for flight in flights]

    def set_draining(self, replica_id: str, is_draining: bool) -> None:
        """Raises UnknownReplicaError."""
        self.fleet.is_draining[self.fleet.slot(replica_id)] = is_draining

    def set_healthy(self, replica_id: str, is_healthy: bool) -> None:
        """The result of a health check. Touches no counter. Raises UnknownReplicaError."""
        self.fleet.is_healthy[self.fleet.slot(replica_id)] = is_healthy

    def report(self, replica_id: str, stats: ReplicaStats) -> None:
        """Statistics that a replica published. Raises UnknownReplicaError."""
        self.fleet.report(replica_id, stats)

    def measured(self, replica_id: str, cost: CostModel) -> None:
        """A replica said how fast it is, and what it can hold. Raises UnknownReplicaError."""
        self.policy.measured(self.fleet.slot(replica_id), cost)

    def holds(self, replica_id: str, block_hashes: Sequence[int]) -> None:
        """A replica said that these prefixes are in its cache. Raises UnknownReplicaError."""
        self.policy.holds(self.fleet.slot(replica_id), block_hashes)

    def route(self, request: RoutedRequest) -> Decision | Overloaded:
        """Choose a replica and enter the request in its books in one go, so that the next choice sees it.

        Raises ValueError if a request of that id is open already.
        """
        if self.fleet.ledger.find(request.request_id) is not None:
            raise ValueError(f"request {request.request_id!r} is on a replica already")
        now_s = self._clock()
        if len(self.fleet) == 0:
            return Overloaded(1.0, "no replica")
        choice = self.policy.choose(request, self.fleet, now_s)
        if isinstance(choice, Overloaded):
            return choice
        flight = Flight(
            request,
            choice.slot,
            choice.saved_tokens,
            choice.expected_output_tokens,
            now_s,
            choice.raw_ttft_s,
            choice.raw_tpot_s,
        )
        self.fleet.ledger.open(flight)
        self.policy.dispatched(flight)
        return Decision(
            self.fleet.replica_id(choice.slot),
            choice.reason,
            None if choice.runner_up is None else self.fleet.replica_id(choice.runner_up),
            choice.predicted_ttft_s,
            choice.predicted_tpot_s,
            choice.saved_tokens,
            choice.expected_output_tokens,
        )

    def adopt(self, request: RoutedRequest, replica_id: str, expected_output_tokens: int = 0) -> bool:
        """Enter a request that arrived at a replica for which this router did not choose it: another router
        did, or the proxy tried again elsewhere.

        Where it was before counts as failed. False if it is on that replica already. Raises
        UnknownReplicaError.
        """
        slot, now_s = self.fleet.slot(replica_id), self._clock()
        before = self.fleet.ledger.find(request.request_id)
        if before is not None:
            if before.slot == slot:
                return False
            self._close(request.request_id, Outcome.FAILED, 0)
        expected = before.expected_output_tokens if before else expected_output_tokens
        flight = Flight(request, slot, 0, expected, now_s)
        self.fleet.ledger.open(flight)
        self.policy.dispatched(flight)
        return True

    def first_token(self, request_id: str) -> bool:
        """False, as for the other events, if it changed nothing: the request is unknown or past that
        already.
        """
        return self.fleet.ledger.first_token(request_id, self._clock()) is not None

    def finished(self, request_id: str, output_tokens: int) -> bool:
        return self._close(request_id, Outcome.FINISHED, output_tokens)

    def aborted(self, request_id: str) -> bool:
        return self._close(request_id, Outcome.ABORTED, 0)

    def failed(self, request_id: str) -> bool:
        return self._close(request_id, Outcome.FAILED, 0)

    def _close(self, request_id: str, outcome: Outcome, output_tokens: int) -> bool:
        now_s = self._clock()
        flight = self.fleet.ledger.close(request_id, now_s)
        if flight is None:
            return False
        self.policy.closed(flight, outcome, output_tokens, now_s)
        return True
