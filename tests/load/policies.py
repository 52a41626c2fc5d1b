"""`python -m tests.load.policies`: the routing policies on a live cluster of the engine double, one locust
run each, the same arrivals.

TTFT is that of the short requests alone: what the long ones take to compute is not the router's doing.
"""

import argparse
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

# locust patches the standard library for gevent: it comes before whatever opens sockets.
from tests.load.run import drive

from deploy.bench import report  # isort: skip

from tests.load.scenarios import Arrival, Kind, Scenario, arrivals
from tests.load.streaming_user import Outcome

POLICIES = ("latency", "round_robin", "least_requests", "power_of_two", "none")
SHORT = Kind("default", 0.98, 30, 24, 5.0)
LONG = Kind("default", 0.02, 6000, 24, 60.0)  # about 10,000 tokens, 2 s of the double's time
TRACES = {"long prompts": (SHORT, LONG), "one at half speed": (SHORT,)}
_START_TIMEOUT_S = 120
_STOP_TIMEOUT_S = 120


def measure(policy: str, trace: str, todo: list[Arrival], port: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.load.double_cluster", "--policy", policy, "--port", str(port)]
    if trace == "one at half speed":
        command.append("--slow-first")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as cluster:
        try:
            assert cluster.stdout is not None
            for line in cluster.stdout:
                if line.startswith("ready"):
                    break
            _, outcomes = drive(f"http://127.0.0.1:{port}", "double", todo)
        finally:
            cluster.send_signal(signal.SIGTERM)
            cluster.wait(_STOP_TIMEOUT_S)
    return row(policy, trace, todo, outcomes)


def row(policy: str, trace: str, todo: list[Arrival], outcomes: list[Outcome]) -> dict[str, Any]:
    # The first fifth teaches the router what the replicas are like.
    late = [o for a, o in zip(todo, outcomes, strict=True) if a.due_s > todo[-1].due_s / 5]
    ttft = sorted(1e3 * o.token_s[0] for o in late if o.kind is SHORT and o.token_s)
    return {
        "trace": trace,
        "policy": policy,
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
    parser.add_argument("--rate", type=float, default=12.0, help="requests a second")
    parser.add_argument("--policies", default=",".join(POLICIES))
    parser.add_argument("--traces", default=",".join(TRACES))
    parser.add_argument("--port", type=int, default=18_430)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    for trace in options.traces.split(","):
        scenario = Scenario(((options.seconds, 1.0),), TRACES[trace])
        todo = list(arrivals(scenario, options.rate, seed=1))
        for policy in options.policies.split(","):
            rows.append(measure(policy, trace, todo, options.port))
            print(rows[-1], flush=True)
    report.publish(rows, "Routing policies, live", options.json)


if __name__ == "__main__":
    main()
