"""Getting bytes to a client that may leave at any time."""

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, TypeVar

from fastapi import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from serving.errors import ApiError
from serving.stream_guard import StreamGuard, chunked

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"


class ClientGone(Exception):
    """The client closed the connection before it had its answer."""


class SseResponse(StreamingResponse):
    """Server-sent events from a generator, which is closed at once when the client leaves.

    guard: ends the stream with `last_words` if this process is killed.
    """

    media_type = "text/event-stream"

    def __init__(
        self, chunks: AsyncGenerator[bytes, None], guard: StreamGuard | None, last_words: bytes
    ) -> None:
        # no-transform, no buffering: a proxy that collects chunks would undo the streaming.
        headers = {"Cache-Control": "no-cache, no-transform", "X-Accel-Buffering": "no"}
        super().__init__(chunks, headers=headers)
        self._chunks = chunks
        self._guard = guard
        self._last_words = last_words
        self._scope: Scope = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._scope = scope
        await super().__call__(scope, receive, send)

    async def stream_response(self, send: Send) -> None:
        watch = None
        if self._guard is not None:
            watch = self._guard.watch(self._scope, chunked(self._last_words))
        try:
            async with contextlib.aclosing(self._chunks):
                await super().stream_response(send)
        finally:
            if watch is not None and self._guard is not None:
                self._guard.release(watch)


def event(payload: object) -> bytes:
    return b"data: " + json.dumps(payload, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def error_event(error: ApiError) -> bytes:
    """The error object as an event: the status line has long been sent."""
    return event(error.body().model_dump())


async def unless_client_leaves(request: Request, work: Coroutine[Any, Any, T], deadline: float) -> T:
    """Await `work`, cancelling it when the client disconnects or the loop's clock passes `deadline`.

    Raises ClientGone, TimeoutError, or what `work` raises.
    """
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnect(request))
    try:
        timeout = deadline - asyncio.get_running_loop().time()
        await asyncio.wait({task, watcher}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone if watcher.done() else TimeoutError
    finally:
        for pending in (task, watcher):
            pending.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
