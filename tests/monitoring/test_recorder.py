"""The recorders: names from the table, counters that only grow, histograms that take many at once."""

import re

import pytest
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from engine import EngineStats, ModelInfo, RequestTimings, StepTimes
from monitoring import METRICS, Recorder, RouterRecorder
from monitoring.histogram import CountedHistogram

MODEL = ModelInfo("m", "llama", 1, 8192, 100, 2 * 10**9, "w4")


def stats(total: int, **kw: int) -> EngineStats:
    values = {
        "num_running": 1, "num_waiting": 2, "num_blocks": 10, "num_free_blocks": 6, "num_cached_blocks": 2,
        "num_waiting_tokens": 30, "total_steps": total, "total_prompt_tokens": total,
        "total_cached_tokens": 0,
        "total_output_tokens": total, "total_preemptions": 0, "last_step_s": 0.01,
    }  # fmt: skip
    return EngineStats(**{**values, **kw})


def samples(recorder: Recorder | RouterRecorder) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    text = recorder.exposition().decode()
    return {
        (s.name, tuple(sorted(s.labels.items()))): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
    }


@pytest.mark.parametrize(("recorder", "source"), [(Recorder(), "replica"), (RouterRecorder(), "router")])
def test_every_exposed_name_is_in_the_table_and_the_reverse(recorder, source):
    text = recorder.exposition().decode()
    exposed = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")}
    assert exposed == {name for name, metric in METRICS.items() if metric.source == source}


def test_names_follow_prometheus_rules_and_survive_rays_prefix():
    for name, metric in METRICS.items():
        assert re.fullmatch(r"peregrine_[a-z0-9_]*[a-z0-9]", name)
        assert re.fullmatch(r"[a-zA-Z_][a-zA-Z0-9_]*", f"ray_{name}")
        assert all(re.fullmatch(r"[a-z][a-z0-9_]*", label) for label in metric.labels)
        assert (metric.kind == "counter") == name.endswith("_total")
        assert (metric.kind == "histogram") == bool(metric.buckets)
        assert list(metric.buckets) == sorted(set(metric.buckets))
        if metric.unit in ("seconds", "bytes", "ratio", "hertz", "watts", "joules", "celsius"):
            assert name.removesuffix("_total").endswith(f"_{metric.unit}")
        assert set(metric.known) <= set(metric.labels)
        assert metric.help.endswith(".")


def test_buckets_are_fine_where_a_fast_engine_is():
    assert METRICS["peregrine_itl_seconds"].buckets[:7] == (0.0005, 0.001, 0.002, 0.003, 0.004, 0.005, 0.0075)


def test_the_series_that_are_known_are_there_before_anything_happens():
    found = samples(Recorder(("voice", "batch")))
    assert found["peregrine_ttft_deadlines_total", (("kept", "no"), ("tier", "voice"))] == 0
    assert found["peregrine_itl_seconds_count", (("tier", "batch"),)] == 0
    assert found["peregrine_refusals_total", (("reason", "deadline"),)] == 0


def test_counters_follow_totals_and_never_fall():
    recorder = Recorder()
    for total in (5, 9, 9, 7, 12):
        recorder.record_stats(stats(total), 3)
    found = samples(recorder)
    assert found["peregrine_output_tokens_total", ()] == 12
    assert found["peregrine_requests_inflight", ()] == 3
    assert found["peregrine_kv_blocks", (("state", "used"),)] == 4
    assert found["peregrine_kv_blocks", (("state", "cached"),)] == 2
    assert found["peregrine_kv_blocks", (("state", "empty"),)] == 4
    assert found["peregrine_kv_usage_ratio", ()] == 0.4


def test_speculation_is_counted_under_the_names_of_vllm():
    recorder = Recorder()
    recorder.record_stats(stats(5, total_drafts=2, total_draft_tokens=9, total_accepted_tokens=4), 0)
    recorder.record_stats(stats(6, total_drafts=3, total_draft_tokens=12, total_accepted_tokens=4), 0)
    found = samples(recorder)
    assert found["peregrine_spec_decode_num_drafts_total", ()] == 3
    assert found["peregrine_spec_decode_num_draft_tokens_total", ()] == 12
    assert found["peregrine_spec_decode_num_accepted_tokens_total", ()] == 4


