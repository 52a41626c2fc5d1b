"""The replicas that a router knows: slots, flags, the ledger and the last statistics."""

from dataclasses import dataclass, field

import numpy as np

from serving.routing.gates import BoolArray
from serving.routing.ledger import FloatArray, Ledger
from serving.routing.requests import ReplicaStats, RoutedRequest

STATS_TRUSTED_S = 1.0


class UnknownReplicaError(LookupError):
    """No replica of that id is known."""


class FleetFullError(RuntimeError):
    """More replicas than the router was built for."""


@dataclass
class Fleet:
    """Replicas by slot: a structure of arrays, so that a decision is a few vector operations.

    A slot is used again after its replica is gone; the lowest free one is taken, which keeps the arrays
    short.
    """

    max_replicas: int
    ledger: Ledger = field(init=False)
    is_live: BoolArray = field(init=False)  # [slots], a replica is there
    is_draining: BoolArray = field(init=False)
    is_healthy: BoolArray = field(init=False)
    num_slots: int = 0  # slots in use are below it

    def __post_init__(self) -> None:
        if self.max_replicas < 1:
            raise ValueError(f"max_replicas must be at least 1, got {self.max_replicas}")
        size = self.max_replicas
        self.ledger = Ledger(size)
        self.is_live, self.is_draining, self.is_healthy = (np.zeros(size, np.bool_) for _ in range(3))
        self._ids: list[str | None] = [None] * size
        self._slots: dict[str, int] = {}
        self._published_at_s = np.full(size, -np.inf)
        # [prompt tokens, decodes, KV tokens] x slots, work of other routers: what the replica reported beyond
        # our own books when the report came, never below 0.
        self._foreign = np.zeros((3, size))

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, replica_id: str) -> bool:
        return replica_id in self._slots

    def slot(self, replica_id: str) -> int:
        """Raises UnknownReplicaError."""
        try:
            return self._slots[replica_id]
        except KeyError:
            raise UnknownReplicaError(replica_id) from None

    def replica_id(self, slot: int) -> str:
        replica_id = self._ids[slot]
        if replica_id is None:
            raise UnknownReplicaError(f"slot {slot}")
        return replica_id

    def replica_ids(self) -> list[str]:
        return list(self._slots)

    def add(self, replica_id: str) -> bool:
        """Raises FleetFullError. False, and no change, where the replica is known already."""
        if replica_id in self._slots:
            return False
        if len(self._slots) == self.max_replicas:
            raise FleetFullError(f"the router was built for {self.max_replicas} replicas")
        slot = self._ids.index(None)
        self._ids[slot], self._slots[replica_id] = replica_id, slot
        self.is_live[slot] = self.is_healthy[slot] = True
        self.is_draining[slot] = False
        self._published_at_s[slot] = -np.inf
        self.num_slots = max(self.num_slots, slot + 1)
        return True

    def remove(self, replica_id: str) -> int:
        """The slot that became free. Raises UnknownReplicaError."""
        slot = self.slot(replica_id)
        del self._slots[replica_id]
        self._ids[slot] = None
        self.is_live[slot] = False
        while self.num_slots and not self.is_live[self.num_slots - 1]:
            self.num_slots -= 1
        return slot

    def report(self, replica_id: str, stats: ReplicaStats) -> None:
        """Take in a replica's statistics. Raises UnknownReplicaError.

        The ledger stays as it is: a report is older than the router's last dispatches. Only its excess
        over the books is used, for `STATS_TRUSTED_S`, as the work of other routers.
        """
        slot, ledger = self.slot(replica_id), self.ledger
        if stats.published_at_s < self._published_at_s[slot]:
            return
        self._published_at_s[slot] = stats.published_at_s
        # Requests past their first token that do not run gave way, and wait with all of their tokens again.
        # They are taken to be twice as long as the mean: what is left over must be others' work, or all
        # urgent requests would avoid, until the next report, who has just made room for some.
        num_preempted = max(0, ledger.active_decodes[slot] - stats.active_decodes)
        mean_tokens = ledger.kv_tokens[slot] / max(1, ledger.in_flight[slot])
        waiting = stats.pending_prefill_tokens - 2 * num_preempted * mean_tokens
        self._foreign[:, slot] = (
            max(0, waiting - ledger.pending_prefill[slot]),
            max(0, stats.active_decodes - ledger.active_decodes[slot]),
            max(0, stats.kv_tokens - ledger.kv_tokens[slot]),
        )

    def eligible(self, request: RoutedRequest) -> BoolArray:
        """Live, healthy, not draining, and none that failed this request if there are others. [num_slots]"""
        n = self.num_slots
        can_serve = self.is_live[:n] & self.is_healthy[:n] & ~self.is_draining[:n]
        if request.failed_on:
            untried = can_serve.copy()
            untried[[self._slots[i] for i in request.failed_on if i in self._slots]] = False
            if untried.any():
                return untried
        return can_serve

    def foreign(self, now_s: float) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Prompt tokens, decodes and KV tokens beyond the ledger's; 0 where the report is old. [num_slots]
        each
        """
        n = self.num_slots
        is_fresh = self._published_at_s[:n] >= now_s - STATS_TRUSTED_S
        prefill, active, kv = self._foreign[:, :n] * is_fresh
        return prefill, active, kv
