"""`python -m tests.load.faults SCENARIO`: what clients see while replicas are killed, replaced and scaled.

A cluster of its own, four replicas of the timed engine double (tests.timed_engine), an open loop of streams.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import json
import os
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import psutil

from deploy.bench import report
from deploy.cluster import APP_NAME, deploy, started
from deploy.config import PeregrineConfig, load_config
from deploy.ray_environment import free_port
from serving.dispatch.dispatcher import ARRIVAL_TIMEOUT_S
from tests.load.open_loop import OpenLoop, Stream
from tests.timed_engine import HANG, start_timed_engine

MODEL = "double"
_REPLACED_TIMEOUT_S = 60.0
_SCALED_TIMEOUT_S = 120.0
_SETTLE_S = 3.0
_REQUESTS_A_TIME = 1_000
_LONG_STREAM_TOKENS = 1_600  # 40 s or more at the double's 20 ms a step


def replica_processes() -> list[psutil.Process]:
    return processes(f"ray::ServeReplica:{APP_NAME}:Replica")


def processes(title: str) -> list[psutil.Process]:
    """Of this process's own cluster, by the beginning of the command line; the oldest first."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if " ".join(process.cmdline()).startswith(title):
                found.append(process)
    return sorted(found, key=lambda p: p.create_time())


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
    """The routers' ledgers, once they are empty, or as they are when they should have been long ago."""
    from ray import serve

    handle = serve.get_deployment_handle("RequestRouter", APP_NAME)
    deadline = time.monotonic() + ARRIVAL_TIMEOUT_S + 5
    while True:
        # A handle asks one of the routers, and no one can say which: several times.
        asked = [await asyncio.wait_for(handle.counters.remote(), 10) for _ in range(8)]
        found = {name: max(a[name] for a in asked) for name in asked[0]}
        if not any(found.values()) or time.monotonic() > deadline:
            return found
        await asyncio.sleep(1.0)


async def kill(config: PeregrineConfig, load: OpenLoop, times: int) -> list[dict[str, Any]]:
    """Kill -9 of a replica's process, one after another, each replaced before the next."""
    rows = []
    for _ in range(times):
        await asyncio.sleep(_SETTLE_S)
        victim = replica_processes()[0]
        open_before = [s for s in load.streams if not s.ended_at]
        num_waiting = sum(not s.first_token_at for s in open_before)
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
                "waiting_for_first_token": num_waiting,
                "cut": len(cut),
                "cut_end_s_max": round(max((s.ended_at - killed_at for s in cut), default=0.0), 3),
                "replaced_s": round(replaced_s, 1),
            }
        )
        print(rows[-1], flush=True)
    return rows


async def hang(config: PeregrineConfig, load: OpenLoop, times: int) -> list[dict[str, Any]]:
    """An engine that stops stepping, in a replica whose process lives on."""
    rows = []
    for _ in range(times):
        await asyncio.sleep(_SETTLE_S)
        before = {p.pid for p in replica_processes()}
        begin, open_before = time.monotonic(), [s for s in load.streams if not s.ended_at]
        # The client gives up, so that the proxy does not send the poison to the next replica.
        with contextlib.suppress(httpx.TimeoutException):
            body = {"model": MODEL, "prompt": HANG, "stream": True}
            async with httpx.AsyncClient(timeout=1.0) as client:
                await client.post(f"{load.url}/v1/completions", json=body)
        await until(
            lambda b=before: len({p.pid for p in replica_processes()} - b) > 0,
            _REPLACED_TIMEOUT_S,
            "a new one",
        )
        await until(lambda: num_running() == config.cluster.replicas, _REPLACED_TIMEOUT_S, "running")
        cut = [s for s in open_before if s.end == "error event"]
        later = [s for s in load.streams if s.sent_at >= begin and s.end == "error event"]
        replaced_s = round(time.monotonic() - begin, 1)
        rows.append({"cut": len(cut), "cut_later": len(later), "replaced_s": replaced_s})
        print(rows[-1], flush=True)
    return rows


