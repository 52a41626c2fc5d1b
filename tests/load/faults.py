"""`python -m tests.load.faults SCENARIO`: what clients see while replicas are killed, replaced and scaled.

A cluster of its own, four replicas of the timed engine double (tests.timed_engine), an open loop of streams.
"""

import argparse
import asyncio
import dataclasses
import json
import os
import platform
import signal
import time
from collections.abc import Awaitable, Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from deploy.cluster import APP_NAME, deploy, started
from deploy.config import PeregrineConfig, load_config
from deploy.ray_environment import free_port
from tests.load.open_loop import OpenLoop, Stream
from tests.timed_engine import start_timed_engine

MODEL = "double"
_REPLACED_TIMEOUT_S = 60.0
_SETTLE_S = 3.0


def replica_processes() -> list[psutil.Process]:
    """Of this process's own cluster."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            title = " ".join(process.cmdline())
        except psutil.Error:
            continue
        if title.startswith(f"ray::ServeReplica:{APP_NAME}:Replica"):
            found.append(process)
    return found


async def until(condition: Callable[[], bool], timeout_s: float, what: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {timeout_s:.0f} s")
        await asyncio.sleep(0.2)


def num_running() -> int:
    from ray import serve

    application = serve.status().applications[APP_NAME]
    return application.deployments["Replica"].replica_states.get("RUNNING", 0)


async def counters() -> dict[str, int]:
    """The request router's ledger."""
    from ray import serve

    handle = serve.get_deployment_handle("RequestRouter", APP_NAME)
    found: dict[str, int] = await asyncio.wait_for(handle.counters.remote(), 10)
    return found


async def kill(config: PeregrineConfig, load: OpenLoop, times: int) -> list[dict[str, Any]]:
    """Kill -9 of a replica's process, one after another, each replaced before the next."""
    rows = []
    for _ in range(times):
        await asyncio.sleep(_SETTLE_S)
        victim = min(replica_processes(), key=lambda p: p.create_time())
        open_before = [s for s in load.streams if not s.ended_at]
        killed_at = time.monotonic()
        os.kill(victim.pid, signal.SIGKILL)
        await until(lambda v=victim: not v.is_running() or v.status() == "zombie", 10, "the kill")
        await until(lambda: len(replica_processes()) == config.cluster.replicas, _REPLACED_TIMEOUT_S, "back")
        await until(lambda: num_running() == config.cluster.replicas, _REPLACED_TIMEOUT_S, "running")
        replaced_s = time.monotonic() - killed_at
        cut = [s for s in open_before if s.end == "error event"]
        rows.append(
            {
                "open": len(open_before),
                "cut": len(cut),
                "cut_end_s_max": round(max((s.ended_at - killed_at for s in cut), default=0.0), 3),
                "replaced_s": round(replaced_s, 1),
            }
        )
        print(rows[-1], flush=True)
    return rows


async def redeploy(config: PeregrineConfig, load: OpenLoop, times: int) -> list[dict[str, Any]]:
    """A changed configuration, rolled out over all replicas."""
    rows = []
    for number in range(times):
        await asyncio.sleep(_SETTLE_S)
        before = {p.pid for p in replica_processes()}
        begin = time.monotonic()
        changed = dataclasses.replace(
            config, engine=dataclasses.replace(config.engine, max_num_seqs=65 + number)
        )
        await asyncio.to_thread(deploy, changed, 0, has_haproxy=True, factory=start_timed_engine)
        await until(
            lambda b=before: not b & {p.pid for p in replica_processes()},
            _REPLACED_TIMEOUT_S * 2,
            "old ones gone",
        )
        rows.append({"seconds": round(time.monotonic() - begin, 1)})
        print(rows[-1], flush=True)
    return rows


async def scale(config: PeregrineConfig, load: OpenLoop, times: int) -> list[dict[str, Any]]:
    """1 -> 4 -> 1 replicas, each time until they run, or have gone."""
    rows = []
    for _ in range(times):
        for replicas in (4, 1):
            await asyncio.sleep(_SETTLE_S)
            begin = time.monotonic()
            changed = dataclasses.replace(
                config, cluster=config.cluster.model_copy(update={"replicas": replicas})
            )
            await asyncio.to_thread(deploy, changed, 0, has_haproxy=True, factory=start_timed_engine)
            await until(
                lambda n=replicas: num_running() == n == len(replica_processes()),
                2 * _REPLACED_TIMEOUT_S,
                "scaled",
            )
            rows.append({"replicas": replicas, "seconds": round(time.monotonic() - begin, 1)})
            print(rows[-1], flush=True)
    return rows


Scenario = Callable[[PeregrineConfig, OpenLoop, int], Awaitable[list[dict[str, Any]]]]
SCENARIOS: dict[str, tuple[Scenario, int]] = {
    "kill": (kill, 4),
    "redeploy": (redeploy, 4),
    "scale": (scale, 1),
}


async def run(scenario: Scenario, config: PeregrineConfig, load: OpenLoop, times: int) -> dict[str, Any]:
    loading = asyncio.create_task(load.run())
    await asyncio.sleep(_SETTLE_S)
    try:
        rows = await scenario(config, load, times)
    finally:
        await asyncio.sleep(_SETTLE_S)
        load.stop()
        await loading
    await asyncio.sleep(1.0)  # the last events are on their way to the router
    bad = [s for s in load.streams if s.end not in ("complete", "error event", "aborted", "refused")]
    for stream in bad[:20]:
        print("failed:", stream, flush=True)
    return {
        "requests": len(load.streams),
        "ends": load.ends(),
        "failed": len(bad),
        "badly_ended_bodies": sum(not s.is_shut_well for s in load.streams),
        "ledger_at_end": await counters(),
        "rows": rows,
        **_times(load.streams),
    }


def _times(streams: list[Stream]) -> dict[str, float]:
    ttft = sorted(s.first_token_at - s.sent_at for s in streams if s.first_token_at)
    return {
        "ttft_ms_p50": round(1e3 * ttft[len(ttft) // 2], 1),
        "ttft_ms_p99": round(1e3 * ttft[int(0.99 * len(ttft))], 1),
        "ttft_ms_max": round(1e3 * ttft[-1], 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scenario", choices=sorted(SCENARIOS))
    parser.add_argument("--times", type=int, default=1)
    parser.add_argument("--rate", type=float, default=15.0)
    parser.add_argument("--policy", default="latency")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    scenario, replicas = SCENARIOS[options.scenario]
    config = load_config(
        None,
        {
            "engine": {"model": MODEL, "served_model_name": MODEL},
            "routing": {"policy": options.policy},
            "cluster": {"replicas": replicas, "port": free_port()},
        },
    )
    with started(config, factory=start_timed_engine) as url:
        load = OpenLoop(url, MODEL, options.rate, abort_share=0.1)
        result = asyncio.run(run(scenario, config, load, options.times))
    result = {
        "machine": {"cpus": os.cpu_count(), "processor": platform.processor() or platform.machine()},
        "versions": {"ray": version("ray")},
        "date": date.today().isoformat(),
        "command": f"python -m tests.load.faults {options.scenario} --times {options.times}"
        f" --rate {options.rate:g} --policy {options.policy}",
        "scenario": options.scenario,
        **result,
    }
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
