"""Several routers over one fleet, as the proxy asks them."""

import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Protocol

from deploy.bench.router_clock import Clock
from serving.routing import CostModel, Decision, Overloaded, Policy, ReplicaStats, RoutedRequest, Router


class Routing(Protocol):
    """What the simulation wants of a router, or of several."""

    def add_replica(self, replica_id: str) -> None: ...

    def measured(self, replica_id: str, cost: CostModel) -> None: ...

    def report(self, replica_id: str, stats: ReplicaStats) -> None: ...

    def route(self, request: RoutedRequest) -> Decision | Overloaded: ...

    def first_token(self, request_id: str) -> bool: ...

    def finished(self, request_id: str, output_tokens: int) -> bool: ...

    def aborted(self, request_id: str) -> bool: ...

    def failed(self, request_id: str) -> bool: ...


class RouterGroup:
    """Asked in turn. Each enters its own choices in its books at once; of the others' choices, and of what
    becomes of any request, all hear late.

    lag_s: mean of that delay, drawn for each router and event from an exponential distribution. A choice is
        never overtaken by what becomes of it.
    """

    def __init__(
        self,
        policies: list[Policy],
        clock: Clock,
        max_replicas: int,
        lag_s: float,
        rng: random.Random,
    ) -> None:
        self.routers = [Router(policy, clock, max_replicas) for policy in policies]
        self._clock, self._lag_s, self._rng = clock, lag_s, rng
        self._turn = -1
        self._heard_at_s: dict[tuple[int, str], float] = {}  # when a router has heard what was said last

    def add_replica(self, replica_id: str) -> None:
        for router in self.routers:
            router.add_replica(replica_id)

    def measured(self, replica_id: str, cost: CostModel) -> None:
        for router in self.routers:
            router.measured(replica_id, cost)

    def report(self, replica_id: str, stats: ReplicaStats) -> None:
        for router in self.routers:
            router.report(replica_id, stats)

    def route(self, request: RoutedRequest) -> Decision | Overloaded:
        self._turn = (self._turn + 1) % len(self.routers)
        decision = self.routers[self._turn].route(request)
        if isinstance(decision, Decision):
            chosen, output = decision.replica_id, decision.expected_output_tokens
            # Replicas say how many prompt tokens they have to compute.
            own_tokens = max(1, request.prompt_tokens - decision.saved_tokens)
            told = replace(request, prompt_tokens=own_tokens)
            for number, router in enumerate(self.routers):
                if number != self._turn:
                    self._tell(number, request.request_id, partial(router.adopt, told, chosen, output))
        return decision

    def first_token(self, request_id: str) -> bool:
        return self._tell_all(request_id, lambda router: router.first_token(request_id))

    def finished(self, request_id: str, output_tokens: int) -> bool:
        return self._tell_all(request_id, lambda router: router.finished(request_id, output_tokens))

    def aborted(self, request_id: str) -> bool:
        return self._tell_all(request_id, lambda router: router.aborted(request_id))

    def failed(self, request_id: str) -> bool:
        return self._tell_all(request_id, lambda router: router.failed(request_id))

    def _tell_all(self, request_id: str, event: Callable[[Router], bool]) -> bool:
        for number, router in enumerate(self.routers):
            self._tell(number, request_id, partial(event, router))
        return True

    def _tell(self, number: int, request_id: str, event: Callable[[], bool]) -> None:
        lag_s = self._rng.expovariate(1 / self._lag_s) if self._lag_s else 0.0
        at_s = max(self._clock.now_s + lag_s, self._heard_at_s.get((number, request_id), 0.0))
        self._heard_at_s[number, request_id] = at_s
        self._clock.after(at_s - self._clock.now_s, event)
