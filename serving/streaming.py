"""Getting bytes to a client that may leave at any time."""

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Awaitable
from typing import TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serving.errors import ApiError
from serving.stream_guard import Watch

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"
_HEADERS = [
    # no-transform, no buffering: a proxy that collects chunks would undo the streaming.
    (b"cache-control", b"no-cache, no-transform"),
    (b"x-accel-buffering", b"no"),
    (b"content-type", b"text/event-stream; charset=utf-8"),
]


class ClientGone(Exception):
    """The client closed the connection before it had its answer."""


class SseResponse(Response):
    """Server-sent events from a generator, which is closed at once when the client leaves.

    Starlette's StreamingResponse sends from a task of its own, for which a first chunk that is there already
    would wait. Here that task sends the others, so that a chunk passes none of the frames around the app.

    watch: of this stream; it is over when the stream is.
    """

    def __init__(self, chunks: AsyncGenerator[bytes, None], watch: Watch | None = None) -> None:
        self.status_code = 200
        self.background = None
        self.raw_headers = list(_HEADERS)
        self._chunks = chunks
        self._watch = watch

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            if self._watch is not None:
                self._watch.begin()  # if it has not already
            async with contextlib.aclosing(self._chunks):
                with contextlib.suppress(ClientGone):
                    await unless_client_leaves(receive, self._send_first(send))
                    await unless_client_leaves(receive, asyncio.create_task(self._send_rest(send)))
        finally:
            if self._watch is not None:
                self._watch.end()

    async def _send_first(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        if (chunk := await anext(self._chunks, None)) is not None:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})

    async def _send_rest(self, send: Send) -> None:
        async for chunk in self._chunks:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def event(payload: object) -> bytes:
    return b"data: " + json.dumps(payload, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def error_event(error: ApiError) -> bytes:
    """The error object as an event: the status line has long been sent."""
    return event(error.body().model_dump())


async def unless_client_leaves(receive: Receive, work: Awaitable[T], deadline: float | None = None) -> T:
    """Await `work`, cancelling it when the client disconnects or the loop's clock passes `deadline`.

    In the caller's own task: what `work` waits for wakes that, and nothing in between.

    Raises ClientGone, TimeoutError, or what `work` raises.
    """
    loop = asyncio.get_running_loop()
    watcher = None
    try:
        async with asyncio.timeout_at(deadline) as limit:

            async def watch() -> None:
                while (await receive())["type"] != "http.disconnect":
                    pass
                limit.reschedule(loop.time())

            watcher = loop.create_task(watch())
            return await work
    except TimeoutError:
        if watcher is not None and watcher.done():
            raise ClientGone from None
        raise
    finally:
        if watcher is not None:
            watcher.cancel()
