"""The usual policies, to measure the latency policy against. They see the same books."""

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from serving.routing.costs import CostModel
from serving.routing.fleet import Fleet
from serving.routing.ledger import Flight
from serving.routing.prefix_index import PrefixIndex
from serving.routing.requests import Outcome, Overloaded, RoutedRequest
from serving.routing.router import Choice

Slots = npt.NDArray[np.intp]


class _NoBooks:
    """Needs nothing but the ledger's counters."""

    def dispatched(self, flight: Flight) -> None:
        pass

    def measured(self, slot: int, cost: CostModel) -> None:
        pass

    def holds(self, slot: int, block_hashes: Sequence[int]) -> None:
        pass

    def closed(self, flight: Flight, outcome: Outcome, output_tokens: int, now_s: float) -> None:
        pass

    def replica_removed(self, slot: int) -> None:
        pass


class _CountingPolicy(_NoBooks, ABC):
    """Picks among the replicas that may take the request."""

    def choose(self, request: RoutedRequest, fleet: Fleet, now_s: float) -> Choice | Overloaded:
        slots = np.flatnonzero(fleet.eligible(request))
        if not len(slots):
            return Overloaded(1.0, "every replica is draining or unhealthy")
        return self._pick(slots, request, fleet)

    @abstractmethod
    def _pick(self, slots: Slots, request: RoutedRequest, fleet: Fleet) -> Choice: ...


class RoundRobin(_CountingPolicy):
    """Each in turn."""

    name = "round_robin"

    def __init__(self) -> None:
        self._last = -1

    def _pick(self, slots: Slots, request: RoutedRequest, fleet: Fleet) -> Choice:
        later = slots[slots > self._last]
        self._last = int(later[0] if len(later) else slots[0])
        return Choice(self._last, "next in turn")


class _DrawingPolicy(_CountingPolicy):
    def __init__(self, rng: random.Random) -> None:
        self._rng = rng


class LeastRequests(_DrawingPolicy):
    """The fewest requests in flight, ties at random."""

    name = "least_requests"

    def _pick(self, slots: Slots, request: RoutedRequest, fleet: Fleet) -> Choice:
        counts = fleet.ledger.in_flight[slots]
        fewest = slots[counts == counts.min()]
        return Choice(int(fewest[self._rng.randrange(len(fewest))]), "fewest requests in flight")


class PowerOfTwo(_DrawingPolicy):
    """Two at random, the one with fewer requests in flight (Mitzenmacher, IEEE TPDS 12(10), 2001)."""

    name = "power_of_two"

    def _pick(self, slots: Slots, request: RoutedRequest, fleet: Fleet) -> Choice:
        return Choice(_less_busy_of_two(slots, fleet, self._rng), "fewer in flight of two")


class PrefixAffinity(_DrawingPolicy):
    """The rule of Ray Serve 2.60's PrefixCacheAffinityRouter, with a finite threshold.

    While the requests in flight differ by at most `max_imbalance`, a prompt of which some replica knows at
    least `min_match_share` goes to the one that knows most; everything else goes to the less busy of two.
    (Ray's own default has no limit to the imbalance, and sends misses to the replica with the smallest tree.)
    """

    name = "prefix_affinity"

    def __init__(
        self,
        rng: random.Random,
        max_replicas: int = 1024,
        max_prefix_blocks: int = 16_384,
        max_imbalance: int = 8,
        min_match_share: float = 0.1,
    ) -> None:
        super().__init__(rng)
        self._prefixes = PrefixIndex(max_replicas, max_prefix_blocks)
        self._max_imbalance, self._min_match_share = max_imbalance, min_match_share

    def _pick(self, slots: Slots, request: RoutedRequest, fleet: Fleet) -> Choice:
        counts = fleet.ledger.in_flight[slots]
        matched = self._prefixes.match(request.block_hashes, fleet.num_slots)[slots]
        longest = int(matched.max())
        is_known = longest >= self._min_match_share * request.prompt_tokens and longest > 0
        if is_known and counts.max() - counts.min() <= self._max_imbalance:
            holders = slots[matched == longest]
            slot = int(holders[fleet.ledger.in_flight[holders].argmin()])
            return Choice(slot, "longest known prefix", saved_tokens=longest)
        return Choice(_less_busy_of_two(slots, fleet, self._rng), "fewer in flight of two")

    def dispatched(self, flight: Flight) -> None:
        self._prefixes.add(flight.slot, flight.request.block_hashes)

    def holds(self, slot: int, block_hashes: Sequence[int]) -> None:
        self._prefixes.add(slot, block_hashes)

    def replica_removed(self, slot: int) -> None:
        self._prefixes.clear(slot)


def _less_busy_of_two(slots: Slots, fleet: Fleet, rng: random.Random) -> int:
    if len(slots) == 1:
        return int(slots[0])
    first, second = (int(slots[i]) for i in rng.sample(range(len(slots)), 2))
    counts = fleet.ledger.in_flight
    return first if counts[first] <= counts[second] else second
