"""A streaming load in this process's event loop, for runs that also do something to the cluster meanwhile."""

import asyncio
import json
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import aiohttp

_TIMEOUT_S = 120.0
_WORDS = ("river", "stone", "light", "winter", "garden", "letter", "market", "engine", "silver", "bridge")


@dataclass
class Stream:
    """What became of one request. Times are time.monotonic()."""

    sent_at: float
    status: int = 0
    num_tokens: int = 0
    first_token_at: float | None = None
    ended_at: float = 0.0
    end: str = "hangs"
    """complete, error event, refused, aborted, or what went wrong."""
    route: str = ""
    is_shut_well: bool = True
    """The body ended with its last chunk."""


@dataclass
class OpenLoop:
    """Poisson arrivals at `rate` a second until `stop`; a share of clients leaves after three tokens."""

    url: str
    model: str
    rate: float
    abort_share: float = 0.0
    prompt_words: tuple[int, int] = (5, 200)
    output_tokens: tuple[int, int] = (10, 60)
    seed: int = 0
    streams: list[Stream] = field(default_factory=list)
    _is_stopping: bool = False

    async def run(self) -> None:
        random_ = random.Random(self.seed)
        timeout = aiohttp.ClientTimeout(total=_TIMEOUT_S)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
            jobs, due = [], time.monotonic()
            while not self._is_stopping:
                due += random_.expovariate(self.rate)
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                num_words, num_tokens = (
                    random_.randint(*self.prompt_words),
                    random_.randint(*self.output_tokens),
                )
                prompt = " ".join(random_.choices(_WORDS, k=num_words))
                stream = Stream(due)
                self.streams.append(stream)
                leaves = random_.random() < self.abort_share
                body = self._body(prompt, num_tokens)
                jobs.append(asyncio.create_task(self._one(session, body, stream, leaves)))
            await asyncio.gather(*jobs)

    async def long_stream(self, num_tokens: int) -> Stream:
        """One stream beside the others, counted with them."""
        stream = Stream(time.monotonic())
        self.streams.append(stream)
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=_TIMEOUT_S)) as session:
            await self._one(session, self._body("long", num_tokens), stream, leaves=False)
        return stream

    def stop(self) -> None:
        self._is_stopping = True

    def _body(self, prompt: str, num_tokens: int) -> dict[str, Any]:
        return {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": num_tokens,
            "ignore_eos": True,
            "stream": True,
        }

    async def _one(
        self, session: aiohttp.ClientSession, body: dict[str, Any], stream: Stream, leaves: bool
    ) -> None:
        try:
            async with session.post(f"{self.url}/v1/chat/completions", json=body) as response:
                stream.status = response.status
                stream.route = response.headers.get("x-peregrine-route", "")
                if response.status == 429 and "Retry-After" in response.headers:
                    stream.end = "refused"
                elif response.status != 200:
                    stream.end = f"status {response.status}: {(await response.text())[:120]}"
                else:
                    await self._read(response, stream, leaves)
        except (TimeoutError, aiohttp.ClientError) as error:
            if stream.end == "hangs":
                stream.end = f"{type(error).__name__} after {stream.num_tokens} tokens"
            stream.is_shut_well = False
        stream.ended_at = time.monotonic()

    async def _read(self, response: aiohttp.ClientResponse, stream: Stream, leaves: bool) -> None:
        async for line in response.content:
            if not line.startswith(b"data: "):
                continue
            if line == b"data: [DONE]\n":
                stream.end = stream.end if stream.end == "error event" else "complete"
                continue  # up to the last chunk: a body that is cut after it is cut all the same
            payload = json.loads(line[6:])
            if "error" in payload:
                assert set(payload["error"]) == {"message", "type", "param", "code"}
                stream.end = "error event"
            elif payload["choices"] and payload["choices"][0]["delta"].get("content"):
                stream.num_tokens += 1
                stream.first_token_at = stream.first_token_at or time.monotonic()
                if leaves and stream.num_tokens == 3:
                    stream.end = "aborted"
                    response.close()
                    return
        if stream.end == "hangs":
            stream.end = f"ended without [DONE] after {stream.num_tokens} tokens"

    def ends(self) -> dict[str, int]:
        return dict(Counter(s.end for s in self.streams).most_common())
