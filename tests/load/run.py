"""`python -m tests.load.run SCENARIO --url URL`: one scenario against a running server, or with
`--engine scheduled|real` against a cluster of its own (tests.load.own_cluster).

The capacity is measured first: what the server completes a second of a like mix when requests come faster.
"""

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

# locust patches the standard library for gevent: it comes before whatever opens sockets.
from locust.env import Environment

from locust.html import get_html_report  # isort: skip
import gevent
import requests
from locust.stats import stats_history
from rich.console import Console
from rich.table import Table

from deploy.bench import report
from tests.load.own_cluster import running
from tests.load.scenarios import SCENARIOS, Arrival, Kind, Scenario, arrivals
from tests.load.streaming_user import Outcome, StreamingUser

_CALIBRATION_S = 10.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scenario", choices=sorted(SCENARIOS))
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--engine", choices=("scheduled", "real"), help="a cluster of its own, with this")
    parser.add_argument("--replicas", default="4")
    parser.add_argument("--max-num-seqs", default="8", help="of each replica")
    parser.add_argument("--port", type=int, default=18_431)
    parser.add_argument("--capacity", type=float, help="requests a second; measured if not given")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--html", type=Path)
    options = parser.parse_args()
    if options.engine is None:
        run(options.url, options)
        return
    own = ("--engine", options.engine, "--replicas", options.replicas, "--max-num-seqs", options.max_num_seqs)
    with running(*own, port=options.port) as url:
        run(url, options)


def run(url: str, options: argparse.Namespace) -> None:
    model = requests.get(f"{url}/v1/models", timeout=30).json()["data"][0]["id"]
    scenario = SCENARIOS[options.scenario]
    capacity = options.capacity or measure_capacity(url, model, scenario)
    print(f"capacity: {capacity:.1f} requests/s")
    todo = list(arrivals(scenario, capacity, options.seed))
    environment, outcomes = drive(url, model, todo)
    rows = summarise(outcomes)
    _show(options.scenario, rows)
    if options.html:
        options.html.write_text(get_html_report(environment, show_download_link=False))
    if options.json:
        found = {"scenario": options.scenario, "capacity_rps": round(capacity, 2), "rows": rows}
        options.json.write_text(json.dumps({**report.circumstances(), **found}, indent=1) + "\n")


def drive(url: str, model: str, todo: list[Arrival]) -> tuple[Environment, list[Outcome]]:
    """Send all requests at their times; what became of each, in their order."""

    class User(StreamingUser):
        host = url

    User.model, User.arrivals = model, todo
    environment = Environment(user_classes=[User])
    runner = environment.create_local_runner()
    gevent.spawn(stats_history, runner)
    runner.start(1, spawn_rate=1)
    runner.greenlet.join()
    return environment, User.outcomes


def measure_capacity(url: str, model: str, scenario: Scenario) -> float:
    """Completed requests a second with as many in flight as keep the server busy (all of tier `default`)."""
    total = sum(k.share for k in scenario.kinds)
    words = sum(k.share * k.prompt_words for k in scenario.kinds) / total
    tokens = sum(k.share * k.output_tokens for k in scenario.kinds) / total
    kind = Kind("default", 1.0, round(words), round(tokens), 60.0)
    rate = 4.0
    # Double the rate of arrivals until the server falls behind: what it then completes is its capacity.
    while True:
        todo = list(arrivals(Scenario(((_CALIBRATION_S, 1.0),), (kind,)), rate, seed=1))
        _, outcomes = drive(url, model, todo)
        done = [o for o in outcomes if o.is_complete]
        last = max(a.due_s + o.end_s for a, o in zip(todo, outcomes, strict=True))
        if last > 1.2 * _CALIBRATION_S or len(done) < len(todo):
            return len(done) / last
        rate *= 2


def summarise(outcomes: list[Outcome]) -> list[dict[str, Any]]:
    """One row a tier: counts, percentiles of TTFT in ms, and of the admitted, which share had its first token
    in time, counted at the replica and here, and which kept all of its deadlines.
    """
    rows = []
    for tier in dict.fromkeys(o.kind.tier for o in outcomes):
        own = [o for o in outcomes if o.kind.tier == tier]
        status = Counter(o.status for o in own)
        admitted = [o for o in own if o.status == 200 and not o.is_aborted]
        ttft = sorted(o.token_s[0] * 1e3 for o in admitted if o.token_s)
        at_replica = [o.ttft_at_replica_s for o in admitted if o.ttft_at_replica_s is not None]
        refused = [o for o in own if o.status == 429]
        rows.append(
            {
                "tier": tier,
                "sent": len(own),
                "admitted": status[200],
                "refused": len(refused),
                "refused_without_retry_after": sum(not o.retry_after for o in refused),
                "failed": sum(o.error is not None for o in own),
                "lost": sum(o.status == 200 and not (o.is_complete or o.is_aborted) for o in own),
                "ttft_ms_p50": round(ttft[len(ttft) // 2], 1) if ttft else None,
                "ttft_ms_p99": round(ttft[int(len(ttft) * 0.99)], 1) if ttft else None,
                "in_time_at_replica": round(
                    sum(t <= own[0].kind.deadline_s for t in at_replica) / len(at_replica), 4
                )
                if at_replica
                else None,
                "in_time": round(sum(o.is_in_time for o in admitted) / len(admitted), 4)
                if admitted
                else None,
                "kept": round(sum(o.kept for o in admitted) / len(admitted), 4) if admitted else None,
            }
        )
    return rows


def _show(scenario: str, rows: list[dict[str, Any]]) -> None:
    table = Table(title=f"Load test: {scenario}")
    for name in rows[0]:
        table.add_column(name)
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
