"""A streaming client of the OpenAI API, for measurements: when a completion's tokens came.

On aiohttp: a chunk costs it 5 us of processor time, httpx 11 and the `openai` package 60 (a core of an EPYC).
At 64 streams of 230 tokens a second the last would measure itself.
"""

import dataclasses
import json
import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import aiohttp

_NOTHING: Mapping[str, Any] = MappingProxyType({})


class RefusedError(RuntimeError):
    """The server answered 429: it was asked for more than it promises."""


@dataclasses.dataclass(slots=True)
class Timeline:
    """One request: when it was due, and when its chunks came (time.perf_counter(), seconds).

    A chunk may bring several tokens; num_tokens and num_prompt_tokens are the server's own counts.
    """

    due: float
    arrivals: list[float] = dataclasses.field(default_factory=list)
    num_tokens: int = 0
    num_prompt_tokens: int = 0

    @property
    def ttft(self) -> float:
        return self.arrivals[0] - self.due

    @property
    def gaps(self) -> list[float]:
        return [b - a for a, b in zip(self.arrivals, self.arrivals[1:], strict=False)]

    @property
    def tpot(self) -> float:
        return (self.arrivals[-1] - self.arrivals[0]) / (self.num_tokens - 1)


async def complete(
    session: aiohttp.ClientSession,
    url: str,
    model: str,
    prompt: str | list[int],
    max_tokens: int,
    timeline: Timeline,
    *,
    fields: Mapping[str, Any] = _NOTHING,
    headers: Mapping[str, str] = _NOTHING,
) -> None:
    """A greedy completion of exactly so many tokens, noted on the timeline as it comes.

    fields: of the request's body, further ones or others. Raises RefusedError for 429, RuntimeError for
    another answer that is an error.
    """
    body = {
        "model": model,
        "prompt": prompt,
        "temperature": 0,
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        **fields,
    }
    async with session.post(f"{url}/v1/completions", json=body, headers=headers) as response:
        if response.status == 429:
            raise RefusedError(await response.text())
        if response.status != 200:
            raise RuntimeError(f"{response.status}: {await response.text()}")
        async for line in response.content:
            if line.startswith(b"data: {"):
                _note(json.loads(line[6:]), timeline)


def _note(chunk: dict[str, Any], timeline: Timeline) -> None:
    if "error" in chunk:
        raise RuntimeError(str(chunk["error"]))
    # Some servers end with a chunk that brings a reason and no text.
    if chunk["choices"] and (chunk["choices"][0]["text"] or not timeline.arrivals):
        timeline.arrivals.append(time.perf_counter())
    if usage := chunk.get("usage"):
        timeline.num_tokens = usage["completion_tokens"]
        timeline.num_prompt_tokens = usage["prompt_tokens"]
