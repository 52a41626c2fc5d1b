"""A response, whole and as numbered events."""

import json
import time
from collections.abc import Callable, Iterable
from typing import Any

from engine import RequestOutput
from serving.api.generation import CollectedChoice
from serving.api.responses.objects import (
    IncompleteDetails,
    InputTokensDetails,
    Response,
    ResponseError,
    ResponseUsage,
)
from serving.api.responses.writer import AnswerWriter, Event
from serving.errors import ApiError
from serving.schemas import Usage
from serving.tools import ChatPlan, Message

Keep = Callable[[Response, Message], None]
"""Called with a response that has ended, and its answer, before the client knows."""


class ResponsePresenter:
    """response: as it is before anything of it is there."""

    def __init__(self, response: Response, plan: ChatPlan, keep: Keep) -> None:
        self._response = response
        self._keep = keep
        own_id = response.id.removeprefix("resp_")
        self._writer = AnswerWriter(plan.parser(), lambda kind, number: f"{kind}_{own_id}_{number}")
        self._num_events = 0
        self._is_cut = False

    def complete(self, choices: dict[tuple[int, int], CollectedChoice], usage: Usage) -> Response:
        [choice] = choices.values()
        self._is_cut = choice.finish_reason == "length"
        for _ in self._writer.feed(choice.text, choice.logprobs):
            pass
        for _ in self._writer.finish(is_cut=self._is_cut):
            pass
        return self._ended(usage)

    def chunks(self, number: int, output: RequestOutput) -> bytes:
        chunk = b""
        if self._num_events == 0:
            response = self._response.model_dump()
            chunk = self._events(
                [("created", {"response": response}), ("in_progress", {"response": response})]
            )
        if output.text or output.logprobs:
            chunk += self._events(self._writer.feed(output.text, output.logprobs or ()))
        if output.finish_reason is not None:
            self._is_cut = output.finish_reason == "length"
            chunk += self._events(self._writer.finish(is_cut=self._is_cut))
        return chunk

    def end(self, usage: Usage) -> bytes:
        response = self._ended(usage)
        return self._events([(response.status, {"response": response.model_dump()})])

    def failure(self, error: ApiError) -> bytes:
        code = "rate_limit_exceeded" if error.status_code == 429 else "server_error"
        response = self._response.model_copy(
            update={
                "status": "failed",
                "error": ResponseError(code=code, message=str(error.detail)),  # type: ignore[arg-type]
                "output": self._writer.items,
            }
        )
        told = {"code": error.code, "message": str(error.detail), "param": error.param}
        first = _event("error", self._num_events, told)
        return first + _event("response.failed", self._num_events + 1, {"response": response.model_dump()})

    def _ended(self, usage: Usage) -> Response:
        response = self._response.model_copy(
            update={
                "status": "incomplete" if self._is_cut else "completed",
                "completed_at": None if self._is_cut else int(time.time()),
                "incomplete_details": IncompleteDetails() if self._is_cut else None,
                "output": self._writer.items,
                "usage": ResponseUsage(
                    input_tokens=usage.prompt_tokens,
                    input_tokens_details=InputTokensDetails(
                        cached_tokens=usage.prompt_tokens_details.cached_tokens
                    ),
                    output_tokens=usage.completion_tokens,
                    total_tokens=usage.total_tokens,
                ),
            }
        )
        self._keep(response, self._writer.as_message())
        return response

    def _events(self, events: Iterable[Event]) -> bytes:
        written = []
        for kind, fields in events:
            written.append(_event(f"response.{kind}", self._num_events, fields))
            self._num_events += 1
        return b"".join(written)


def _event(kind: str, number: int, fields: dict[str, Any]) -> bytes:
    data = json.dumps(
        {"type": kind, "sequence_number": number, **fields}, ensure_ascii=False, separators=(",", ":")
    )
    return f"event: {kind}\ndata: {data}\n\n".encode()
