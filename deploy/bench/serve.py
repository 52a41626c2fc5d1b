"""What serving adds, a router included: a replica's engine asked in its own process and over HTTP, in turn.

Open loop: requests arrive by a clock, whatever became of earlier ones, and latency counts from the moment
a request was due. Both paths get the same arrival times and prompts of the same length.
"""

import asyncio
import dataclasses
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from deploy.bench.bare_engine import ask, start_asked
from deploy.bench.client import Streams, Timeline
from deploy.bench.report import percentile
from deploy.cluster import running_cluster
from deploy.config import PeregrineConfig
from deploy.ray_environment import free_port

OUTPUT_TOKENS = 64
_REQUEST_TIMEOUT_S = 300
_WORDS = ("river", "stone", "light", "winter", "garden", "letter", "market", "engine", "silver", "bridge")


Send = Callable[[str, Timeline], Awaitable[None]]
"""Sends a prompt and notes on the timeline when each piece of text came, and how many tokens in all."""


def run(
    config: PeregrineConfig, concurrencies: list[int], num_requests: int, rounds: int
) -> list[dict[str, Any]]:
    """Rows of serve.json, for paths `engine` and `serve`."""
    name = config.engine.served_model_name or Path(config.engine.model).name.removesuffix(".gguf")
    engine = dataclasses.replace(config.engine, served_model_name=name)
    policy = "latency" if config.routing.policy == "auto" else config.routing.policy
    routing = config.routing.model_copy(update={"policy": policy})  # also before a single replica
    config, port = dataclasses.replace(config, engine=engine, routing=routing), free_port()
    with running_cluster(config, factory=partial(start_asked, port=port)) as url:
        return asyncio.run(_run(name, url, port, concurrencies, num_requests, rounds))


async def _run(
    name: str, url: str, port: int, concurrencies: list[int], num_requests: int, rounds: int
) -> list[dict[str, Any]]:
    rows = []
    async with Streams(_REQUEST_TIMEOUT_S) as streams:
        paths: dict[str, Send] = {
            "engine": lambda prompt, timeline: ask(port, prompt, OUTPUT_TOKENS, timeline),
            "serve": lambda prompt, timeline: streams.complete(url, name, prompt, OUTPUT_TOKENS, timeline),
        }
        for send in paths.values():
            await _drive(send, [_prompt(-1)], 0.0)
        for concurrency in concurrencies:
            rows += await _compare(paths, concurrency, num_requests, rounds)
    return rows


async def _compare(
    paths: dict[str, Send], concurrency: int, num_requests: int, rounds: int
) -> list[dict[str, Any]]:
    # The interval that keeps about `concurrency` requests in flight on the bare engine (Little's law).
    # With one at a time there is a pause between requests instead, so that none ever waits for another.
    start = time.perf_counter()
    await _drive(paths["engine"], [_prompt(concurrency * 100_000 - i - 1) for i in range(concurrency)], 0.0)
    interval = (time.perf_counter() - start) / concurrency * (1.5 if concurrency == 1 else 1.1)
    timelines: dict[str, list[Timeline]] = {path: [] for path in paths}
    spans = dict.fromkeys(paths, 0.0)
    progress = tqdm(total=rounds * len(paths), desc=f"concurrency {concurrency}", unit="round")
    for number in range(rounds):
        first = concurrency * 100_000 + number * num_requests * len(paths)
        for place, (path, send) in enumerate(paths.items()):
            # No prompt comes twice, not even by another path: no prefix hits.
            prompts = [_prompt(first + i * len(paths) + place) for i in range(num_requests)]
            begin = time.perf_counter()
            timelines[path] += await _drive(send, prompts, interval)
            spans[path] += time.perf_counter() - begin
            progress.update()
    progress.close()
    return [_row(path, concurrency, timelines[path], spans[path]) for path in paths]


def _row(path: str, concurrency: int, timelines: list[Timeline], span: float) -> dict[str, Any]:
    ttft = [t.ttft * 1e3 for t in timelines]
    gaps = [g * 1e3 for t in timelines for g in t.gaps]
    return {
        "path": path,
        "concurrency": concurrency,
        "ttft_ms_p50": round(percentile(ttft, 0.5), 2),
        "ttft_ms_p99": round(percentile(ttft, 0.99), 2),
        "itl_ms_p50": round(percentile(gaps, 0.5), 3),
        "itl_ms_p99": round(percentile(gaps, 0.99), 3),
        "tpot_ms_p50": round(percentile([t.tpot * 1e3 for t in timelines], 0.5), 3),
        "tok_s": round(sum(t.num_tokens for t in timelines) / span, 1),
        "num_requests": len(timelines),
    }


async def _drive(send: Send, prompts: list[str], interval: float) -> list[Timeline]:
    start = time.perf_counter()

    async def one(number: int, prompt: str) -> Timeline:
        timeline = Timeline(due=start + number * interval)
        await asyncio.sleep(max(0.0, timeline.due - time.perf_counter()))
        await send(prompt, timeline)
        if timeline.num_tokens != OUTPUT_TOKENS:
            raise RuntimeError(f"{timeline.num_tokens} tokens came, {OUTPUT_TOKENS} were asked for")
        return timeline

    jobs: list[Awaitable[Timeline]] = [one(i, p) for i, p in enumerate(prompts)]
    return list(await asyncio.gather(*jobs))


def _prompt(seed: int) -> str:
    """About 64 tokens, different from the first word on, so that no prefix hit flatters anyone."""
    words = [_WORDS[(seed * 31 + i * (seed % 7 + 1)) % len(_WORDS)] for i in range(60)]
    return f"{seed}: " + " ".join(words)
