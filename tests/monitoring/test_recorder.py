"""The recorder: names from the table, counters that only grow."""

from prometheus_client.parser import text_string_to_metric_families

from engine import EngineStats, RequestTimings
from monitoring import METRICS, Recorder


def stats(total: int, **kw: int) -> EngineStats:
    values = {
        "num_running": 1, "num_waiting": 2, "num_blocks": 10, "num_free_blocks": 6, "num_cached_blocks": 2,
        "num_waiting_tokens": 30, "total_steps": total, "total_prompt_tokens": total,
        "total_cached_tokens": 0,
        "total_output_tokens": total, "total_preemptions": 0, "last_step_s": 0.01,
    }  # fmt: skip
    return EngineStats(**{**values, **kw})


def samples(recorder: Recorder) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    text = recorder.exposition().decode()
    return {
        (s.name, tuple(sorted(s.labels.items()))): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
    }


def test_every_exposed_name_is_in_the_table_and_the_reverse():
    text = Recorder().exposition().decode()
    exposed = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")}
    exposed = {name for name in exposed if not name.endswith("_created")}
    assert exposed == set(METRICS)
    assert all(name.startswith("peregrine_") for name in METRICS)


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


def test_speculation_is_counted_under_the_names_of_vllm():
    recorder = Recorder()
    recorder.record_stats(stats(5, total_drafts=2, total_draft_tokens=9, total_accepted_tokens=4), 0)
    recorder.record_stats(stats(6, total_drafts=3, total_draft_tokens=12, total_accepted_tokens=4), 0)
    found = samples(recorder)
    assert found["peregrine_spec_decode_num_drafts_total", ()] == 3
    assert found["peregrine_spec_decode_num_draft_tokens_total", ()] == 12
    assert found["peregrine_spec_decode_num_accepted_tokens_total", ()] == 4


def test_timings_fill_the_histograms():
    recorder = Recorder()
    recorder.record_timings(RequestTimings("r", "stop", 5, 0, 3, 0.001, 0.02, 0.1, (0.03, 0.05)))
    recorder.record_timings(RequestTimings("s", "abort", 5, 0, 0, 0.001, None, 0.1, ()))
    found = samples(recorder)
    assert found["peregrine_ttft_seconds_count", ()] == 1
    assert found["peregrine_itl_seconds_count", ()] == 2
    assert found["peregrine_tpot_seconds_sum", ()] == 0.04
    assert found["peregrine_requests_total", (("finish_reason", "abort"),)] == 1
