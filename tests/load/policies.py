"""`python -m tests.load.policies`: the routing policies on a live cluster, one locust run each, the same
arrivals: four replicas of the engine double, or with `--engine real` two of the configured model.

TTFT is that of the short requests alone: what the long ones take to compute is not the router's doing.
"""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

# locust patches the standard library for gevent: it comes before whatever opens sockets.
from tests.load.run import drive

import requests  # isort: skip

from deploy.bench import report  # isort: skip

from tests.load.own_cluster import running
from tests.load.scenarios import Arrival, Kind, Scenario, arrivals
from tests.load.streaming_user import Outcome

POLICIES = ("latency", "round_robin", "least_requests", "power_of_two", "none")
SHORT = Kind("default", 0.98, 30, 24, 5.0)
LONG = Kind("default", 0.02, 6000, 24, 60.0)  # about 10,000 tokens, 2 s of the double's time


@dataclass(frozen=True)
class Trace:
    kinds: tuple[Kind, ...]
    engine: str  # of tests.load.own_cluster
    replicas: int
    rate: float  # requests a second
    max_num_seqs: int = 64


TRACES = {
    "timed": {
        "long_prompts": Trace((SHORT, LONG), "timed", 4, 12.0),
        # 8 places of 24 tokens in 19 ms steps are 17 requests a second; 3.5 replicas, at 80%.
        "one_at_half_speed": Trace((SHORT,), "slow-first", 4, 48.0, max_num_seqs=8),
    },
    # On a core each: a short request takes about 0.3 s, one of 1,200 words some seconds.
    "real": {
        "uniform": Trace((Kind("default", 1.0, 30, 24, 5.0),), "real", 2, 3.0),
        "long_prompts": Trace((SHORT, Kind("default", 0.04, 1200, 24, 60.0)), "real", 2, 2.0),
    },
}


def measure(policy: str, name: str, trace: Trace, todo: list[Arrival], port: int) -> dict[str, Any]:
    options = ("--policy", policy, "--engine", trace.engine, "--replicas", str(trace.replicas))
    with running(*options, "--max-num-seqs", str(trace.max_num_seqs), port=port) as url:
        model = requests.get(f"{url}/v1/models", timeout=30).json()["data"][0]["id"]
        _, outcomes = drive(url, model, todo)
    return row(policy, name, trace, todo, outcomes)


def row(policy: str, name: str, trace: Trace, todo: list[Arrival], outcomes: list[Outcome]) -> dict[str, Any]:
    # The first fifth teaches the router what the replicas are like.
    late = [o for a, o in zip(todo, outcomes, strict=True) if a.due_s > todo[-1].due_s / 5]
    ttft = sorted(1e3 * o.token_s[0] for o in late if o.kind is trace.kinds[0] and o.token_s)
    return {
        "engine": trace.engine,
        "replicas": trace.replicas,
        "trace": name,
        "policy": policy,
        "rate": trace.rate,
        "requests": len(todo),
        "failed": sum(o.error is not None for o in outcomes),
        "refused": sum(o.status == 429 for o in outcomes),
        "ttft_ms_p50": round(ttft[len(ttft) // 2], 1),
        "ttft_ms_p90": round(ttft[int(0.9 * len(ttft))], 1),
        "ttft_ms_p99": round(ttft[int(0.99 * len(ttft))], 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--engine", choices=list(TRACES), default="timed")
    parser.add_argument("--rate", type=float, help="requests a second; by trace if not given")
    parser.add_argument("--policies", default=",".join(POLICIES))
    parser.add_argument("--traces", help="comma-separated; all of them if not given")
    parser.add_argument("--port", type=int, default=18_430)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    traces = TRACES[options.engine]
    for name in options.traces.split(",") if options.traces else traces:
        trace = traces[name]
        if options.rate:
            trace = replace(trace, rate=options.rate)
        scenario = Scenario(((options.seconds, 1.0),), trace.kinds)
        todo = list(arrivals(scenario, trace.rate, seed=1))
        for policy in options.policies.split(","):
            rows.append(measure(policy, name, trace, todo, options.port))
            print(rows[-1], flush=True)
    report.publish(rows, "Routing policies, live", options.json)


if __name__ == "__main__":
    main()
