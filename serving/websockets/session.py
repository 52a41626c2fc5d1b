"""One open connection: a request at a time, which the client may interrupt."""

import asyncio
import contextlib
import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic_core import from_json
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine import EngineDeadError
from serving.dispatch.headers import ROUTER_PREFIX
from serving.dispatch.unrouted import unrouted_headers
from serving.errors import ApiError, from_engine
from serving.state import ReplicaState
from serving.stream_guard import Watch
from serving.telemetry.exchange import Exchange
from serving.websockets.framing import ResponseFrames, done_frame, error_frame, last_words
from serving.websockets.settings import MAX_SESSION_S

# Of IANA's registry of close codes.
GOING_AWAY, POLICY_VIOLATION, SERVICE_RESTART, TRY_AGAIN_LATER = 1001, 1008, 1012, 1013
_KILLED = EngineDeadError("the replica's process ended")
# After a request that ended so, the next one would fare no better here.
_CLOSE_AFTER = {401: (POLICY_VIOLATION, "the key is not valid"), 503: (TRY_AGAIN_LATER, "connect again")}
_MAX_REFUSED = 32
# A client that reads nothing for so long is treated as one that has left.
_SEND_TIMEOUT_S = 30.0
# A longer frame is a request.
_MAX_CONTROL_CHARS = 256
# Of the handshake, or said anew for each request.
_LEFT_OUT = (
    b"connection",
    b"upgrade",
    b"content-",
    b"transfer-encoding",
    b"x-request-id",
    b"sec-websocket-",
    ROUTER_PREFIX.encode(),
)


@dataclass(slots=True)
class _Request:
    """The one that runs."""

    request_id: str
    task: asyncio.Task[None]
    frames: ResponseFrames
    state: dict[str, Any]
    """Its scope's, which has its `exchange`."""
    watch: Watch


