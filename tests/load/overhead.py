"""`python -m tests.load.overhead`: what the ways to a replica cost, on the engine double without any waiting.

Each way in a process and a cluster of its own, one replica: first tokens of single requests, and chunks a
second of 16 streams flat out. `two hops` is what a streaming answer through two Serve deployments takes.
"""

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import aiohttp

from deploy import ray_environment
from deploy.bench import report
from deploy.cluster import own_ray, started
from deploy.config import PeregrineConfig, load_config
from deploy.ray_environment import free_port
from serving.dispatch.headers import PEREGRINE_ROUTE
from tests.timed_engine import start_fast

# The first two name their routing policy; `replica` is asked directly, at its own port.
WAYS = {
    "HAProxy and router": {"routing": {"policy": "latency"}},
    "HAProxy": {"routing": {"policy": "none"}},
    "replica": {"routing": {"policy": "none"}},
    "Python proxy": {"cluster": {"haproxy": "off"}},
    "two hops": {"cluster": {"haproxy": "off"}},
}
NUM_WARM = 50
NUM_SINGLE = 300
NUM_STREAMS = 16
TOKENS_PER_STREAM = 1500
_TIMEOUT_S = 120
_WORD = b'"content":" word"'  # of one chunk


def body(num_tokens: int) -> dict[str, Any]:
    return {
        "model": "double",
        "messages": [{"role": "user", "content": "Hello there " * 10}],
        "max_tokens": num_tokens,
        "ignore_eos": True,
        "stream": True,
    }


async def measure(url: str, *, is_routed: bool = False) -> dict[str, float]:
    """is_routed: every answer has to come by way of the router."""
    timeout = aiohttp.ClientTimeout(total=_TIMEOUT_S)
    async with aiohttp.ClientSession(timeout=timeout) as session:

        async def one(num_tokens: int) -> tuple[float, int]:
            nonlocal last_route
            begin, first, num_chunks, rest = time.perf_counter(), 0.0, 0, b""
            async with session.post(f"{url}/v1/chat/completions", json=body(num_tokens)) as response:
                assert response.status == 200, await response.text()
                last_route = response.headers.get(PEREGRINE_ROUTE)
                # Counted in whatever comes together: reading lines would make this client the slowest part.
                async for data in response.content.iter_any():
                    data = rest + data
                    if found := data.count(_WORD):
                        first = first or time.perf_counter()
                        num_chunks += found
                    rest = data[1 - len(_WORD) :]  # too short for a whole one
            return first - begin, num_chunks

        last_route: str | None = None
        for _ in range(NUM_WARM):
            await one(2)
        ttft = sorted([(await one(2))[0] for _ in range(NUM_SINGLE)])
        assert bool(last_route) == is_routed
        begin = time.perf_counter()
        streams = await asyncio.gather(*(one(TOKENS_PER_STREAM) for _ in range(NUM_STREAMS)))
        seconds = time.perf_counter() - begin
    assert sum(n for _, n in streams) == NUM_STREAMS * TOKENS_PER_STREAM
    return {
        "ttft_ms_p50": round(1e3 * ttft[len(ttft) // 2], 2),
        "ttft_ms_p99": round(1e3 * ttft[int(0.99 * len(ttft))], 2),
        "chunks_per_s": round(NUM_STREAMS * TOKENS_PER_STREAM / seconds),
    }


def replica_url(url: str) -> str:
    """The address of the one replica behind the proxy."""
    import ray
    from ray.serve.context import _get_global_client

    asked = _get_global_client()._controller.get_target_groups.remote(from_proxy_manager=True)
    groups = ray.get(asked, timeout=30)
    (target,) = next(g for g in groups if g.app_name).targets
    return f"http://{url.split('/')[2].split(':')[0]}:{target.port}"


def two_hops(config: PeregrineConfig) -> dict[str, float]:
    temporary = Path(tempfile.mkdtemp(prefix="pg-"))
    ray_environment.prepare(config, temporary)
    with own_ray(temporary, 0):
        from fastapi import FastAPI, Request
        from fastapi.responses import StreamingResponse
        from ray import serve

        app = FastAPI()
        chunk = 'data: {"choices":[{"index":0,"delta":{"content":" word"},"finish_reason":null}]}\n\n'

        @serve.deployment(max_ongoing_requests=1000)
        class Engine:
            async def tokens(self, count: int) -> AsyncGenerator[str, None]:
                for _ in range(count):
                    await asyncio.sleep(0)
                    yield chunk

        @serve.deployment(max_ongoing_requests=1000)
        @serve.ingress(app)
        class Api:
            def __init__(self, engine: Any) -> None:
                self._engine = engine.options(stream=True)

            @app.post("/v1/chat/completions")
            async def answer(self, request: Request) -> StreamingResponse:
                count = (await request.json())["max_tokens"]
                return StreamingResponse(self._engine.tokens.remote(count), media_type="text/event-stream")

        serve.start(http_options={"host": config.cluster.host, "port": config.cluster.port})
        serve.run(Api.bind(Engine.bind()))
        return asyncio.run(measure(f"http://{config.cluster.host}:{config.cluster.port}"))


def run(way: str) -> dict[str, float]:
    settings = WAYS[way]
    config = load_config(
        None,
        {
            "engine": {"model": "double", "served_model_name": "double"},
            "routing": settings.get("routing", {}),
            "cluster": {**settings.get("cluster", {}), "port": free_port()},
        },
    )
    if way == "two hops":
        return two_hops(config)
    with started(config, factory=start_fast) as url:
        is_routed = way == "HAProxy and router"
        return asyncio.run(measure(replica_url(url) if way == "replica" else url, is_routed=is_routed))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--way", choices=list(WAYS), help="one, in this process")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.way:
        print("result", json.dumps(run(options.way)), flush=True)
        return
    rows: list[dict[str, Any]] = []
    for number in range(options.rounds):
        for way in WAYS:
            command = [sys.executable, "-m", "tests.load.overhead", "--way", way]
            done = subprocess.run(command, capture_output=True, text=True, timeout=4 * _TIMEOUT_S)
            found = [line for line in done.stdout.splitlines() if line.startswith("result")]
            if not found:
                raise RuntimeError(f"{way}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
            rows.append({"round": number, "way": way, **json.loads(found[0].removeprefix("result "))})
            print(rows[-1], flush=True)
    report.publish(rows, "Ways to a replica", options.json)


if __name__ == "__main__":
    main()
