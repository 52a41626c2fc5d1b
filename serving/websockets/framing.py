"""A request's frames: what its HTTP response says, one event or object a frame."""

import json
from collections.abc import Awaitable, Callable
from typing import Any, Literal

from starlette.datastructures import Headers
from starlette.types import Message
from websockets.frames import Close, Frame, Opcode

from serving.errors import ApiError
from serving.telemetry.exchange import Generation

End = Literal["completed", "cancelled", "failed"]
SendText = Callable[[str], Awaitable[None]]

_EVENT = b"data: "
_LAST_EVENT = b"[DONE]"
_ERROR = b'{"error":'
_LIMIT_HEADERS = ("retry-after", "x-should-retry", "x-ratelimit-")


class ResponseFrames:
    """Takes the ASGI messages of one response.

    Events become frames as they come, each its `data`; an answer in one piece becomes one frame. Errors are
    those of the API, with a type: {"type": "error", "status": 429, "error": {...}}; of one inside a stream
    nobody knows a status.
    """

    def __init__(self, send_text: SendText) -> None:
        self._send_text = send_text
        self._headers = Headers()
        self._body = bytearray()
        self.status = 0
        """0 until the response begins."""
        self.has_failed = False

    async def take(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status, self._headers = message["status"], Headers(raw=message["headers"])
            self.has_failed = self.status >= 400
            return
        body: bytes = message.get("body", b"")
        if self._headers.get("content-type", "").startswith("text/event-stream"):
            for event in body.split(b"\n\n"):  # JSON has no line breaks; a message holds whole events
                await self._take_event(event.removeprefix(_EVENT))
            return
        self._body += body
        if not message.get("more_body", False):
            text = self._body.decode()
            await self._send_text(_error(text, self.status) if self.has_failed else text)

    async def _take_event(self, data: bytes) -> None:
        if not data or data == _LAST_EVENT:
            return
        text = data.decode()
        if data.startswith(_ERROR):
            self.has_failed = True
            text = _error(text, None)
        await self._send_text(text)

    def limits(self) -> dict[str, str]:
        """What the response's headers say of the caller's limits."""
        return {name: value for name, value in self._headers.items() if name.startswith(_LIMIT_HEADERS)}


def last_words(error: ApiError, request_id: str, code: int) -> bytes:
    """A request's and its connection's last frames, as bytes: for whoever ends it in the server's place."""
    texts = (error_frame(error), done_frame(request_id, "failed", None, {}))
    frames = [Frame(Opcode.TEXT, text.encode()) for text in texts]
    frames.append(Frame(Opcode.CLOSE, Close(code, "").serialize()))
    return b"".join(frame.serialize(mask=False) for frame in frames)


def error_frame(error: ApiError) -> str:
    return _error(error.body().model_dump_json(), error.status_code)


def _error(body: str, status: int | None) -> str:
    known = "" if status is None else f'"status":{status},'
    return f'{{"type":"error",{known}{body.removeprefix("{")}'


def done_frame(request_id: str, end: End, made: Generation | None, limits: dict[str, str]) -> str:
    """The last frame of each request, whatever became of it.

    usage: tokens of the prompt, and those that were made before it ended; null where nothing was computed.
    """
    usage: dict[str, Any] | None = None
    if made is not None and made.first_token_s is not None:
        prompt, output = made.num_prompt_tokens, made.num_output_tokens
        usage = {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output}
    done = {"type": "done", "status": end, "request_id": request_id, "usage": usage, "headers": limits}
    return json.dumps(done, separators=(",", ":"))
