"""Who may open a WebSocket. What then comes over it are requests, each of which passes the `FrontDoor`."""

import contextlib
import time
from collections.abc import Mapping
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

from serving.callers import Callers
from serving.errors import ApiError, not_ready
from serving.middleware import request_id_of, trace_headers_of
from serving.state import ReplicaState
from serving.telemetry.exchange import Exchange
from serving.websockets.session import Session

PATHS = ("/v1/chat/completions", "/v1/completions")
KEY_PROTOCOL = "openai-insecure-api-key."
"""Browsers cannot set headers of a WebSocket: OpenAI's clients put the key into the list of protocols."""
_SWITCHING = 101


class WebSocketDoor:
    """Around the `FrontDoor`. A handshake is an exchange of its own, observed when it has been answered."""

    def __init__(self, app: ASGIApp, state: ReplicaState) -> None:
        self._app, self._state = app, state
        self._callers = Callers(state)
        self._num_open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "websocket":
            await self._app(scope, receive, send)
            return
        headers = _with_key(dict(scope["headers"]), scope.get("subprotocols", ()))
        request_id = request_id_of(headers).decode()
        exchange = Exchange(request_id, "GET", time.monotonic(), replica=self._state.replica)
        exchange.trace_headers = trace_headers_of(headers)
        await receive()  # websocket.connect
        try:
            self._check(scope, headers, exchange)
        except ApiError as error:
            self._observe(exchange, error.status_code, error.code)
            await _deny(scope, receive, send, error)
            return
        protocol = next((p for p in scope.get("subprotocols", ()) if not p.startswith(KEY_PROTOCOL)), None)
        self._observe(exchange, _SWITCHING, None)
        self._num_open += 1
        try:
            await send({"type": "websocket.accept", "subprotocol": protocol})
            await Session(self._app, self._state, scope, headers, request_id, receive, send).run()
        finally:
            self._num_open -= 1

    def _check(self, scope: Scope, headers: Mapping[bytes, bytes], exchange: Exchange) -> None:
        """Raises ApiError where this connection may not be opened."""
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if path not in PATHS:
            raise ApiError(404, f"There is no WebSocket here; there is one at {' and '.join(PATHS)}.")
        exchange.route = path
        self._callers.visit(path, headers, exchange)
        if not self._callers.need_keys:
            self._check_origin(headers)
        _ = self._state.engine  # raises while there is none
        if self._num_open >= self._state.settings.websocket.max_connections:
            raise not_ready("All connections of this replica are taken; retry later.")

    def _check_origin(self, headers: Mapping[bytes, bytes]) -> None:
        """Browsers let any page connect to any host, and no key stands in between."""
        origin = headers.get(b"origin", b"").decode("latin-1")
        allowed = self._state.settings.websocket.allowed_origins
        is_own = urlsplit(origin).netloc == headers.get(b"host", b"").decode("latin-1")
        if origin and not is_own and "*" not in allowed and origin not in allowed:
            raise ApiError(
                403,
                "Web pages of other hosts may connect only where API keys are asked for, or their origin is "
                "one of serving.websocket.allowed_origins.",
                code="origin_not_allowed",
            )

    def _observe(self, exchange: Exchange, status: int, error: str | None) -> None:
        exchange.status, exchange.error, exchange.ended_s = status, error, time.monotonic()
        self._state.recorder.record_http(exchange.route, status, exchange.total_s)
        self._state.observe(exchange)


def _with_key(headers: dict[bytes, bytes], protocols: list[str]) -> dict[bytes, bytes]:
    given = [p.removeprefix(KEY_PROTOCOL) for p in protocols if p.startswith(KEY_PROTOCOL)]
    return {b"authorization": f"Bearer {given[0]}".encode(errors="replace"), **headers} if given else headers


async def _deny(scope: Scope, receive: Receive, send: Send, error: ApiError) -> None:
    if "websocket.http.response" in scope.get("extensions", {}):
        await error.response()(scope, receive, send)
        return
    with contextlib.suppress(OSError):
        await send({"type": "websocket.close", "code": 1008, "reason": error.code or ""})
