"""Series under which each alert fires, and under which it must not, in promtool's notation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

Series = Mapping[str, str]
_JOB = {"job": "p"}
_INSTANCE = {"job": "p", "instance": "a:1"}
_TIER = {"job": "p", "tier": "voice"}


@dataclass(frozen=True)
class Case:
    """fires, silent: alternatives, each a set of series. labels: of the alert, without its severity."""

    alert: str
    fires: Sequence[Series]
    silent: Sequence[Series]
    labels: Mapping[str, str] = field(default_factory=dict)
    at: str = "30m"
    interval: str = "1m"


def _deadlines(kept: str, late: str) -> Series:
    name = "peregrine_ttft_deadlines_total"
    return {
        f'{name}{{job="p",instance="a:1",tier="voice",kept="yes"}}': kept,
        f'{name}{{job="p",instance="a:1",tier="voice",kept="no"}}': late,
    }


def _gaps(within: str, all_of_them: str) -> Series:
    name = "peregrine_itl_seconds"
    return {
        f'{name}_bucket{{job="p",instance="a:1",tier="voice",le="0.05"}}': within,
        f'{name}_count{{job="p",instance="a:1",tier="voice"}}': all_of_them,
    }


def _of(values: Mapping[str, str], labels: str = "") -> Series:
    """Series of one instance."""
    return {f'{name}{{job="p",instance="a:1"{labels}}}': value for name, value in values.items()}


def _books(routable: str, target: str) -> Series:
    return {
        **_of({"peregrine_router_replicas": routable}, ',state="routable"'),
        **_of({"peregrine_router_target_replicas": target}),
    }


def _predictions(actual: str, predicted: str, count: str) -> Series:
    return _of(
        {
            "peregrine_route_actual_ttft_seconds_sum": actual,
            "peregrine_route_predicted_ttft_seconds_sum": predicted,
            "peregrine_route_ttft_ratio_count": count,
        }
    )


def _http(**statuses: str) -> Series:
    name = "peregrine_http_requests_total"
    route = "/v1/chat/completions"
    return {
        f'{name}{{job="p",instance="a:1",route="{route}",status="{status[1:]}"}}': values
        for status, values in statuses.items()
    }


def _refusals(values: str) -> Series:
    return {**_http(_200="0+100x60"), **_of({"peregrine_refusals_total": values}, ',reason="deadline"')}


CASES = (
    Case(
        "PeregrineTtftBudgetBurnsFast",
        fires=[_deadlines("0+80x130", "0+20x130")],
        silent=[
            _deadlines("0+99x130", "0+1x130"),
            _deadlines("0+10x60 600+100x60", "0+10x60 600+0x60"),  # it is over
            _deadlines("0+0.05x130", "0+0.05x130"),  # a handful
        ],
        labels=_TIER,
        at="110m",
    ),
    Case(
        "PeregrineTtftBudgetBurnsSlowly",
        fires=[_deadlines("0+96x200", "0+4x200")],
        silent=[_deadlines("0+995x200", "0+5x200")],
        labels=_TIER,
        at="12h",
        interval="5m",
    ),
    Case(
        "PeregrineItlBudgetBurnsFast",
        fires=[_gaps("0+700x130", "0+1000x130")],
        silent=[_gaps("0+995x130", "0+1000x130"), _gaps("0+500x60 30000+1000x60", "0+1000x120")],
        labels=_TIER,
        at="110m",
    ),
    Case(
        "PeregrineItlBudgetBurnsSlowly",
        fires=[_gaps("0+960x200", "0+1000x200")],
        silent=[_gaps("0+996x200", "0+1000x200")],
        labels=_TIER,
        at="12h",
        interval="5m",
    ),
    Case(
        "PeregrineQueueGrows",
        fires=[_of({"peregrine_requests_waiting": "0x20 0+20x30"})],
        silent=[
            _of({"peregrine_requests_waiting": "50x60"}),
            _of({"peregrine_requests_waiting": "0x20 0+0.5x30"}),
        ],
        labels=_JOB,
        at="31m",
    ),
    Case(
        "PeregrineKvCacheExhausted",
        fires=[_of({"peregrine_kv_usage_ratio": "0.97x40", "peregrine_preemptions_total": "0+60x40"})],
        silent=[
            _of({"peregrine_kv_usage_ratio": "0.97x40", "peregrine_preemptions_total": "5x40"}),
            _of({"peregrine_kv_usage_ratio": "0.5x40", "peregrine_preemptions_total": "0+60x40"}),
        ],
        labels=_INSTANCE,
    ),
    Case(
        "PeregrineReplicaCrashLoop",
        fires=[_of({"peregrine_replica_start_time_seconds": "100x5 200x5 300x5 400x20"})],
        silent=[_of({"peregrine_replica_start_time_seconds": "100x10 200x30"})],
        labels=_INSTANCE,
        at="20m",
    ),
    Case(
        "PeregrineReplicaStalled",
        fires=[_of({"peregrine_router_replicas": "0x5 1x20"}, ',state="stalled"')],
        silent=[
            _of({"peregrine_router_replicas": "0x30"}, ',state="stalled"'),
            _of({"peregrine_router_replicas": "1x30"}, ',state="routable"'),
        ],
        labels=_JOB,
        at="15m",
    ),
    Case(
        "PeregrineReplicasBelowTarget",
        fires=[_books("1x40", "2x40")],
        silent=[_books("2x40", "2x40"), _books("3x40", "0x40"), _books("2x15 1x5 2x20", "2x40")],
        labels=_JOB,
        at="25m",
    ),
    Case(
        "PeregrineRouterStatsStale",
        fires=[_of({"peregrine_router_stats_age_seconds": "0.2x5 6+60x20"})],
        silent=[_of({"peregrine_router_stats_age_seconds": "0.2x30"})],
        labels=_INSTANCE,
        at="15m",
    ),
    Case(
        "PeregrinePredictionDrift",
        fires=[
            _predictions("0+3x60", "0+1x60", "0+10x60"),
            _predictions("0+1x60", "0+3x60", "0+10x60"),
        ],
        silent=[
            _predictions("0+1.2x60", "0+1x60", "0+10x60"),
            _predictions("0+3x60", "0+1x60", "0+1x60"),  # too few to tell
        ],
        labels=_JOB,
        at="45m",
    ),
    Case(
        "PeregrineErrors",
        fires=[_http(_200="0+90x40", _503="0+10x40")],
        silent=[_http(_200="0+99x40", _500="0+1x40"), _http(_200="0+90x40"), _http(_429="0+90x40")],
        labels=_JOB,
    ),
    Case(
        "PeregrineRefusesMany",
        fires=[_refusals("0+20x60")],
        silent=[_refusals("0+2x60")],
        labels=_JOB,
        at="45m",
    ),
    Case(
        "PeregrineGpuXid",
        fires=[
            _of({"peregrine_gpu_xid_errors_total": "_x15 1x20"}, ',gpu="GPU-0",xid="79"'),
            _of({"peregrine_gpu_xid_errors_total": "1x15 2x20"}, ',gpu="GPU-0",xid="79"'),
        ],
        silent=[_of({"peregrine_gpu_xid_errors_total": "1x60"}, ',gpu="GPU-0",xid="79"')],
        labels={**_INSTANCE, "gpu": "GPU-0", "xid": "79"},
        at="18m",
    ),
    Case(
        "PeregrineScrapeFails",
        fires=[
            _of({"up": "1x10 0x30", "peregrine_replica_start_time_seconds": "100x10 stale"}),
            _of({"up": "1x10 0x30", "peregrine_router_target_replicas": "2x10 stale"}),
        ],
        silent=[
            _of({"up": "1x40", "peregrine_replica_start_time_seconds": "100x40"}),
            _of({"up": "0x40"}),  # somebody else's
        ],
        labels=_INSTANCE,
    ),
    Case(
        "PeregrineMetricsAbsent",
        fires=[{}, _of({"peregrine_replica_ready": "1x5 stale"})],
        silent=[_of({"peregrine_replica_ready": "1x40"}), _of({"peregrine_replica_ready": "0x40"})],
        at="20m",
    ),
    Case(
        "PeregrineRouterMetricsAbsent",
        fires=[_of({"peregrine_router_target_replicas": "2x10 stale"})],
        silent=[{}, _of({"peregrine_router_target_replicas": "2x40"})],
    ),
)
