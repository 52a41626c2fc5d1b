"""A streaming client of the OpenAI API, for measurements: when a completion's tokens came.

It notes when bytes came and looks into them when the answer has ended, so that it measures the server and not
itself. Where everything has been idle for a while a request through aiohttp takes 0.5 ms longer to its first
token (one core of an EPYC), and where an engine keeps all cores busy 1 to 2 ms.
"""

import asyncio
import contextlib
import dataclasses
import json
import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Self, cast
from urllib.parse import SplitResult, urlsplit

import httptools

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


class Streams:
    """Connections, each of which carries one request at a time and is used again. To be closed: `async with`.

    timeout_s: of a whole request, its connection included.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._idle: dict[str, list[_Connection]] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for connections in self._idle.values():
            for connection in connections:
                connection.close()
        self._idle.clear()

    async def complete(
        self,
        url: str,
        model: str,
        prompt: str | list[int],
        max_tokens: int,
        timeline: Timeline,
        *,
        fields: Mapping[str, Any] = _NOTHING,
        headers: Mapping[str, str] = _NOTHING,
    ) -> None:
        """A greedy completion of exactly so many tokens, noted on the timeline when it has come.

        fields: of the request's body, further ones or others. Raises what `send` raises.
        """
        request = completion(url, model, prompt, max_tokens, fields=fields, headers=headers)
        await self.send(url, request, timeline)

    async def send(self, url: str, request: bytes, timeline: Timeline) -> None:
        """What `completion` made for this server, as `complete` does it.

        Raises RefusedError for 429, RuntimeError for another answer that is an error, OSError (TimeoutError
        and ConnectionError among them).
        """
        async with asyncio.timeout(self._timeout_s):
            answer = await self._send(url, request)
        if answer.status != 200:
            text = b"".join(piece for _, piece in answer.pieces).decode(errors="replace")
            raise RefusedError(text) if answer.status == 429 else RuntimeError(f"{answer.status}: {text}")
        for came_at, line in answer.lines():
            if line.startswith(b"data: {"):
                _note(json.loads(line[6:]), came_at, timeline)

    async def _send(self, url: str, request: bytes) -> "_Answer":
        idle = self._idle.setdefault(url, [])
        while idle:
            connection = idle.pop()
            with contextlib.suppress(_GoneError):  # the server had closed it: the next one, or a new one
                return await self._ask(connection, request, idle)
        return await self._ask(await _connect(urlsplit(url)), request, idle)

    async def _ask(self, connection: "_Connection", request: bytes, idle: list["_Connection"]) -> "_Answer":
        try:
            answer = await connection.ask(request)
        except BaseException:
            connection.close()
            raise
        if answer.is_reusable:
            idle.append(connection)
        else:
            connection.close()
        return answer


def completion(
    url: str,
    model: str,
    prompt: str | list[int],
    max_tokens: int,
    *,
    fields: Mapping[str, Any] = _NOTHING,
    headers: Mapping[str, str] = _NOTHING,
) -> bytes:
    """The request for `Streams.send`. Made before it is due, it costs the server's latency nothing."""
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
    return _request(urlsplit(f"{url}/v1/completions"), json.dumps(body).encode(), headers)


class _GoneError(ConnectionError):
    """The connection ended before the first byte of an answer."""


@dataclasses.dataclass(slots=True)
class _Answer:
    status: int = 0
    pieces: list[tuple[float, bytes]] = dataclasses.field(default_factory=list)
    """Of the body, with the time when each came."""
    is_reusable: bool = False

    def lines(self) -> list[tuple[float, bytes]]:
        """Each with the time when its end came."""
        found, rest = [], b""
        for came_at, piece in self.pieces:
            *whole, rest = (rest + piece).split(b"\n")
            found += [(came_at, line) for line in whole]
        return found


class _Connection(asyncio.Protocol):
    """HTTP/1.1; the parser is uvicorn's, in C."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._answer = _Answer()
        self._ended: asyncio.Future[None] | None = None
        self._now = 0.0

    async def ask(self, request: bytes) -> _Answer:
        """Raises _GoneError, ConnectionError."""
        if self._transport is None or self._transport.is_closing():
            raise _GoneError
        self._answer = _Answer()
        self._ended = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        await self._ended
        return self._answer

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are no instances of it

    def data_received(self, data: bytes) -> None:
        self._now = time.perf_counter()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._end(ConnectionError(f"no HTTP: {error}"))
            self.close()

    def connection_lost(self, error: Exception | None) -> None:
        has_begun = bool(self._answer.status)
        self._end(
            ConnectionError(f"the answer was cut off: {error}") if has_begun else _GoneError(str(error))
        )

    def on_headers_complete(self) -> None:
        self._answer.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        self._answer.pieces.append((self._now, body))

    def on_message_complete(self) -> None:
        self._answer.is_reusable = self._parser.should_keep_alive()
        self._end(None)

    def _end(self, error: Exception | None) -> None:
        if self._ended is None or self._ended.done():
            return
        if error is None:
            self._ended.set_result(None)
        else:
            self._ended.set_exception(error)


async def _connect(url: SplitResult) -> _Connection:
    is_secret = url.scheme == "https"
    port = url.port or (443 if is_secret else 80)
    loop = asyncio.get_running_loop()
    _, connection = await loop.create_connection(_Connection, url.hostname or "", port, ssl=is_secret or None)
    return connection


def _request(url: SplitResult, body: bytes, headers: Mapping[str, str]) -> bytes:
    lines = [f"POST {url.path} HTTP/1.1", f"Host: {url.netloc}", "Content-Type: application/json"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode() + body


def _note(chunk: dict[str, Any], came_at: float, timeline: Timeline) -> None:
    if "error" in chunk:
        raise RuntimeError(str(chunk["error"]))
    # Some servers end with a chunk that brings a reason and no text.
    if chunk["choices"] and (chunk["choices"][0]["text"] or not timeline.arrivals):
        timeline.arrivals.append(came_at)
    if usage := chunk.get("usage"):
        timeline.num_tokens = usage["completion_tokens"]
        timeline.num_prompt_tokens = usage["prompt_tokens"]
