"""Drafts on real text: what of the output is copied from the prompt comes several tokens a step.

Prompts are made from functions of Python's own library: renaming a function (code edit), picking lines
(extraction), and, as a control without anything to copy, a story.
"""

import inspect
import textwrap
import time
from collections.abc import AsyncIterator, Callable
from statistics import median
from typing import Any

import aiohttp

from deploy.bench.client import Streams, Timeline

Row = dict[str, Any]
_SOURCES: tuple[Callable[..., Any], ...] = (
    textwrap.dedent,
    textwrap.shorten,
    inspect.getmodulename,
    inspect.cleandoc,
)
_MAX_TOKENS = 192
_PREMISES = ("a lighthouse", "a market in the rain", "two brothers", "the last train")
KINDS = ("code edit", "extraction", "story")


def prompts(kind: str) -> list[str]:
    """In the chat form of SmolLM2. Raises ValueError for an unknown kind."""
    if kind == "story":
        return [_chat(f"Write a short story about {premise}.") for premise in _PREMISES]
    sources = [inspect.getsource(function) for function in _SOURCES]
    if kind == "code edit":
        return [
            _chat(
                f"Rename the function {f.__name__} to renamed and print all of its code again, unchanged "
                f"otherwise:\n\n```python\n{source}```"
            )
            for f, source in zip(_SOURCES, sources, strict=True)
        ]
    if kind == "extraction":
        return [
            _chat(f"Copy the documentation string of this function, word by word:\n\n{source}")
            for source in sources
        ]
    raise ValueError(f"unknown kind {kind!r} (known: {', '.join(KINDS)})")


def _chat(question: str) -> str:
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


async def measure(
    streams: Streams, url: str, model: str, speculative_tokens: int, rounds: int
) -> AsyncIterator[Row]:
    """A row for each kind, one stream at a time, on a server that drafts so many tokens at most.

    accepted: share of the drafted tokens that verification kept. Answers end where the model ends them.
    """
    for kind in KINDS:
        for prompt in prompts(kind):  # not counted: warms up, and leaves nothing (no prefix cache)
            await _send(streams, url, model, prompt)
        before = await _stats(url)
        begin = time.perf_counter()
        timelines = [await _send(streams, url, model, p) for _ in range(rounds) for p in prompts(kind)]
        seconds = time.perf_counter() - begin
        after = await _stats(url)
        drafted = after["total_draft_tokens"] - before["total_draft_tokens"]
        accepted = after["total_accepted_tokens"] - before["total_accepted_tokens"]
        yield {
            "kind": kind,
            "speculative_tokens": speculative_tokens,
            "tok_s": round(sum(t.num_tokens for t in timelines) / seconds, 1),
            "decode_tok_s": round(median(1 / t.tpot for t in timelines if t.num_tokens > 1), 1),
            "ttft_ms": round(1e3 * median(t.ttft for t in timelines), 2),
            "output_tokens": sum(t.num_tokens for t in timelines),
            "drafted": drafted,
            "accepted": round(accepted / drafted, 3) if drafted else None,
        }


async def _send(streams: Streams, url: str, model: str, prompt: str) -> Timeline:
    timeline = Timeline(time.perf_counter())
    await streams.complete(url, model, prompt, _MAX_TOKENS, timeline, fields={"ignore_eos": False})
    return timeline


async def _stats(url: str) -> dict[str, Any]:
    async with aiohttp.ClientSession() as session, session.get(f"{url}/stats") as response:
        response.raise_for_status()
        found: dict[str, Any] = await response.json()
        return found
