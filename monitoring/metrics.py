"""The one table of metric names. Exporter, docs/metrics.md, dashboards and alerts are made from it or
held to it by tests.

Names follow Prometheus' rules and have no ':', which Ray's own exporter would refuse; base units stand in
them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["counter", "gauge", "histogram"]
Unit = Literal[
    "", "seconds", "bytes", "tokens", "requests", "blocks", "ratio", "hertz", "watts", "joules", "celsius"
]
Source = Literal["replica", "router", "gpu"]
"""Who exports it: each replica, each request router, or a replica that finds NVML and a GPU."""

# A fast engine's tokens come every few milliseconds: what matters there is whether it is 2 or 3.
ITL_BUCKETS_S = (
    0.0005, 0.001, 0.002, 0.003, 0.004, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15,
    0.25, 0.5, 1.0, 2.5, 5.0,
)  # fmt: skip
# Every built-in tier's deadline is a bound, so that the share within it is exact.
TTFT_BUCKETS_S = (
    0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75,
    1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0,
)  # fmt: skip
# Actual over predicted: a quarter of it to four times, finest around 1.
RATIO_BUCKETS = (0.25, 0.5, 0.67, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 4.0)
E2E_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0)
DECISION_BUCKETS_S = (0.00005, 0.0001, 0.0002, 0.0003, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.05)


@dataclass(frozen=True, slots=True)
class Metric:
    """One family.

    known: values of labels that are known beforehand. Where those of all labels are (a tier's come from the
        configuration), every series exists from the start, at 0: a rate then sees the first increment too.
    """

    name: str
    kind: Kind
    unit: Unit
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    source: Source = "replica"
    known: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def series(self) -> tuple[str, ...]:
        """Names of its samples."""
        if self.kind == "histogram":
            return tuple(f"{self.name}_{part}" for part in ("bucket", "sum", "count"))
        return (self.name,)


_TIER = ("tier",)

_REQUESTS = (
    Metric(
        "peregrine_requests_total",
        "counter",
        "requests",
        "Finished sequences. A request has several with n > 1 or with several prompts.",
        ("tier", "finish_reason"),
        known={"finish_reason": ("stop", "length", "abort")},
    ),
    Metric(
        "peregrine_refusals_total",
        "counter",
        "requests",
        "Requests refused at once (429): the tier's places were taken (inflight), its deadline could not be "
        "kept (deadline), or the router found no replica (router).",
        ("reason",),
        known={"reason": ("inflight", "deadline", "router")},
    ),
    Metric(
        "peregrine_ttft_deadlines_total",
        "counter",
        "requests",
        "First tokens, by whether they kept their tier's deadline. Attainment is yes over all, goodput the "
        "rate of yes.",
        ("tier", "kept"),
        known={"kept": ("yes", "no")},
    ),
    Metric(
        "peregrine_goodput_tokens_total",
        "counter",
        "tokens",
        "Output tokens of finished sequences whose first token kept its tier's deadline.",
        _TIER,
    ),
    Metric("peregrine_http_requests_total", "counter", "requests", "HTTP responses.", ("route", "status")),
    Metric(
        "peregrine_http_request_seconds",
        "histogram",
        "seconds",
        "From the first byte of a request to the last byte of its response.",
        ("route",),
        E2E_BUCKETS_S,
    ),
    Metric(
        "peregrine_requests_inflight", "gauge", "requests", "Requests between admission and their last byte."
    ),
    Metric("peregrine_requests_running", "gauge", "requests", "Sequences in the running batch."),
    Metric("peregrine_requests_waiting", "gauge", "requests", "Sequences queued in the engine."),
    Metric(
        "peregrine_requests_preempted",
        "gauge",
        "requests",
        "Of the queued sequences, those that ran before and gave up their KV blocks.",
    ),
    Metric("peregrine_waiting_tokens", "gauge", "tokens", "Prompt tokens not yet computed."),
    Metric(
        "peregrine_preemptions_total",
        "counter",
        "requests",
        "Times that a running sequence gave up its KV blocks to a more important or older one.",
    ),
)

_LATENCY = (
    Metric(
        "peregrine_ttft_seconds", "histogram", "seconds", "Arrival to first token.", _TIER, TTFT_BUCKETS_S
    ),
    Metric(
        "peregrine_itl_seconds",
        "histogram",
        "seconds",
        "Between neighbouring tokens of a sequence, seen where the engine hands them over.",
        _TIER,
        ITL_BUCKETS_S,
    ),
    Metric(
        "peregrine_tpot_seconds",
        "histogram",
        "seconds",
        "Mean time per output token after the first, one value per sequence.",
        _TIER,
        ITL_BUCKETS_S,
    ),
    Metric(
        "peregrine_queue_wait_seconds",
        "histogram",
        "seconds",
        "Arrival to first scheduling.",
        _TIER,
        TTFT_BUCKETS_S,
    ),
    Metric(
        "peregrine_prefill_seconds",
        "histogram",
        "seconds",
        "First scheduling to first token.",
        _TIER,
        TTFT_BUCKETS_S,
    ),
    Metric(
        "peregrine_decode_seconds", "histogram", "seconds", "First token to last token.", _TIER, E2E_BUCKETS_S
    ),
    Metric("peregrine_e2e_seconds", "histogram", "seconds", "Arrival to last token.", _TIER, E2E_BUCKETS_S),
)

_TOKENS = (
    Metric("peregrine_prompt_tokens_total", "counter", "tokens", "Prompt tokens of started sequences."),
    Metric(
        "peregrine_cached_tokens_total",
        "counter",
        "tokens",
        "Prompt tokens found in the prefix cache; over peregrine_prompt_tokens_total this is the hit rate.",
    ),
    Metric("peregrine_output_tokens_total", "counter", "tokens", "Tokens generated."),
    Metric(
        "peregrine_spec_decode_num_drafts_total",
        "counter",
        "",
        "Verifications of drafts; 1 + accepted / drafts is the mean number of tokens each brought.",
    ),
    Metric("peregrine_spec_decode_num_draft_tokens_total", "counter", "tokens", "Tokens drafted."),
    Metric(
        "peregrine_spec_decode_num_accepted_tokens_total", "counter", "tokens", "Drafted tokens accepted."
    ),
)

_TENANT = ("tenant",)

_TENANTS = (
    Metric(
        "peregrine_tenant_requests_total", "counter", "requests", "Requests admitted, by tenant.", _TENANT
    ),
    Metric(
        "peregrine_tenant_prompt_tokens_total",
        "counter",
        "tokens",
        "Prompt tokens of admitted requests, those found in the prefix cache included.",
        _TENANT,
    ),
    Metric(
        "peregrine_tenant_output_tokens_total",
        "counter",
        "tokens",
        "Tokens generated, over all choices.",
        _TENANT,
    ),
    Metric(
        "peregrine_tenant_refusals_total",
        "counter",
        "requests",
        "Requests refused to a tenant: a limit was reached (requests, tokens, concurrency), the model or "
        "tier is not for it, or the limits could not be checked (ledger).",
        ("tenant", "reason"),
        known={"reason": ("requests", "tokens", "concurrency", "model", "tier", "ledger")},
    ),
    Metric(
        "peregrine_tenant_ledger_connected",
        "gauge",
        "",
        "1 while the replica is connected to the ledger of the tenants' limits; at 0 it decides by its share "
        "of them. Always 0 without tenants.",
    ),
)

_ENGINE = (
    Metric("peregrine_engine_steps_total", "counter", "", "Steps of the engine."),
    Metric(
        "peregrine_engine_step_seconds",
        "histogram",
        "seconds",
        "Duration of a step, by whether it computed prompt tokens beside its decodes (mixed), alone "
        "(prefill), or none (decode).",
        ("kind",),
        ITL_BUCKETS_S,
        known={"kind": ("decode", "mixed", "prefill")},
    ),
    Metric(
        "peregrine_decode_floor_seconds",
        "gauge",
        "seconds",
        "What a decode step takes at least: bytes of the weights over the device's memory bandwidth. Reads "
        "of the KV cache are left out.",
    ),
    Metric(
        "peregrine_decode_floor_ratio",
        "gauge",
        "ratio",
        "The floor over the mean duration of the latest decode steps: 1 would be the memory's limit.",
    ),
    Metric(
        "peregrine_kv_blocks",
        "gauge",
        "blocks",
        "Blocks of the KV cache: held by sequences (used), kept for prefix hits (cached), or empty.",
        ("state",),
        known={"state": ("used", "cached", "empty")},
    ),
    Metric(
        "peregrine_kv_usage_ratio",
        "gauge",
        "ratio",
        "Share of the KV cache's blocks that sequences hold, 0 to 1.",
    ),
    Metric(
        "peregrine_kv_cache_info",
        "gauge",
        "",
        "Always 1; size of a block in tokens, and number of blocks (on any device: the name is that of the "
        "Gateway API's protocol).",
        ("block_size", "num_gpu_blocks"),
    ),
    Metric("peregrine_replica_ready", "gauge", "", "1 once the model is loaded and warm, until it drains."),
    Metric(
        "peregrine_replica_start_time_seconds",
        "gauge",
        "seconds",
        "When the replica's process began to serve, since the epoch. A change is a restart.",
    ),
    Metric(
        "peregrine_replica_info",
        "gauge",
        "",
        "Always 1; what the replica runs.",
        ("replica", "version", "model", "weight_format"),
    ),
)

_ROUTED = (
    Metric(
        "peregrine_route_predicted_ttft_seconds",
        "histogram",
        "seconds",
        "Time to first token as the router predicted it, for requests that have had theirs.",
        (),
        TTFT_BUCKETS_S,
    ),
    Metric(
        "peregrine_route_actual_ttft_seconds",
        "histogram",
        "seconds",
        "Time to first token of the same requests as it was.",
        (),
        TTFT_BUCKETS_S,
    ),
    Metric(
        "peregrine_route_ttft_ratio",
        "histogram",
        "ratio",
        "Time to first token as it was, over what the router predicted for the request.",
        (),
        RATIO_BUCKETS,
    ),
)

_ROUTER = (
    Metric(
        "peregrine_router_decisions_total",
        "counter",
        "requests",
        "Replicas chosen, by policy and by the reason that it gives.",
        ("policy", "reason"),
        source="router",
    ),
    Metric(
        "peregrine_router_refusals_total",
        "counter",
        "requests",
        "Requests for which no replica could be chosen: all are gated.",
        source="router",
    ),
    Metric(
        "peregrine_router_decision_seconds",
        "histogram",
        "seconds",
        "Passed time of a decision, reading the prompt included.",
        (),
        DECISION_BUCKETS_S,
        source="router",
    ),
    Metric(
        "peregrine_router_requests_inflight",
        "gauge",
        "requests",
        "Requests in the router's books, over all replicas.",
        source="router",
    ),
    Metric(
        "peregrine_router_stats_age_seconds",
        "gauge",
        "seconds",
        "Since the replica last reported its load; of the replica that is silent longest. They report four "
        "times a second.",
        source="router",
    ),
    Metric(
        "peregrine_router_replicas",
        "gauge",
        "",
        "Replicas that the cluster lists as running (listed), that requests may go to (routable), and that "
        "make no steps though they have work (stalled).",
        ("state",),
        source="router",
        known={"state": ("listed", "routable", "stalled")},
    ),
    Metric(
        "peregrine_router_target_replicas",
        "gauge",
        "",
        "Replicas that are to run at least: those configured, or the lower bound of autoscaling. 0 where "
        "nobody told the router.",
        source="router",
    ),
)

_GPU = (
    Metric(
        "peregrine_gpu_memory_used_bytes",
        "gauge",
        "bytes",
        "Memory in use on the GPU.",
        ("gpu",),
        source="gpu",
    ),
    Metric(
        "peregrine_gpu_memory_total_bytes", "gauge", "bytes", "Memory of the GPU.", ("gpu",), source="gpu"
    ),
    Metric(
        "peregrine_gpu_clock_hertz",
        "gauge",
        "hertz",
        "Clocks as they are now.",
        ("gpu", "clock"),
        source="gpu",
    ),
    Metric("peregrine_gpu_power_watts", "gauge", "watts", "Power drawn.", ("gpu",), source="gpu"),
    Metric(
        "peregrine_gpu_energy_joules_total",
        "counter",
        "joules",
        "Energy drawn since the driver was loaded.",
        ("gpu",),
        source="gpu",
    ),
    Metric(
        "peregrine_gpu_utilization_ratio",
        "gauge",
        "ratio",
        "Share of the time in which any kernel ran.",
        ("gpu",),
        source="gpu",
    ),
    Metric(
        "peregrine_gpu_temperature_celsius",
        "gauge",
        "celsius",
        "Temperature of the GPU.",
        ("gpu",),
        source="gpu",
    ),
    Metric(
        "peregrine_gpu_xid_errors_total",
        "counter",
        "",
        "Xid errors that the driver reported since the replica started; the number says which.",
        ("gpu", "xid"),
        source="gpu",
    ),
)

GROUPS: Mapping[str, tuple[Metric, ...]] = {
    "Requests": _REQUESTS,
    "Latency": _LATENCY,
    "Tokens": _TOKENS,
    "Tenants": _TENANTS,
    "Engine": _ENGINE,
    "Predictions, seen from the replica": _ROUTED,
    "Router": _ROUTER,
    "GPU": _GPU,
}

METRICS: Mapping[str, Metric] = {metric.name: metric for group in GROUPS.values() for metric in group}
