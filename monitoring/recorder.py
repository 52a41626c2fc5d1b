"""From the engine's plain statistics to a replica's metrics."""

import math
import time
from collections.abc import Iterable

from prometheus_client import CollectorRegistry

from engine import EngineStats, ModelInfo, RequestTimings, StepTimes
from monitoring.instruments import Instruments


class Recorder:
    """One replica's metrics, in a registry of its own.

    Nothing here is called for a token: the engine adds up its steps, and what it has is taken in twice a
    second. All methods but `exposition` belong to one thread.
    """

    def __init__(self, tiers: Iterable[str] = (), tenants: Iterable[str] = ()) -> None:
        """tiers, tenants: whose series are there from the start."""
        labels = {"tier": tuple(tiers), "tenant": tuple(tenants)}
        self._metrics = Instruments("replica", {label: values for label, values in labels.items() if values})
        self._metrics.set("peregrine_replica_start_time_seconds", time.time())
        self._floor_s = math.nan

    @property
    def registry(self) -> CollectorRegistry:
        return self._metrics.registry

    def describe(
        self,
        replica: str,
        version: str,
        model: ModelInfo,
        block_size: int,
        num_blocks: int,
        memory_bytes_per_s: float | None,
    ) -> None:
        """What runs here.

        block_size, num_blocks: of the KV cache; a block's size is in tokens.
        memory_bytes_per_s: bandwidth of the device's memory; None where it is unknown.
        """
        self._metrics.set("peregrine_kv_cache_info", 1, str(block_size), str(num_blocks))
        self._metrics.set("peregrine_replica_info", 1, replica, version, model.name, model.weight_format)
        if memory_bytes_per_s:
            self._floor_s = model.weight_bytes / memory_bytes_per_s
            self._metrics.set("peregrine_decode_floor_seconds", self._floor_s)

    def record_ready(self, is_ready: bool) -> None:
        """The model is loaded and warm, or the replica leaves."""
        self._metrics.set("peregrine_replica_ready", is_ready)

    def record_stats(self, stats: EngineStats, num_inflight: int) -> None:
        """Take in a snapshot of the engine."""
        num_used = stats.num_blocks - stats.num_free_blocks
        gauges = {
            "peregrine_requests_inflight": num_inflight,
            "peregrine_requests_running": stats.num_running,
            "peregrine_requests_waiting": stats.num_waiting,
            "peregrine_requests_preempted": stats.num_preempted,
            "peregrine_waiting_tokens": stats.num_waiting_tokens,
            "peregrine_kv_usage_ratio": num_used / max(1, stats.num_blocks),
        }
        for name, value in gauges.items():
            self._metrics.set(name, value)
        blocks = {
            "used": num_used,
            "cached": stats.num_cached_blocks,
            "empty": stats.num_free_blocks - stats.num_cached_blocks,
        }
        for state, num_blocks in blocks.items():
            self._metrics.set("peregrine_kv_blocks", num_blocks, state)
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
            self._metrics.advance(name, total)

    def record_steps(self, times: StepTimes) -> None:
        """Take in the steps since the last call, and the gaps between the tokens that they brought."""
        for (tier, gap_s), num_tokens in times.gaps.items():
            self._metrics.observe("peregrine_itl_seconds", gap_s, tier, count=num_tokens)
        for kind, step_s in times.steps:
            self._metrics.observe("peregrine_engine_step_seconds", step_s, kind)
        decodes = [step_s for kind, step_s in times.steps if kind == "decode"]
        if decodes and sum(decodes) > 0 and not math.isnan(self._floor_s):
            ratio = self._floor_s * len(decodes) / sum(decodes)
            self._metrics.set("peregrine_decode_floor_ratio", ratio)

    def record_timings(self, timings: RequestTimings) -> None:
        """Take in a finished sequence."""
        metrics, tier = self._metrics, timings.tier
        metrics.inc("peregrine_requests_total", tier, timings.finish_reason)
        metrics.observe("peregrine_queue_wait_seconds", timings.queue_wait_s, tier)
        metrics.observe("peregrine_e2e_seconds", timings.e2e_s, tier)
        if timings.ttft_s is None:
            return
        metrics.observe("peregrine_ttft_seconds", timings.ttft_s, tier)
        metrics.observe("peregrine_prefill_seconds", timings.ttft_s - timings.queue_wait_s, tier)
        metrics.observe("peregrine_decode_seconds", timings.e2e_s - timings.ttft_s, tier)
        if timings.itl_s:
            metrics.observe("peregrine_tpot_seconds", sum(timings.itl_s) / len(timings.itl_s), tier)
        if timings.is_in_time:
            metrics.inc("peregrine_goodput_tokens_total", tier, by=timings.num_output_tokens)

    def record_http(self, route: str, status: int, seconds: float) -> None:
        """Take in a finished HTTP exchange. `route` is the route's template, never the raw path."""
        self._metrics.inc("peregrine_http_requests_total", route, str(status))
        self._metrics.observe("peregrine_http_request_seconds", seconds, route)

    def record_refusal(self, reason: str) -> None:
        self._metrics.inc("peregrine_refusals_total", reason)

    def record_deadline(self, tier: str, is_kept: bool) -> None:
        """Take in a request's first token."""
        self._metrics.inc("peregrine_ttft_deadlines_total", tier, "yes" if is_kept else "no")

    def record_prediction(self, predicted_s: float, actual_s: float) -> None:
        """Take in a first token whose time the router had predicted."""
        self._metrics.observe("peregrine_route_predicted_ttft_seconds", predicted_s)
        self._metrics.observe("peregrine_route_actual_ttft_seconds", actual_s)
        self._metrics.observe("peregrine_route_ttft_ratio", actual_s / predicted_s)

    def record_tenant_request(self, tenant: str, prompt_tokens: int) -> None:
        """Take in an admitted request."""
        self._metrics.inc("peregrine_tenant_requests_total", tenant)
        self._metrics.inc("peregrine_tenant_prompt_tokens_total", tenant, by=prompt_tokens)

    def record_tenant_output(self, tenant: str, num_tokens: int) -> None:
        self._metrics.inc("peregrine_tenant_output_tokens_total", tenant, by=num_tokens)

    def record_tenant_refusal(self, tenant: str, reason: str) -> None:
        self._metrics.inc("peregrine_tenant_refusals_total", tenant, reason)

    def record_ledger(self, is_connected: bool) -> None:
        """Whether the ledger of the tenants' limits can be asked."""
        self._metrics.set("peregrine_tenant_ledger_connected", is_connected)

    def exposition(self) -> bytes:
        """The registry in Prometheus' text format."""
        return self._metrics.exposition()
