"""What happens to a request around its route: id and arrival time, API key, size limit, HTTP metrics, and the
news of its end for those who observe.

Pure ASGI: Starlette's BaseHTTPMiddleware would put a task and a queue between the engine and the client.
"""

import asyncio
import functools
import re
import time
import uuid
from collections.abc import Callable, Mapping

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.api.anthropic.errors import anthropic_response, speaks_anthropic
from serving.callers import Callers
from serving.dispatch.headers import DECIDED, FLIGHT, PEREGRINE_ROUTE, ROUTE
from serving.dispatch.reporter import Flight
from serving.errors import ApiError, from_engine
from serving.state import ReplicaState
from serving.telemetry.exchange import CLIENT_GONE, UNKNOWN_ROUTE, Exchange
from serving.tenants.visit import Visit

_SANE_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
_INSANE = re.compile(rb"[^A-Za-z0-9._-]")
_TRACE_HEADERS = ("traceparent", "tracestate")


class FrontDoor:
    """Stamps `scope["state"]` with `arrival_time` (time.monotonic()), `exchange`, `flight`, `answer_error`
    (a failure as a response in the form of the API that the request speaks) and `visit` (what its caller may
    do), once.

    `exchange` is filled on the way and handed to the state's observers when the last byte is gone.
    `flight` is the request in its router's books, None if no router sent it; whatever becomes of the request,
    the router hears of its end from here.
    `answers_with_id`: put an `x-request-id` on every response (Ray Serve does so itself).
    """

    def __init__(self, app: ASGIApp, state: ReplicaState, *, answers_with_id: bool) -> None:
        self._app = app
        self._answers_with_id = answers_with_id
        self._state = state
        self._settings = state.settings
        self._recorder = state.recorder
        self._callers = Callers(state)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        arrival = time.monotonic()
        headers = dict(scope["headers"])
        flight = self._flight(headers, arrival)
        request_id = request_id_of(headers)
        exchange = Exchange(request_id.decode(), scope["method"], arrival, replica=self._state.replica)
        exchange.status = 500  # until an answer begins
        exchange.trace_headers = trace_headers_of(headers)
        if flight is not None:
            exchange.routing = _decoded(headers, (ROUTE, DECIDED))
        is_anthropic = speaks_anthropic(scope["path"], headers)
        answer_error, added_headers = self._forms(is_anthropic, request_id)
        visit = Visit()
        state = scope.setdefault("state", {})
        state.update(arrival_time=arrival, flight=flight, exchange=exchange, answer_error=answer_error)

        has_begun = False

        async def send_noting_status(message: Message) -> None:
            nonlocal has_begun
            if message["type"] == "http.response.start":
                has_begun = True
                exchange.status = message["status"]
                added = list(added_headers)
                if flight is not None:
                    route = flight.explain(self._state.replica).encode("latin-1", "replace")
                    added.append((PEREGRINE_ROUTE.encode(), route))
                limits = visit.headers(is_anthropic=is_anthropic)
                added += [(name.encode(), value.encode()) for name, value in limits.items()]
                message["headers"] = [*message.get("headers", []), *added]
            elif not message.get("more_body", False):
                visit.leave()  # before the client can know of the end, and ask for its next request
            await send(message)

        try:
            state["visit"] = visit = self._callers.visit(scope["path"], headers, exchange)
            self._check_length(headers)
            await self._app(scope, self._limited(receive), send_noting_status)
        except ApiError as error:
            exchange.error = error.code
            await answer_error(error)(scope, receive, send_noting_status)
        except asyncio.CancelledError:
            if not has_begun:  # the server around this app ends it when its client is gone
                exchange.status = CLIENT_GONE
            raise
        except Exception as error:
            # Not left to the servers around this app: they would log its message, which may quote a prompt.
            told = from_engine(error)
            exchange.error = told.code
            if has_begun:
                raise
            await answer_error(told)(scope, receive, send_noting_status)
        finally:
            visit.leave()
            if flight is not None:  # no news where the route has told its end already
                flight.ended("failed" if exchange.status >= 500 else "aborted")
            route = scope.get("route")
            path = getattr(route, "path", UNKNOWN_ROUTE)
            exchange.route = path
            exchange.ended_s = time.monotonic()
            self._recorder.record_http(path, exchange.status, exchange.total_s)
            self._state.observe(exchange)

    def _forms(
        self, is_anthropic: bool, request_id: bytes
    ) -> tuple[Callable[[ApiError], Response], list[tuple[bytes, bytes]]]:
        """How the request's API tells a failure, and the headers that every response to it has."""
        added = [(b"x-request-id", request_id)] if self._answers_with_id else []
        if not is_anthropic:
            return ApiError.response, added
        added.append((b"request-id", request_id))
        return functools.partial(anthropic_response, request_id=request_id.decode()), added

    def _flight(self, headers: dict[bytes, bytes], arrival: float) -> Flight | None:
        if self._state.links is None:
            return None
        return self._state.links.flight(_decoded(headers, (FLIGHT, ROUTE)), arrival)

    def _check_length(self, headers: dict[bytes, bytes]) -> None:
        length = headers.get(b"content-length", b"")
        if length.isdigit() and int(length) > self._settings.max_body_bytes:
            raise self._too_large()

    def _limited(self, receive: Receive) -> Receive:
        num_bytes = 0

        async def limited() -> Message:
            nonlocal num_bytes
            message = await receive()
            if message["type"] == "http.request":
                num_bytes += len(message.get("body", b""))
                if num_bytes > self._settings.max_body_bytes:
                    raise self._too_large()
            return message

        return limited

    def _too_large(self) -> ApiError:
        limit = self._settings.max_body_bytes
        return ApiError(413, f"The body is larger than the limit of {limit} bytes.", code="request_too_large")


def request_id_of(headers: Mapping[bytes, bytes]) -> bytes:
    """The client's, or one that stands in its place: it goes into log lines."""
    given = headers.get(b"x-request-id", b"")
    if not given:
        return uuid.uuid4().hex.encode()
    return given if _SANE_ID.fullmatch(given) else _INSANE.sub(b"_", given)[:64]


def trace_headers_of(headers: Mapping[bytes, bytes]) -> dict[str, str]:
    """W3C trace context, where there is one."""
    return _decoded(headers, _TRACE_HEADERS)


def _decoded(headers: Mapping[bytes, bytes], names: tuple[str, ...]) -> dict[str, str]:
    return {name: headers[key].decode("latin-1") for name in names if (key := name.encode()) in headers}
