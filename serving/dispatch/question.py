"""HAProxy's question, answered where it comes in.

Its action asks over HTTP/1.0, one question a connection (Ray Serve 2.60, `ingress_request_router.lua.tmpl`).
The frames of uvicorn and Ray Serve around an ASGI app would take as long again as the decision: 0.3 ms, and
0.4 where everything has been idle. Whatever else comes is theirs.
"""

import asyncio
import re
from collections.abc import Callable
from typing import Any, cast

import uvicorn.config
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

_LINE = b"POST /internal/route HTTP/1.0\r\n"
_MAX_HEAD_BYTES = 16_384
_WHOLE_WITHIN_S = 5.0  # HAProxy itself waits for 3 s
_LENGTH = re.compile(rb"\r\nContent-Length: (\d{1,12})\r\n")
_TRUNCATED = re.compile(rb"\r\nX-Body-Truncated: \d{1,12}/(\d{1,12})\r\n")

Answer = Callable[[bytes, int], bytes]
"""(the body or its beginning, the whole body's length) -> an HTTP response."""


def answer_questions(answer: Answer) -> None:
    """Of servers that are started in this process from now on."""

    def create(
        config: Config, server_state: ServerState, app_state: dict[str, Any], _loop: Any = None
    ) -> QuestionProtocol:
        return QuestionProtocol(answer, config, server_state, app_state)

    # The table that uvicorn looks its own protocols up in; Ray Serve lets nobody name another.
    uvicorn.config.HTTP_PROTOCOLS["auto"] = create  # type: ignore[assignment]


class QuestionProtocol(asyncio.Protocol):
    """One connection. What is no question goes to uvicorn's protocol, from its first byte on."""

    def __init__(
        self, answer: Answer, config: Config, server_state: ServerState, app_state: dict[str, Any]
    ) -> None:
        self._answer = answer
        self._config, self._server_state, self._app_state = config, server_state, app_state
        self._transport: asyncio.Transport | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._data = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are no instances of it
        self._server_state.connections.add(self)  # type: ignore[arg-type]  # it has their `shutdown`
        self._deadline = asyncio.get_running_loop().call_later(_WHOLE_WITHIN_S, transport.close)

    def connection_lost(self, error: Exception | None) -> None:
        self._leave()

    def shutdown(self) -> None:
        """The server ends: a question that has begun has its answer, as far as it comes."""
        if self._transport is not None and not self._data:
            self._transport.close()

    def data_received(self, data: bytes) -> None:
        self._data += data
        head, end, body = self._data.partition(b"\r\n\r\n")
        is_question = self._data.startswith(_LINE) or (not end and _LINE.startswith(self._data))
        length = _LENGTH.search(head + b"\r\n") if end else None
        if not is_question or (end and length is None) or len(head) > _MAX_HEAD_BYTES:
            self._hand_over()
        elif length is not None and len(body) >= (num_bytes := int(length[1])):
            truncated = _TRUNCATED.search(head + b"\r\n")
            assert self._transport is not None, "made"
            self._transport.write(
                self._answer(body[:num_bytes], int(truncated[1]) if truncated else num_bytes)
            )
            self._transport.close()

    def _hand_over(self) -> None:
        assert self._transport is not None, "made"
        self._leave()
        other = HttpToolsProtocol(
            config=self._config, server_state=self._server_state, app_state=self._app_state
        )
        other.connection_made(self._transport)
        self._transport.set_protocol(other)
        other.data_received(self._data)

    def _leave(self) -> None:
        self._server_state.connections.discard(self)
        if self._deadline is not None:
            self._deadline.cancel()
