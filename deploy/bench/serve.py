"""What serving adds, a router included: a replica's engine asked in its own process and over HTTP, in turn.

Open loop: requests arrive by a clock, whatever became of earlier ones, and latency counts from the moment
a request was due. Both paths get the same arrival times and prompts of the same length. Single requests go by
either path in turn, and what serving adds to a first token is the median of the pairs' differences: the same
prompt may take a fifth longer for seconds, which a difference of two medians would carry.
"""

import asyncio
import dataclasses
import itertools
import statistics
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from deploy.bench.bare_engine import ask, start_asked
from deploy.bench.client import Streams, Timeline, completion
from deploy.bench.report import percentile
from deploy.cluster import running_cluster
from deploy.config import PeregrineConfig
from deploy.ray_environment import free_port

OUTPUT_TOKENS = 64
_REQUEST_TIMEOUT_S = 300
_WORDS = ("river", "stone", "light", "winter", "garden", "letter", "market", "engine", "silver", "bridge")


Send = Callable[[Timeline], Awaitable[None]]
"""Notes on the timeline when each piece of text came, and how many tokens in all."""
Prepare = Callable[[str], Send]
"""From a prompt, before it is due."""


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
        paths: dict[str, Prepare] = {
            "engine": lambda prompt: partial(ask, port, prompt, OUTPUT_TOKENS),
            "serve": lambda prompt: partial(streams.send, url, completion(url, name, prompt, OUTPUT_TOKENS)),
        }
        for prepare in paths.values():
            await _drive([prepare(_prompt(-1))], 0.0)
        for concurrency in concurrencies:
            rows += await _compare(paths, concurrency, num_requests, rounds)
    return rows


async def _compare(
    paths: dict[str, Prepare], concurrency: int, num_requests: int, rounds: int
) -> list[dict[str, Any]]:
    # The interval that keeps about `concurrency` requests in flight on the bare engine (Little's law).
    # With one at a time there is a pause between requests instead, so that none ever waits for another.
    start = time.perf_counter()
    warm_up = [_prompt(concurrency * 100_000 - i - 1) for i in range(concurrency)]
    await _drive([paths["engine"](prompt) for prompt in warm_up], 0.0)
    interval = (time.perf_counter() - start) / concurrency * (1.5 if concurrency == 1 else 1.1)
    timelines: dict[str, list[Timeline]] = {path: [] for path in paths}
    spans = dict.fromkeys(paths, 0.0)
    for number in tqdm(range(rounds), desc=f"concurrency {concurrency}", unit="round"):
        # No prompt comes twice, not even by another path: no prefix hits.
        seeds = itertools.count(concurrency * 100_000 + number * num_requests * len(paths))
        if concurrency == 1:
            # One path first, then the other: neither is always the one behind.
            order = [path for i in range(num_requests) for path in list(paths)[:: (1, -1)[i % 2]]]
            came = await _drive([paths[path](_prompt(next(seeds))) for path in order], interval)
            for path, timeline in zip(order, came, strict=True):
                timelines[path].append(timeline)
                spans[path] += interval
            continue
        for path, prepare in paths.items():
            calls = [prepare(_prompt(next(seeds))) for _ in range(num_requests)]
            begin = time.perf_counter()
            timelines[path] += await _drive(calls, interval)
            spans[path] += time.perf_counter() - begin
    return [_row(path, concurrency, timelines[path], timelines["engine"], spans[path]) for path in paths]


def _row(
    path: str, concurrency: int, timelines: list[Timeline], engine: list[Timeline], span: float
) -> dict[str, Any]:
    pairs = zip(timelines, engine, strict=True)
    added = statistics.median(ours.ttft - theirs.ttft for ours, theirs in pairs) * 1e3
    ttft = [t.ttft * 1e3 for t in timelines]
    gaps = [g * 1e3 for t in timelines for g in t.gaps]
    return {
        "path": path,
        "concurrency": concurrency,
        "ttft_ms_p50": round(percentile(ttft, 0.5), 2),
        "ttft_ms_p99": round(percentile(ttft, 0.99), 2),
        "ttft_added_ms_p50": round(added, 2),
        "itl_ms_p50": round(percentile(gaps, 0.5), 3),
        "itl_ms_p99": round(percentile(gaps, 0.99), 3),
        "tpot_ms_p50": round(percentile([t.tpot * 1e3 for t in timelines], 0.5), 3),
        "tok_s": round(sum(t.num_tokens for t in timelines) / span, 1),
        "num_requests": len(timelines),
    }


async def _drive(calls: list[Send], interval: float) -> list[Timeline]:
    start = time.perf_counter()

    async def one(number: int, send: Send) -> Timeline:
        timeline = Timeline(due=start + number * interval)
        await asyncio.sleep(max(0.0, timeline.due - time.perf_counter()))
        await send(timeline)
        if timeline.num_tokens != OUTPUT_TOKENS:
            raise RuntimeError(f"{timeline.num_tokens} tokens came, {OUTPUT_TOKENS} were asked for")
        return timeline

    return list(await asyncio.gather(*(one(i, send) for i, send in enumerate(calls))))


def _prompt(seed: int) -> str:
    """About 64 tokens, different from the first word on, so that no prefix hit flatters anyone."""
    words = [_WORDS[(seed * 31 + i * (seed % 7 + 1)) % len(_WORDS)] for i in range(60)]
    return f"{seed}: " + " ".join(words)
