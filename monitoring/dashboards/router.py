"""Where requests go and whether the router foresees what happens to them."""

from monitoring.dashboards.spec import QUERY as q
from monitoring.dashboards.spec import Dashboard, Panel, Row, Target

_RATIO = "peregrine_route_ttft_ratio"
_PREDICTED, _ACTUAL = (f"peregrine_route_{kind}_ttft_seconds" for kind in ("predicted", "actual"))
_DECISION = "peregrine_router_decision_seconds"

ROUTER = Dashboard(
    "peregrine-router",
    "Peregrine / Router",
    "Decisions, predicted against actual latency, refusals, what the router knows of the replicas.",
    (
        Row(
            "Decisions",
            (
                Panel(
                    "Decisions by reason",
                    "A second, over all routers.",
                    "reqps",
                    (
                        Target(
                            q.sum_rate("peregrine_router_decisions_total", by=("policy", "reason")),
                            "{{policy}}: {{reason}}",
                        ),
                    ),
                ),
                Panel(
                    "Time of a decision",
                    "Passed time, reading the prompt included.",
                    "s",
                    (
                        Target(q.quantile(0.5, _DECISION), "p50"),
                        Target(q.quantile(0.99, _DECISION), "p99"),
                    ),
                ),
                Panel(
                    "Refusals",
                    "A second: no replica for it (router), too late (deadline), too many (inflight).",
                    "reqps",
                    (
                        Target(q.sum_rate("peregrine_router_refusals_total"), "by routers"),
                        Target(q.sum_rate("peregrine_refusals_total", by=("reason",)), "{{reason}}"),
                    ),
                ),
            ),
        ),
        Row(
            "Predictions",
            (
                Panel(
                    "TTFT, predicted and actual",
                    "Means over the same requests.",
                    "s",
                    (Target(q.mean(_PREDICTED), "predicted"), Target(q.mean(_ACTUAL), "actual")),
                ),
                Panel(
                    "TTFT p99, predicted and actual",
                    "Over the same requests.",
                    "s",
                    (
                        Target(q.quantile(0.99, _PREDICTED), "predicted"),
                        Target(q.quantile(0.99, _ACTUAL), "actual"),
                    ),
                ),
                Panel(
                    "Actual over predicted",
                    "1 is right, 2 took twice as long as foreseen.",
                    "short",
                    tuple(Target(q.quantile(p, _RATIO), f"p{p * 100:g}") for p in (0.1, 0.5, 0.9)),
                ),
            ),
        ),
        Row(
            "Books",
            (
                Panel(
                    "Replicas",
                    "Listed by the cluster, open for requests, without steps; and how many there should be.",
                    "short",
                    (
                        Target(
                            f"max by (state) ({q.series('peregrine_router_replicas')})",
                            "{{state}}",
                        ),
                        Target(f"max({q.series('peregrine_router_target_replicas')})", "target"),
                    ),
                ),
                Panel(
                    "Age of the oldest report",
                    "Since the most silent replica said how it is; by router. Reports come every 0.25 s.",
                    "s",
                    (Target(q.series("peregrine_router_stats_age_seconds"), "{{instance}}"),),
                    limits=(2, 5),
                ),
                Panel(
                    "Requests in the books",
                    "By router; every router knows of every request.",
                    "short",
                    (Target(q.series("peregrine_router_requests_inflight"), "{{instance}}"),),
                ),
            ),
        ),
    ),
)