class Session:
    """Runs each text frame through `app` as the body of a POST to the connection's path, so that a frame is
    checked, limited, counted and logged as any request is.

    headers: of the handshake, with the caller's key.
    """

    def __init__(
        self,
        app: ASGIApp,
        state: ReplicaState,
        scope: Scope,
        headers: Mapping[bytes, bytes],
        request_id: str,
        receive: Receive,
        send: Send,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._app, self._state, self._scope = app, state, scope
        self._headers = [(name, value) for name, value in headers.items() if not name.startswith(_LEFT_OUT)]
        self._request_id = request_id
        self._receive, self._asgi_send, self._clock = receive, send, clock
        self._ends_at = clock() + MAX_SESSION_S
        self._idle_since = clock()
        self._num_requests = 0
        self._num_refused = 0
        self._has_left = False
        self._running: _Request | None = None

    async def run(self) -> None:
        """Until either side closes the connection; what runs then is aborted."""
        receiving: asyncio.Future[Message] | None = None
        leaving = asyncio.create_task(self._state.leaving.wait())
        try:
            while True:
                receiving = receiving or asyncio.ensure_future(self._receive())
                waited: set[asyncio.Future[Any]] = {receiving}
                if self._running is not None:
                    waited.add(self._running.task)
                else:
                    waited.add(leaving)  # what runs may end first
                done, _ = await asyncio.wait(
                    waited, timeout=self._patience_s(), return_when=asyncio.FIRST_COMPLETED
                )
                if not done:
                    await self._close(GOING_AWAY, "idle, or open for an hour")
                    return
                if self._running is not None and self._running.task in done:
                    status = await self._finish(self._running)
                    if status in _CLOSE_AFTER:
                        await self._close(*_CLOSE_AFTER[status])
                        return
                if receiving in done:
                    message, receiving = receiving.result(), None
                    if message["type"] == "websocket.disconnect":
                        return
                    await self._take(message.get("text"))
                    if self._num_refused > _MAX_REFUSED:
                        await self._close(POLICY_VIOLATION, "too many frames that are refused")
                        return
                if self._has_left:
                    return
                if leaving.done() and self._running is None:
                    await self._close(SERVICE_RESTART, "connect again")
                    return
        finally:
            open_tasks: list[asyncio.Future[Any]] = [leaving] if receiving is None else [leaving, receiving]
            if self._running is not None:
                self._running.watch.end()
                open_tasks.append(self._running.task)
            for task in open_tasks:
                task.cancel()
            await asyncio.gather(*open_tasks, return_exceptions=True)

    def _patience_s(self) -> float | None:
        """For the next frame; a running request has a deadline of its own."""
        if self._running is not None:
            return None
        until = min(self._idle_since + self._state.settings.websocket.idle_timeout_s, self._ends_at)
        return max(0.0, until - self._clock())

    async def _take(self, text: str | None) -> None:
        """text: None of a binary frame."""
        match _kind(text):
            case "cancel" if self._running is not None:
                self._running.task.cancel()
            case "cancel":
                # An answer may end while its cancellation is on the way: no reason to count it.
                message = "No request is running that could be cancelled."
                await self._send(error_frame(ApiError(400, message, code="no_active_request")))
            case "unknown":
                message = 'A frame must be a text frame: a request\'s JSON body, or {"type": "cancel"}.'
                await self._refuse(ApiError(400, message, param="type", code="invalid_frame"))
            case "request" if self._running is not None:
                message = "A request is running on this connection: await its done frame, or cancel it."
                await self._refuse(ApiError(409, message, code="request_in_progress"))
            case "request":
                assert text is not None
                self._num_refused = 0
                self._running = self._start(text.encode())

    def _start(self, body: bytes) -> _Request:
        self._num_requests += 1
        request_id = f"{self._request_id}-{self._num_requests}"
        own = {
            "content-type": "application/json",
            "content-length": str(len(body)),
            "x-request-id": request_id,
        }
        if self._state.links is not None:
            own |= unrouted_headers(body, self._state.settings.tiers)
        state: dict[str, Any] = {}
        scope = {
            # Without the connection's addresses: the stream guard is to write frames to it, not HTTP.
            **{
                key: self._scope[key]
                for key in ("app", "path", "raw_path", "root_path")
                if key in self._scope
            },
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "https" if self._scope.get("scheme") == "wss" else "http",
            "query_string": b"",
            "headers": [*self._headers, *((name.encode(), value.encode()) for name, value in own.items())],
            "state": state,
        }
        frames = ResponseFrames(self._send)
        task = asyncio.create_task(self._compute(scope, body, frames))
        words = functools.partial(last_words, from_engine(_KILLED), request_id, SERVICE_RESTART)
        watch = Watch(self._state.guard, self._scope, words)
        watch.begin()
        return _Request(request_id, task, frames, state, watch)

    async def _compute(self, scope: Scope, body: bytes, frames: ResponseFrames) -> None:
        is_read = False

        async def receive() -> Message:
            nonlocal is_read
            if is_read:
                await asyncio.Event().wait()  # a client that leaves cancels the task
            is_read = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, receive, frames.take)

    async def _finish(self, request: _Request) -> int:
        """Say that it has ended, and how. Returns the response's status."""
        self._running, self._idle_since = None, self._clock()
        task, frames = request.task, request.frames
        if not task.cancelled() and (failure := task.exception()) is not None:
            frames.has_failed = True
            assert isinstance(failure, Exception)
            await self._send(error_frame(from_engine(failure)))
        end: Literal["completed", "cancelled", "failed"] = "failed" if frames.has_failed else "completed"
        if task.cancelled():
            end = "cancelled"
        exchange: Exchange | None = request.state.get("exchange")
        made = None if exchange is None else exchange.generation
        await self._send(done_frame(request.request_id, end, made, frames.limits()))
        request.watch.end()
        return frames.status

    async def _refuse(self, error: ApiError) -> None:
        self._num_refused += 1
        await self._send(error_frame(error))

    async def _send(self, text: str) -> None:
        if self._has_left:
            return
        try:
            async with asyncio.timeout(_SEND_TIMEOUT_S):
                await self._asgi_send({"type": "websocket.send", "text": text})
        except OSError:  # TimeoutError among them
            self._has_left = True
            if self._running is not None:
                self._running.task.cancel()

    async def _close(self, code: int, reason: str) -> None:
        with contextlib.suppress(OSError):
            await self._asgi_send({"type": "websocket.close", "code": code, "reason": reason})


def _kind(text: str | None) -> Literal["request", "cancel", "unknown"]:
    """What is not JSON is a request as well: its route says what is wrong with it."""
    if text is None:
        return "unknown"
    if len(text) > _MAX_CONTROL_CHARS:
        return "request"
    try:
        frame = from_json(text)
    except ValueError:
        return "request"
    if not isinstance(frame, dict) or "type" not in frame:
        return "request"
    return "cancel" if frame == {"type": "cancel"} else "unknown"