def test_timings_fill_the_histograms_of_their_tier():
    recorder = Recorder()
    recorder.record_timings(
        RequestTimings("r", "stop", 5, 0, 3, 0.001, 0.02, 0.1, (0.03, 0.05), "voice", True)
    )
    recorder.record_timings(RequestTimings("s", "abort", 5, 0, 0, 0.001, None, 0.1, (), "voice"))
    recorder.record_timings(RequestTimings("t", "stop", 5, 0, 7, 0.001, 9.0, 9.1, (0.05,), "voice", False))
    found, tier = samples(recorder), (("tier", "voice"),)
    assert found["peregrine_ttft_seconds_count", tier] == 2
    assert found["peregrine_prefill_seconds_sum", tier] == pytest.approx(0.019 + 8.999)
    assert found["peregrine_decode_seconds_sum", tier] == pytest.approx(0.08 + 0.1)
    assert found["peregrine_queue_wait_seconds_count", tier] == 3
    assert found["peregrine_tpot_seconds_sum", tier] == pytest.approx(0.09)
    assert found["peregrine_requests_total", (("finish_reason", "abort"), ("tier", "voice"))] == 1
    assert found["peregrine_goodput_tokens_total", tier] == 3


def test_steps_are_taken_in_together_and_held_against_the_floor():
    recorder = Recorder()
    recorder.describe("r0", "1.0", MODEL, 16, 10, memory_bytes_per_s=1e12)
    gaps = {("voice", 0.004): 30, ("batch", 0.02): 2}
    recorder.record_steps(StepTimes(gaps, (("decode", 0.004), ("decode", 0.006), ("mixed", 0.02))))
    found = samples(recorder)
    assert found["peregrine_itl_seconds_count", (("tier", "voice"),)] == 30
    assert found["peregrine_itl_seconds_bucket", (("le", "0.004"), ("tier", "voice"))] == 30
    assert found["peregrine_itl_seconds_bucket", (("le", "0.003"), ("tier", "voice"))] == 0
    assert found["peregrine_engine_step_seconds_count", (("kind", "decode"),)] == 2
    assert found["peregrine_decode_floor_seconds", ()] == pytest.approx(0.002)
    assert found["peregrine_decode_floor_ratio", ()] == pytest.approx(0.4)
    assert found["peregrine_kv_cache_info", (("block_size", "16"), ("num_gpu_blocks", "10"))] == 1


def test_a_counted_histogram_reads_as_prometheus_own_does():
    own, theirs = CollectorRegistry(), CollectorRegistry()
    counted = CountedHistogram("x_seconds", "Help.", ("a",), (0.1, 0.5, 1.0), own)
    reference = Histogram("x_seconds", "Help.", ("a",), buckets=(0.1, 0.5, 1.0), registry=theirs)
    for value, count in ((0.1, 3), (0.25, 1), (0.5, 2), (7.0, 4)):
        counted.observe(value, ("b",), count)
        for _ in range(count):
            reference.labels("b").observe(value)
    assert generate_latest(own) == generate_latest(theirs)


def test_a_routers_reasons_make_few_series():
    recorder = RouterRecorder(target_replicas=2)
    for reason in ("lowest predicted latency, 512 prompt tokens cached", "lowest predicted latency"):
        recorder.record_decision("latency", reason, 0.0002)
    recorder.record_decision("latency", "least busy of two from 3 near ties", 0.0002)
    recorder.record_refusal(0.0001)
    recorder.record_fleet(num_listed=2, num_routable=1, num_stalled=1, num_inflight=9, stats_age_s=0.3)
    found = samples(recorder)
    labels = (("policy", "latency"), ("reason", "lowest predicted latency"))
    assert found["peregrine_router_decisions_total", labels] == 2
    assert found["peregrine_router_decisions_total", (labels[0], ("reason", "least busy of two"))] == 1
    assert found["peregrine_router_decision_seconds_count", ()] == 4
    assert found["peregrine_router_replicas", (("state", "routable"),)] == 1
    assert found["peregrine_router_target_replicas", ()] == 2
