"""What a replica remembers of the last minutes, and what several of them add up to."""

import random

import pytest

from engine import ModelInfo
from serving.status.activity import MAX_RECENT, SERIES_S, WINDOW_S, Activity
from serving.status.histogram import Histogram
from serving.status.overview import overview
from serving.status.snapshot import Snapshot
from serving.telemetry.exchange import Exchange, Generation
from serving.tiers import TIERS

START = 1_000_000.0
MODEL = ModelInfo("m", "Llama", 1000, 4096, 100, 500, "w4")


class Clock:
    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> float:
        return self.now


def exchange(
    ttft_s: float | None = 0.1, tier: str = "agent", status: int = 200, tokens: int = 11
) -> Exchange:
    done = Exchange("id", "POST", arrival_s=50.0, replica="r0", route="/v1/completions")
    done.status, done.ended_s = status, 53.0
    made = done.generation = Generation("text_completion", "m", tier, TIERS[tier].ttft_s, True)
    if ttft_s is not None:
        made.first_token_s = 50.0 + ttft_s
        made.last_token_s = made.first_token_s + 1.0
        made.num_prompt_tokens, made.num_output_tokens, made.is_complete = 7, tokens, True
    return done


def snapshot(activity: Activity, name: str = "r0", **rest) -> Snapshot:
    ttft, itl, tiers = activity.window()
    values = {
        "replica": name, "taken_at": activity._clock(), "started_at": activity.started_at,
        "condition": "ready", "model": MODEL, "num_inflight": 1, "num_running": 2, "num_waiting": 3,
        "kv_tokens": 1600, "kv_used_tokens": 400, "kv_dtype": "auto",
        "tokens_by_second": activity.tokens_by_second, "ttft": dict(ttft.counts), "itl": dict(itl.counts),
        "tiers": dict(tiers), "recent": activity.recent,
    }  # fmt: skip
    return Snapshot(**{**values, **rest})


def view(*snapshots: Snapshot, now: float):
    return overview(snapshots, TIERS, "1", now, needs_api_key=False)


def test_percentiles_are_within_two_percent_also_when_merged():
    rng = random.Random(1)
    values = sorted(rng.lognormvariate(-4, 1) for _ in range(5000))
    parts = [Histogram(), Histogram()]
    for number, value in enumerate(values):
        parts[number % 2].add(value)
    whole = Histogram.merged(p.counts for p in parts)
    assert whole.total == 5000
    for share in (0.5, 0.9, 0.99):
        exact = values[int(share * 5000) - 1]
        assert whole.quantile_s(share) == pytest.approx(exact, rel=0.021)
    assert Histogram().quantile_s(0.5) is None


def test_first_tokens_count_by_tier_and_window():
    activity = Activity(clock := Clock())
    activity.record(exchange(0.1))
    activity.record(exchange(0.9))  # agent's is due after 0.5 s
    activity.record(exchange(None, status=429))
    activity.record(exchange(None, status=500))
    activity.record(exchange(None, status=400))  # the client's own fault: no first token was due
    agent = next(t for t in view(snapshot(activity), now=clock.now).tiers if t.tier == "agent")
    assert (agent.kept, agent.late, agent.refused, agent.failed) == (1, 1, 1, 1)
    assert agent.attainment == 0.25
    clock.now += WINDOW_S + 10
    later = view(snapshot(activity), now=clock.now)
    assert next(t for t in later.tiers if t.tier == "agent").attainment is None
    assert later.ttft_ms.p50 is None
    assert [t.tier for t in later.tiers] == ["voice", "copilot", "agent", "default", "batch"]


def test_tokens_are_added_up_by_the_second_over_replicas():
    clock = Clock()
    activities = [Activity(clock), Activity(clock)]
    for second in range(20):
        for activity in activities:
            activity.sample(100 * second)
        clock.now += 1
    now = clock.now
    whole = view(*(snapshot(a, f"r{i}") for i, a in enumerate(activities)), now=now)
    assert whole.tokens_per_s == 200
    assert [r.tokens_per_s for r in whole.replicas] == [100, 100]
    assert len(whole.tokens_per_s_series) * whole.series_step_s == SERIES_S
    assert whole.tokens_per_s_series[-8:] == [200] * 8
    assert whole.tokens_per_s_series[0] == 0
    assert (whole.running, whole.waiting, whole.kv_tokens, whole.kv_used_tokens) == (4, 6, 3200, 800)
    assert whole.model.bits_per_weight == 4.0


def test_a_counter_that_starts_anew_makes_no_tokens():
    activity = Activity(Clock())
    activity.sample(1000)
    activity.sample(5)
    activity.sample(8)
    assert sum(activity.tokens_by_second.values()) == 3


def test_gaps_and_recent_requests_are_bounded():
    activity = Activity(clock := Clock())
    for _ in range(1000):
        clock.now += 1
        activity.record(exchange())
        activity.record_gaps([(0.005, 3)])
        activity.sample(int(clock.now))
    assert len(activity.recent) == MAX_RECENT
    assert len(activity.tokens_by_second) <= SERIES_S + 3
    assert len(activity._slices) == WINDOW_S // 10
    shown = view(snapshot(activity), now=clock.now)
    assert shown.itl_ms.p50 == pytest.approx(5, rel=0.02)
    assert len(shown.recent) == MAX_RECENT
    assert shown.recent[0].ended_at == clock.now
    assert shown.recent[0].tokens_per_s == 10
    assert shown.recent[0].ttft_ms == 100


def test_a_replica_that_says_nothing_is_silent():
    clock = Clock()
    old = snapshot(Activity(clock), "old")
    clock.now += 6
    new = snapshot(Activity(clock), "new")
    conditions = {r.replica: r.condition for r in view(old, new, now=clock.now).replicas}
    assert conditions == {"old": "silent", "new": "ready"}
