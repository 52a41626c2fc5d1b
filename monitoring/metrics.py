"""The one table of metric names. Dashboards, alerts and the chart are held to it by tests."""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["counter", "gauge", "histogram"]

# From a millisecond up: on one GPU the interesting differences lie below 100 ms.
LATENCY_BUCKETS_S = (
    0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.065, 0.08, 0.1, 0.15, 0.2, 0.3,
    0.5, 0.75, 1.0, 2.0, 5.0, 10.0, 30.0,
)  # fmt: skip
# Actual over predicted: a quarter of it to four times, finest around 1.
RATIO_BUCKETS = (0.25, 0.5, 0.67, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 4.0)
E2E_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0)


@dataclass(frozen=True, slots=True)
class Metric:
    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("peregrine_requests_total", "counter", "Finished sequences.", ("finish_reason",)),
        Metric("peregrine_refusals_total", "counter", "Requests refused by admission.", ("reason",)),
        Metric(
            "peregrine_ttft_deadlines_total",
            "counter",
            "First tokens, by whether they kept their tier's deadline.",
            ("tier", "kept"),
        ),
        Metric(
            "peregrine_route_ttft_ratio",
            "histogram",
            "Time to first token as it was, over what the router predicted for the request.",
            (),
            RATIO_BUCKETS,
        ),
        Metric("peregrine_http_requests_total", "counter", "HTTP responses.", ("route", "status")),
        Metric(
            "peregrine_http_request_seconds",
            "histogram",
            "From the first byte of a request to the last byte of its response.",
            ("route",),
            E2E_BUCKETS_S,
        ),
        Metric("peregrine_requests_inflight", "gauge", "Requests between admission and their last byte."),
        Metric("peregrine_requests_running", "gauge", "Sequences in the running batch."),
        Metric("peregrine_requests_waiting", "gauge", "Sequences queued in the engine."),
        Metric("peregrine_waiting_tokens", "gauge", "Prompt tokens not yet computed."),
        Metric(
            "peregrine_queue_wait_seconds",
            "histogram",
            "Arrival to first scheduling.",
            (),
            LATENCY_BUCKETS_S,
        ),
        Metric("peregrine_ttft_seconds", "histogram", "Arrival to first token.", (), LATENCY_BUCKETS_S),
        Metric("peregrine_itl_seconds", "histogram", "Between neighbouring tokens.", (), LATENCY_BUCKETS_S),
        Metric(
            "peregrine_tpot_seconds",
            "histogram",
            "Mean time per output token after the first, one value per sequence.",
            (),
            LATENCY_BUCKETS_S,
        ),
        Metric("peregrine_e2e_seconds", "histogram", "Arrival to last token.", (), E2E_BUCKETS_S),
        Metric("peregrine_prompt_tokens_total", "counter", "Prompt tokens of started sequences."),
        Metric("peregrine_cached_tokens_total", "counter", "Prompt tokens served by a prefix hit."),
        Metric("peregrine_output_tokens_total", "counter", "Tokens generated."),
        Metric("peregrine_preemptions_total", "counter", "Sequences that gave up their KV blocks."),
        Metric(
            "peregrine_spec_decode_num_drafts_total",
            "counter",
            "Verifications of drafts; 1 + accepted / drafts is the mean number of tokens each brought.",
        ),
        Metric("peregrine_spec_decode_num_draft_tokens_total", "counter", "Tokens drafted."),
        Metric("peregrine_spec_decode_num_accepted_tokens_total", "counter", "Drafted tokens accepted."),
        Metric("peregrine_engine_steps_total", "counter", "Steps of the engine."),
        Metric("peregrine_engine_step_seconds", "gauge", "Duration of the latest step."),
        Metric("peregrine_kv_blocks", "gauge", "Blocks of the KV cache, by state.", ("state",)),
    )
}
