"""From plain statistics to Prometheus metrics."""

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from engine import EngineStats, RequestTimings
from monitoring.metrics import METRICS


class Recorder:
    """One replica's metrics, in a registry of its own.

    Not thread-safe beyond what prometheus_client is: call it from the event loop.
    """

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._metrics: dict[str, Any] = {}
        for metric in METRICS.values():
            arguments: dict[str, Any] = {"registry": self._registry, "labelnames": metric.labels}
            match metric.kind:
                case "counter":
                    made: Any = Counter(metric.name, metric.help, **arguments)
                case "gauge":
                    made = Gauge(metric.name, metric.help, **arguments)
                case "histogram":
                    made = Histogram(metric.name, metric.help, buckets=metric.buckets, **arguments)
            self._metrics[metric.name] = made
        self._totals: dict[str, float] = {}

    def record_stats(self, stats: EngineStats, num_inflight: int) -> None:
        """Take in a snapshot of the engine."""
        gauges = {
            "peregrine_requests_inflight": num_inflight,
            "peregrine_requests_running": stats.num_running,
            "peregrine_requests_waiting": stats.num_waiting,
            "peregrine_waiting_tokens": stats.num_waiting_tokens,
            "peregrine_engine_step_seconds": stats.last_step_s,
        }
        for name, value in gauges.items():
            self._metrics[name].set(value)
        blocks = self._metrics["peregrine_kv_blocks"]
        blocks.labels("used").set(stats.num_blocks - stats.num_free_blocks)
        blocks.labels("cached").set(stats.num_cached_blocks)
        blocks.labels("empty").set(stats.num_free_blocks - stats.num_cached_blocks)
        totals = {
            "peregrine_prompt_tokens_total": stats.total_prompt_tokens,
            "peregrine_cached_tokens_total": stats.total_cached_tokens,
            "peregrine_output_tokens_total": stats.total_output_tokens,
            "peregrine_preemptions_total": stats.total_preemptions,
            "peregrine_spec_decode_num_drafts_total": stats.total_drafts,
            "peregrine_spec_decode_num_draft_tokens_total": stats.total_draft_tokens,
            "peregrine_spec_decode_num_accepted_tokens_total": stats.total_accepted_tokens,
            "peregrine_engine_steps_total": stats.total_steps,
        }
        for name, total in totals.items():
            # A counter takes increments; a late snapshot must not take it back.
            if (increment := total - self._totals.get(name, 0)) > 0:
                self._metrics[name].inc(increment)
                self._totals[name] = total

    def record_timings(self, timings: RequestTimings) -> None:
        """Take in a finished sequence."""
        self._metrics["peregrine_requests_total"].labels(timings.finish_reason).inc()
        self._metrics["peregrine_queue_wait_seconds"].observe(timings.queue_wait_s)
        self._metrics["peregrine_e2e_seconds"].observe(timings.e2e_s)
        if timings.ttft_s is not None:
            self._metrics["peregrine_ttft_seconds"].observe(timings.ttft_s)
        for gap in timings.itl_s:
            self._metrics["peregrine_itl_seconds"].observe(gap)
        if timings.itl_s:
            self._metrics["peregrine_tpot_seconds"].observe(sum(timings.itl_s) / len(timings.itl_s))

    def record_http(self, route: str, status: int, seconds: float) -> None:
        """Take in a finished HTTP exchange. `route` is the route's template, never the raw path."""
        self._metrics["peregrine_http_requests_total"].labels(route, str(status)).inc()
        self._metrics["peregrine_http_request_seconds"].labels(route).observe(seconds)

    def record_refusal(self, reason: str) -> None:
        self._metrics["peregrine_refusals_total"].labels(reason).inc()

    def record_deadline(self, tier: str, is_kept: bool) -> None:
        """Take in a request's first token."""
        self._metrics["peregrine_ttft_deadlines_total"].labels(tier, "yes" if is_kept else "no").inc()

    def record_prediction(self, actual_over_predicted: float) -> None:
        """Take in a first token whose time the router had predicted."""
        self._metrics["peregrine_route_ttft_ratio"].observe(actual_over_predicted)

    def exposition(self) -> bytes:
        """The registry in Prometheus' text format."""
        return generate_latest(self._registry)
