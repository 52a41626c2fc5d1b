"""A replica's engine, asked within its own process: what comes on top of that over HTTP is what serving adds.

An engine in a process of its own would not do to compare with: the same prompt takes 33 ms in one process and
45 in another, for as long as they live.
"""

import asyncio
import json
import time
from functools import partial
from typing import TYPE_CHECKING

from deploy.bench.client import Timeline
from deploy.ray_environment import LOOPBACK
from engine import EngineConfig, InferenceEngine, SamplingParams
from serving.lines import MAX_LINE_BYTES

if TYPE_CHECKING:  # Ray reads its settings when it is imported
    from serving.replica import EngineFactory

_ANSWER_TIMEOUT_S = 300
_servers: list[asyncio.Server] = []  # as long as the process


async def start_asked(
    config: EngineConfig, *, port: int, start: "EngineFactory | None" = None
) -> InferenceEngine:
    """The factory for a replica whose engine also answers `ask`, on a port of loopback.

    start: of another engine than the real one.
    """
    if start is None:
        from serving.replica import start_async_engine

        start = start_async_engine
    engine = await start(config)
    answer = partial(_answer, engine)
    _servers.append(await asyncio.start_server(answer, LOOPBACK, port, limit=MAX_LINE_BYTES))
    return engine


async def ask(port: int, prompt: str, num_tokens: int, timeline: Timeline) -> None:
    """A greedy completion of so many tokens. The way to the replica's process and back does not count."""
    begin = time.perf_counter()
    async with asyncio.timeout(_ANSWER_TIMEOUT_S):
        reader, writer = await asyncio.open_connection(LOOPBACK, port, limit=MAX_LINE_BYTES)
        try:
            writer.write(json.dumps([prompt, num_tokens]).encode() + b"\n")
            times, timeline.num_tokens = json.loads(await reader.readline())
        finally:
            writer.close()
    timeline.arrivals += [begin + t for t in times]


async def _answer(
    engine: InferenceEngine, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    """Seconds from the question to each piece of text, and the number of tokens."""
    try:
        prompt, num_tokens = json.loads(await reader.readline())
        begin, times, count = time.perf_counter(), [], 0
        params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
        token_ids = await engine.tokenize(prompt)
        async for output in engine.generate(token_ids, params, request_id=f"bench-{time.perf_counter_ns()}"):
            if output.text or output.finish_reason:
                times.append(time.perf_counter() - begin)
                count = output.num_output_tokens
        writer.write(json.dumps([times, count]).encode() + b"\n")
        await writer.drain()
    finally:
        writer.close()
