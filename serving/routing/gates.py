"""Reasons for which a replica gets no request, however fast it looks."""

import numpy as np
import numpy.typing as npt

from serving.routing.ledger import FloatArray

BoolArray = npt.NDArray[np.bool_]


class ErrorGate:
    """A circuit breaker per replica.

    Closed, it counts failures and outcomes, both forgotten with `half_life_s`. It opens at `min_failures`
    failures that are at least `max_failure_share` of the outcomes. After a pause it is half open: one request
    at a time may probe. A probe that finishes closes it; one that fails opens it again with the pause
    doubled, up to `max_pause_s`; one that is aborted says nothing and leaves the place to another. (The
    states are those of Nygard, "Release It!", 2007.)
    """

    def __init__(
        self,
        max_replicas: int,
        *,
        min_failures: float = 2.0,
        max_failure_share: float = 0.25,
        half_life_s: float = 10.0,
        pause_s: float = 1.0,
        max_pause_s: float = 60.0,
    ) -> None:
        self._min_failures, self._max_share = min_failures, max_failure_share
        self._half_life_s, self._first_pause_s, self._max_pause_s = half_life_s, pause_s, max_pause_s
        self._failures = np.zeros(max_replicas)
        self._outcomes = np.zeros(max_replicas)
        self._counted_at_s = np.zeros(max_replicas)
        self._pause_s = np.full(max_replicas, pause_s)
        self._is_open = np.zeros(max_replicas, np.bool_)
        self._retry_at_s = np.zeros(max_replicas)
        self._is_probing = np.zeros(max_replicas, np.bool_)
        self._probes: dict[str, int] = {}  # request -> slot

    def admits(self, num_slots: int, now_s: float) -> BoolArray:
        """Where a request may go. [num_slots]"""
        can_probe = (self._retry_at_s[:num_slots] <= now_s) & ~self._is_probing[:num_slots]
        return ~self._is_open[:num_slots] | can_probe

    def waits_s(self, num_slots: int, now_s: float) -> FloatArray:
        """Seconds until the next probe is allowed; 0 where the gate is closed. [num_slots]"""
        return np.where(self._is_open[:num_slots], np.maximum(0.0, self._retry_at_s[:num_slots] - now_s), 0.0)

    def dispatched(self, request_id: str, slot: int) -> None:
        if self._is_open[slot]:
            self._probes[request_id] = slot
            self._is_probing[slot] = True

    def finished(self, request_id: str, slot: int, now_s: float) -> None:
        if self._release(request_id):
            self._is_open[slot] = False
            self._failures[slot] = self._outcomes[slot] = 0.0
        elif not self._is_open[slot]:
            self._decay(slot, now_s)
            self._outcomes[slot] += 1
            if self._outcomes[slot] >= 2 / self._max_share:  # a good while without an incident
                self._pause_s[slot] = self._first_pause_s

    def failed(self, request_id: str, slot: int, now_s: float) -> None:
        if self._release(request_id):
            self._pause_s[slot] = min(2 * self._pause_s[slot], self._max_pause_s)
            self._retry_at_s[slot] = now_s + self._pause_s[slot]
        elif not self._is_open[slot]:  # failures of what was sent before it opened are no news
            self._decay(slot, now_s)
            self._failures[slot] += 1
            self._outcomes[slot] += 1
            if self._failures[slot] >= self._min_failures and (
                self._failures[slot] >= self._max_share * self._outcomes[slot]
            ):
                self._is_open[slot] = True
                self._retry_at_s[slot] = now_s + self._pause_s[slot]

    def aborted(self, request_id: str) -> None:
        self._release(request_id)

    def reset(self, slot: int) -> None:
        """For a new replica in the slot."""
        for request_id in [r for r, s in self._probes.items() if s == slot]:
            self._release(request_id)
        self._failures[slot] = self._outcomes[slot] = self._retry_at_s[slot] = 0.0
        self._pause_s[slot] = self._first_pause_s
        self._is_open[slot] = False

    def _release(self, request_id: str) -> bool:
        slot = self._probes.pop(request_id, None)
        if slot is None:
            return False
        self._is_probing[slot] = False
        return True

    def _decay(self, slot: int, now_s: float) -> None:
        kept = 0.5 ** (max(0.0, now_s - self._counted_at_s[slot]) / self._half_life_s)
        self._failures[slot] *= kept
        self._outcomes[slot] *= kept
        self._counted_at_s[slot] = now_s


def kv_admits(
    kv_tokens: FloatArray, needed_tokens: FloatArray, capacity_tokens: FloatArray, max_share: float
) -> BoolArray:
    """Where the request fits below `max_share` of the KV cache. [num_slots]

    An empty replica always admits: what does not fit there is refused by the engine, for good.
    """
    fits: BoolArray = (kv_tokens + needed_tokens <= max_share * capacity_tokens) | (kv_tokens <= 0)
    return fits