async def infrastructure(config: PeregrineConfig, load: OpenLoop, times: int) -> list[dict[str, Any]]:
    """Kill -9 of what is not a replica: a request router, the controller, HAProxy's actor."""
    rows = []
    titles = {
        "router": f"ray::ServeReplica:{APP_NAME}:RequestRouter",
        "controller": "ray::ServeController",
        "proxy actor": "ray::HAProxyManager",
    }
    for name, title in titles.items():
        for _ in range(times):
            await asyncio.sleep(_SETTLE_S)
            victim, first = processes(title)[0], len(load.streams)
            begin = time.monotonic()
            os.kill(victim.pid, signal.SIGKILL)
            await asyncio.sleep(1.0)
            await until(lambda t=title: bool(processes(t)), _REPLACED_TIMEOUT_S, f"{name} back")
            back_s = time.monotonic() - begin
            await asyncio.sleep(10.0)
            own = load.streams[first:]
            ttft = [s.first_token_at - s.sent_at for s in own if s.first_token_at]
            rows.append(
                {
                    "killed": name,
                    "back_s": round(back_s, 1),
                    "sent_within_10_s": len(own),
                    "failed": sum(s.end.startswith(("status", "Client", "Server", "ended")) for s in own),
                    "ttft_ms_max": round(1e3 * max(ttft, default=0.0)),
                }
            )
            print(rows[-1], flush=True)
    return rows


async def redeploy(config: PeregrineConfig, load: OpenLoop, times: int) -> list[dict[str, Any]]:
    """A changed configuration, rolled out over all replicas. The first time a stream runs that is longer than
    any usual drain.
    """
    rows: list[dict[str, Any]] = []
    long = asyncio.create_task(load.long_stream(_LONG_STREAM_TOKENS))
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
    stream = await long
    rows.append({"long_stream_s": round(stream.ended_at - stream.sent_at, 1), "end": stream.end})
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


async def aborts(config: PeregrineConfig, load: OpenLoop, times: int) -> list[dict[str, Any]]:
    """Nothing happens to the cluster: a thousand requests each time, for the ledger at the end."""
    rows = []
    for number in range(times):
        begin = time.monotonic()
        limit_s = 3 * _REQUESTS_A_TIME / load.rate
        await until(lambda n=number: len(load.streams) >= (n + 1) * _REQUESTS_A_TIME, limit_s, "requests")
        rows.append({"requests": len(load.streams), "seconds": round(time.monotonic() - begin, 1)})
        print(rows[-1], flush=True)
    return rows


async def autoscale(config: PeregrineConfig, load: OpenLoop, times: int) -> list[dict[str, Any]]:
    """Ten times the load, and back: the number of replicas follows by itself."""
    rows: list[dict[str, Any]] = []
    assert config.cluster.autoscaling is not None
    for rate, replicas in ((load.rate, config.cluster.autoscaling.max_replicas), (load.rate / 10, 1)) * times:
        load.rate = rate
        begin = time.monotonic()
        await until(
            lambda n=replicas: num_running() == n == len(replica_processes()), _SCALED_TIMEOUT_S, "scaled"
        )
        rows.append({"rate": rate, "replicas": replicas, "seconds": round(time.monotonic() - begin, 1)})
        print(rows[-1], flush=True)
    return rows


@dataclasses.dataclass(frozen=True)
class Scenario:
    act: Callable[[PeregrineConfig, OpenLoop, int], Awaitable[list[dict[str, Any]]]]
    cluster: dict[str, Any]


SCENARIOS = {
    "aborts": Scenario(aborts, {"replicas": 4}),
    "autoscale": Scenario(
        autoscale,
        {
            "replicas": 1,
            "autoscaling": {
                "max_replicas": 4,
                "target_busy": 0.08,  # 5 of the 64 places: the load of a machine with two cores
                "look_back_s": 3,
                "upscale_delay_s": 1,
                "downscale_delay_s": 4,
            },
        },
    ),
    "hang": Scenario(hang, {"replicas": 4}),
    "infrastructure": Scenario(infrastructure, {"replicas": 4}),
    "kill": Scenario(kill, {"replicas": 4}),
    "redeploy": Scenario(redeploy, {"replicas": 4}),
    "scale": Scenario(scale, {"replicas": 1}),
}


async def run(scenario: Scenario, config: PeregrineConfig, load: OpenLoop, times: int) -> dict[str, Any]:
    loading = asyncio.create_task(load.run())
    await asyncio.sleep(_SETTLE_S)
    try:
        rows = await scenario.act(config, load, times)
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
        "answered_without_router": sum(s.status == 200 and not s.route for s in load.streams),
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
    scenario = SCENARIOS[options.scenario]
    config = load_config(
        None,
        {
            "engine": {"model": MODEL, "served_model_name": MODEL},
            "routing": {"policy": options.policy},
            "cluster": {**scenario.cluster, "port": free_port()},
        },
    )
    with started(config, factory=start_timed_engine) as url:
        load = OpenLoop(url, MODEL, options.rate, abort_share=0.1)
        result = asyncio.run(run(scenario, config, load, options.times))
    result = {**report.circumstances(), "scenario": options.scenario, **result}
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
