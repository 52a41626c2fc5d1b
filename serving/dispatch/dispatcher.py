"""Answers the proxy and listens to the replicas: one Router, and what its events need around it."""

import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from monitoring import RouterRecorder
from serving.dispatch.headers import FLIGHT, REFUSE, ROUTE, WATCHED, FlightNote, describe
from serving.dispatch.messages import Arrived, Ended, FirstToken, Held, Hello, Message, Report
from serving.dispatch.prompts import routed_request
from serving.dispatch.settings import INITIAL_COST
from serving.routing import CostModel, Overloaded, ReplicaStats, RoutedRequest, Router
from serving.routing.prefix_index import PrefixIndex
from serving.tiers import Tier

# The proxy connects within its own timeout of 5 s, retries included a little later: what no replica has seen
# by then was given up by its client.
ARRIVAL_TIMEOUT_S = 20.0
# Work on a replica, and no step for so long: nothing more is sent there until it moves again.
STALL_S = 5.0
_LEAST_COST_S = 1e-9  # where a measurement came out as nothing


@dataclass(frozen=True, slots=True)
class Answer:
    """Where the proxy is to send the request, and the headers that tell the replica of it."""

    replica_id: str
    headers: dict[str, str]


@dataclass(slots=True)
class _Progress:
    total_steps: int
    since_s: float


