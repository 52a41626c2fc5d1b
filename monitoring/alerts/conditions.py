"""Alerts on conditions: queues, memory, restarts, the router's knowledge, what is not there."""

from monitoring.alerts.spec import OWNER, Alert, over

_5M = over("5m")
_15M = over("15m")
_BY = f"by ({', '.join(OWNER)})"
_HTTP = "peregrine_http_requests_total"
_WAITING = "peregrine_requests_waiting"
_TARGET, _REPLICAS = "peregrine_router_target_replicas", "peregrine_router_replicas"
_PREDICTED, _ACTUAL = (f"peregrine_route_{kind}_ttft_seconds_sum" for kind in ("predicted", "actual"))
_STALLED, _ROUTABLE = 'state="stalled"', 'state="routable"'
_FAILED, _API = 'status=~"5.."', 'route=~"/v1/.*"'
_XID = "peregrine_gpu_xid_errors_total"
_DRIFT = f"{_15M.sum_rate(_ACTUAL, by=OWNER)} / {_15M.sum_rate(_PREDICTED, by=OWNER)}"
_ENOUGH_PREDICTED = f"sum {_BY} (increase({_15M.series('peregrine_route_ttft_ratio_count')}[15m])) > 50"

CONDITIONS = (
    Alert(
        "PeregrineQueueGrows",
        "page",
        f"sum {_BY} (avg_over_time({_5M.series(_WAITING)}[5m]))\n"
        f"> 1.5 * sum {_BY} (avg_over_time({_5M.series(_WAITING)}[5m] offset 10m)) + 10",
        "5m",
        "The engines' queues grow",
        "More requests come than the replicas serve: queues are by half longer than ten minutes ago.",
    ),
    Alert(
        "PeregrineKvCacheExhausted",
        "page",
        f"{_5M.series('peregrine_kv_usage_ratio')} > 0.95\n"
        f"and on ({', '.join(OWNER)}, instance) {_5M.rate('peregrine_preemptions_total')} > 0.1",
        "5m",
        "The KV cache of {{ $labels.instance }} is full and sequences give way",
        "Preempted sequences compute their tokens again, which costs the others' time.",
    ),
    Alert(
        "PeregrineReplicaCrashLoop",
        "page",
        f"changes({_5M.series('peregrine_replica_start_time_seconds')}[30m]) >= 3",
        "0m",
        "The replica at {{ $labels.instance }} starts again and again",
        "Its process was replaced three times within half an hour.",
    ),
    Alert(
        "PeregrineReplicaStalled",
        "page",
        f"max {_BY} ({_5M.series(_REPLICAS, _STALLED)}) > 0",
        "1m",
        "A replica has work and makes no steps",
        "The routers send it nothing more; it should have been replaced by now.",
    ),
    Alert(
        "PeregrineReplicasBelowTarget",
        "page",
        f"max {_BY} ({_5M.series(_REPLICAS, _ROUTABLE)}) < max {_BY} ({_5M.series(_TARGET)})",
        "10m",
        "Fewer replicas than there should be",
        "Replicas that requests can go to are fewer than configured, for longer than a start takes.",
    ),
    Alert(
        "PeregrineRouterStatsStale",
        "page",
        f"{_5M.series('peregrine_router_stats_age_seconds')} > 5",
        "1m",
        "The router at {{ $labels.instance }} does not hear from a replica",
        "Its connection stands, but no report comes, four of which are due each second.",
    ),
    Alert(
        "PeregrinePredictionDrift",
        "ticket",
        f"(\n  {_DRIFT} > 2\n  or\n  {_DRIFT} < 0.5\n)\nand {_ENOUGH_PREDICTED}",
        "15m",
        "The router's predictions are off by more than twice",
        "First tokens take more than twice, or less than half, of what the router foresees.",
    ),
    Alert(
        "PeregrineErrors",
        "page",
        f"{_5M.sum_rate(_HTTP, _FAILED, OWNER)} / {_5M.sum_rate(_HTTP, by=OWNER)} > 0.05",
        "5m",
        "More than one response in twenty is an error",
        "HTTP responses with a status of 500 or above.",
    ),
    Alert(
        "PeregrineRefusesMany",
        "ticket",
        f"{_15M.sum_rate('peregrine_refusals_total', by=OWNER)} / {_15M.sum_rate(_HTTP, _API, OWNER)} > 0.1",
        "15m",
        "More than one request in ten is refused",
        "The replicas do not suffice for the load and the tiers' promises.",
    ),
    Alert(
        "PeregrineGpuXid",
        "page",
        f"increase({_5M.series(_XID)}[10m]) > 0\nor\n"
        # A series that is new has no increase yet: the first error is the one that counts.
        f"{_5M.series(_XID)} unless {_5M.series(_XID)} offset 10m",
        "0m",
        "GPU {{ $labels.gpu }} reported Xid {{ $labels.xid }}",
        "The driver reports an error of the GPU or of the program on it.",
    ),
    Alert(
        "PeregrineScrapeFails",
        "ticket",
        "up == 0\nand on (job, instance) (\n"
        f"  last_over_time({_5M.series('peregrine_replica_start_time_seconds')}[1h])\n"
        f"  or last_over_time({_5M.series(_TARGET)}[1h])\n)",
        "5m",
        "{{ $labels.instance }} does not give its metrics any more",
        "It did within the last hour; its process is gone or hangs.",
    ),
    Alert(
        "PeregrineMetricsAbsent",
        "page",
        f"absent({_5M.series('peregrine_replica_ready')})",
        "5m",
        "No replica gives metrics",
        "Nothing runs, or Prometheus does not find it: all other alerts are blind.",
    ),
    Alert(
        "PeregrineRouterMetricsAbsent",
        "ticket",
        # Where no router is configured there never was one.
        f"absent({_5M.series(_TARGET)})\nand on () (count(last_over_time({_5M.series(_TARGET)}[6h])) > 0)",
        "5m",
        "No request router gives metrics any more",
        "The proxy asks routers that are gone, or Prometheus does not find them.",
    ),
)
