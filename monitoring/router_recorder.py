"""A request router's metrics."""

import re

from prometheus_client import CollectorRegistry

from monitoring.instruments import Instruments

# Reasons say what was found in the request's case ("from 3 near ties, 512 tokens cached"); a label may not.
_PARTICULARS = re.compile(r",.*| from \d.*")


class RouterRecorder:
    """One router's metrics, in a registry of its own. Not thread-safe: call it from the event loop."""

    def __init__(self, target_replicas: int = 0) -> None:
        self._metrics = Instruments("router")
        self.set_target(target_replicas)

    @property
    def registry(self) -> CollectorRegistry:
        return self._metrics.registry

    def set_target(self, num_replicas: int) -> None:
        """How many replicas are to run at least; 0 where it is not known."""
        self._metrics.set("peregrine_router_target_replicas", num_replicas)

    def record_decision(self, policy: str, reason: str, seconds: float) -> None:
        self._metrics.inc("peregrine_router_decisions_total", policy, _PARTICULARS.sub("", reason))
        self._metrics.observe("peregrine_router_decision_seconds", seconds)

    def record_refusal(self, seconds: float) -> None:
        """No replica could be chosen."""
        self._metrics.inc("peregrine_router_refusals_total")
        self._metrics.observe("peregrine_router_decision_seconds", seconds)

    def record_fleet(
        self, *, num_listed: int, num_routable: int, num_stalled: int, num_inflight: int, stats_age_s: float
    ) -> None:
        """Take in the router's books as they are. stats_age_s: of the report that is oldest."""
        for state, number in (("listed", num_listed), ("routable", num_routable), ("stalled", num_stalled)):
            self._metrics.set("peregrine_router_replicas", number, state)
        self._metrics.set("peregrine_router_requests_inflight", num_inflight)
        self._metrics.set("peregrine_router_stats_age_seconds", stats_age_s)

    def exposition(self) -> bytes:
        """The registry in Prometheus' text format."""
        return self._metrics.exposition()