@dataclass
class Dispatcher:
    """Plain: no Ray, no sockets. All calls come from one event loop.

    reply_to: host:port where replicas report to.
    new_replica_delay_s: a replica is chosen only that long after it was first listed, when the proxy must
        know it too; at once where less than half of the replicas could be chosen otherwise.
    """

    router: Router
    tiers: Mapping[str, Tier]
    clock: Callable[[], float]
    recorder: RouterRecorder = field(default_factory=RouterRecorder)
    reply_to: str = ""
    new_replica_delay_s: float = 0.0
    _unrecorded: list[tuple[str, float]] = field(default_factory=list)
    """Reasons, and how many seconds each decision took."""
    _listed_at_s: dict[str, float] = field(default_factory=dict)
    _hellos: dict[str, Hello] = field(default_factory=dict)
    """Of the replicas that are connected."""
    _costs: dict[str, CostModel] = field(default_factory=dict)
    """As they said last."""
    _gone: set[str] = field(default_factory=set)
    """Listed still, but their connection broke: dead, most likely."""
    _unseen: dict[str, float] = field(default_factory=dict)
    """Flights that no replica has reported yet -> when they are given up, in order."""
    _orphans: dict[str, tuple[float, RoutedRequest]] = field(default_factory=dict)
    """Of replicas that went: they may arrive elsewhere."""
    _progress: dict[str, _Progress] = field(default_factory=dict)
    _reported_at_s: dict[str, float] = field(default_factory=dict)
    """Of replicas whose connection stands."""

    def route(self, body: bytes, num_bytes: int) -> Answer | None:
        """None where there is no replica at all. `body` may be the beginning of `num_bytes` bytes."""
        start_s = self.clock()
        self.sweep()
        flight_id = uuid.uuid4().hex
        request = routed_request(flight_id, body, num_bytes, self.tiers)
        decision = self.router.route(request)
        if isinstance(decision, Overloaded):
            self.recorder.record_refusal(self.clock() - start_s)
            # The refusal has to be the API's: a replica writes it.
            candidates = self.router.fleet.replica_ids() or list(self._listed_at_s)
            if not candidates:
                return None
            chosen = candidates[int(flight_id, 16) % len(candidates)]
            return Answer(chosen, {REFUSE: f"{decision.predicted_wait_s:.3f}"})
        self._unseen[flight_id] = self.clock() + ARRIVAL_TIMEOUT_S
        route = describe(self.router.policy.name, decision)
        own_tokens = max(1, request.prompt_tokens - decision.saved_tokens)
        note = FlightNote(
            flight_id,
            own_tokens,
            decision.expected_output_tokens,
            request.priority,
            self.reply_to,
            PrefixIndex.entries(request.block_hashes),
        )
        headers = {FLIGHT: note.write(), ROUTE: route, WATCHED: "?1"}
        self._unrecorded.append((decision.reason, self.clock() - start_s))
        return Answer(decision.replica_id, headers)

    def record_decisions(self) -> None:
        """Count what `route` decided since the last call: the answer need not wait for that."""
        for reason, seconds in self._unrecorded:
            self.recorder.record_decision(self.router.policy.name, reason, seconds)
        self._unrecorded.clear()

    def list_replicas(self, replica_ids: Iterable[str]) -> None:
        """Those that run, as the cluster's controller knows them."""
        now_s, listed = self.clock(), set(replica_ids)
        for replica_id in listed - self._listed_at_s.keys():
            self._listed_at_s[replica_id] = now_s
        for replica_id in self._listed_at_s.keys() - listed:
            del self._listed_at_s[replica_id]
            self._gone.discard(replica_id)
            self._remove(replica_id)
        self._admit_listed()

    @property
    def is_waiting_for_replicas(self) -> bool:
        """Some are listed that have not connected, or not anew: they may not know of this router."""
        return not self._listed_at_s.keys() <= self._hellos.keys()

    def connected(self, hello: Hello) -> None:
        self._hellos[hello.replica_id] = hello
        if hello.replica_id in self._gone:
            self._gone.discard(hello.replica_id)
            self._admit_listed()

    def disconnected(self, replica_id: str) -> None:
        """Its connection broke. A kernel closes those of a killed process at once, long before any health
        check.
        """
        self._hellos.pop(replica_id, None)
        self._costs.pop(replica_id, None)
        if replica_id in self._listed_at_s:
            self._gone.add(replica_id)
        self._reported_at_s.pop(replica_id, None)
        self._remove(replica_id)
        self._admit_listed()

    def receive(self, replica_id: str, message: Message) -> None:
        match message:
            case Arrived():
                self._arrived(message, replica_id)
            case FirstToken(flight_id):
                self.router.first_token(flight_id)
            case Ended(flight_id, reason, output_tokens):
                self._unseen.pop(flight_id, None)
                if not self._is_on(flight_id, replica_id):
                    return  # it moved on, or was never here
                if reason == "finished":
                    self.router.finished(flight_id, output_tokens)
                elif reason == "failed":
                    self.router.failed(flight_id)
                else:
                    self.router.aborted(flight_id)
            case Held(prefixes):
                self._admit_proven(replica_id)
                if replica_id in self.router.fleet:
                    self.router.holds(replica_id, PrefixIndex.with_entries(prefixes))
            case Report():
                self._report(replica_id, message)
            case Hello():
                raise ValueError("Hello comes first and once")

    def sweep(self) -> None:
        """Forget what no event will come for."""
        now_s = self.clock()
        while self._unseen and next(iter(self._unseen.values())) <= now_s:
            flight_id = next(iter(self._unseen))
            del self._unseen[flight_id]
            self.router.aborted(flight_id)
        while self._orphans and next(iter(self._orphans.values()))[0] <= now_s:
            del self._orphans[next(iter(self._orphans))]
        if len(self.router.fleet) + len(self._gone) < len(self._listed_at_s):
            self._admit_listed()

    def counters(self) -> dict[str, int]:
        """Sums of the ledger's counters over all replicas; all zero when nothing is in flight."""
        ledger = self.router.fleet.ledger
        return {
            "flights": len(ledger),
            "in_flight": int(ledger.in_flight.sum()),
            "active_decodes": int(ledger.active_decodes.sum()),
            "pending_prefill": int(ledger.pending_prefill.sum()),
            "expected_output": int(ledger.expected_output.sum()),
            "saved_tokens": int(ledger.saved_tokens.sum()),
            "kv_tokens": int(ledger.kv_tokens.sum()),
            "unseen": len(self._unseen),
        }

    def record_fleet(self) -> None:
        """Show the books as they are."""
        now_s, fleet = self.clock(), self.router.fleet
        ids = fleet.replica_ids()
        num_stalled = sum(not fleet.is_healthy[fleet.slot(i)] for i in ids)
        self.recorder.record_fleet(
            num_listed=len(self._listed_at_s),
            num_routable=len(ids) - num_stalled,
            num_stalled=num_stalled,
            num_inflight=len(fleet.ledger),
            stats_age_s=now_s - min(self._reported_at_s.values(), default=now_s),
        )

    def _admit_listed(self) -> None:
        now_s, fleet = self.clock(), self.router.fleet
        for replica_id, listed_at_s in self._listed_at_s.items():
            is_settled = now_s - listed_at_s >= self.new_replica_delay_s
            is_needed = 2 * len(fleet) < len(self._listed_at_s)
            if replica_id not in fleet and replica_id not in self._gone and (is_settled or is_needed):
                self._admit(replica_id)

    def _admit_proven(self, replica_id: str) -> None:
        """The replica has had requests: the proxy knows it."""
        is_listed = replica_id in self._listed_at_s and replica_id not in self._gone
        if is_listed and replica_id not in self.router.fleet:
            self._admit(replica_id)

    def _admit(self, replica_id: str) -> None:
        self.router.add_replica(replica_id)
        if (cost := self._costs.get(replica_id)) is not None:
            self.router.measured(replica_id, cost)

    def _remove(self, replica_id: str) -> None:
        self._progress.pop(replica_id, None)
        if replica_id in self.router.fleet:
            deadline = self.clock() + ARRIVAL_TIMEOUT_S
            for request in self.router.remove_replica(replica_id):
                self._unseen.pop(request.request_id, None)
                self._orphans[request.request_id] = (deadline, request)

    def _arrived(self, arrived: Arrived, replica_id: str) -> None:
        flight_id = arrived.flight_id
        self._unseen.pop(flight_id, None)
        _, orphan = self._orphans.pop(flight_id, (0.0, None))
        self._admit_proven(replica_id)
        if replica_id not in self.router.fleet:
            self.router.failed(flight_id)  # not where it was sent, and not on the books where it is
            return
        flight = self.router.fleet.ledger.find(flight_id)
        known = flight.request if flight else orphan
        request = known or RoutedRequest(
            flight_id,
            arrived.prompt_tokens,
            block_hashes=PrefixIndex.with_entries(arrived.prefixes),
            priority=arrived.priority,
        )
        self.router.adopt(request, replica_id, arrived.expected_output_tokens)

    def _is_on(self, flight_id: str, replica_id: str) -> bool:
        flight = self.router.fleet.ledger.find(flight_id)
        return flight is not None and self.router.fleet.replica_id(flight.slot) == replica_id

    def _report(self, replica_id: str, report: Report) -> None:
        now_s = self.clock()
        self._reported_at_s[replica_id] = now_s
        if (cost := _cost_of(self._hellos.get(replica_id), report)) is not None:
            self._costs[replica_id] = cost
        if replica_id not in self.router.fleet:
            return
        if cost is not None:
            self.router.measured(replica_id, cost)
        waiting, running = report.num_waiting_tokens, report.num_running
        self.router.report(replica_id, ReplicaStats(now_s, waiting, running, report.kv_tokens))
        progress = self._progress.get(replica_id)
        in_flight = self.router.fleet.ledger.in_flight[self.router.fleet.slot(replica_id)]
        if progress is None or progress.total_steps != report.total_steps or in_flight == 0:
            self._progress[replica_id] = _Progress(report.total_steps, now_s)
            self.router.set_healthy(replica_id, True)
        elif now_s - progress.since_s > STALL_S:
            self.router.set_healthy(replica_id, False)


def _cost_of(hello: Hello | None, report: Report) -> CostModel | None:
    """None as long as the replica has measured nothing."""
    if hello is None or report.cost is None:
        return None
    cost = report.cost
    return CostModel(
        step_base_s=max(cost.base_s, _LEAST_COST_S),
        step_per_active_s=cost.per_decode_s,
        # Left to the residuals: between neighbouring steps it moves with the sequences.
        step_per_kv_token_s=0.0,
        prefill_step_s=cost.prefill_step_s,
        prefill_token_s=max(cost.prefill_token_s, _LEAST_COST_S),
        chunk_tokens=hello.chunk_tokens,
        max_num_seqs=hello.max_num_seqs,
        kv_capacity_tokens=hello.kv_capacity_tokens,
        overhead_s=INITIAL_COST.overhead_s,
    )
