"""One answer as Anthropic shows it: a message of content blocks, whole or as named server-sent events."""

import json
from collections.abc import Iterable
from typing import Literal

from pydantic_core import from_json

from engine import RequestOutput
from serving.api.anthropic.errors import anthropic_error
from serving.api.anthropic.responses import (
    MessageResponse,
    MessageUsage,
    ServiceTier,
    StopReason,
    TextContentBlock,
    ToolUseContentBlock,
    UsageAndTier,
)
from serving.api.generation import CollectedChoice, Job
from serving.errors import ApiError
from serving.schemas import Usage
from serving.tools import ArgumentsDelta, CallEnd, CallStart, ParserEvent, TextDelta, ToolCallParser

_PING = b'event: ping\ndata: {"type":"ping"}\n\n'


class MessagePresenter:
    """Shows the one choice of a job.

    parser: a fresh one.
    tier: in the answer's usage.
    request_id: in the event of a failure.
    """

    def __init__(self, job: Job, parser: ToolCallParser, tier: ServiceTier, request_id: str) -> None:
        self._job = job
        self._parser = parser
        self._tier = tier
        self._request_id = request_id
        self._has_begun = False
        self._num_blocks = 0
        self._open: Literal["text", "tool_use"] | None = None
        self._stop: tuple[StopReason, str | None] = ("end_turn", None)

    def complete(self, choices: dict[tuple[int, int], CollectedChoice], usage: Usage) -> MessageResponse:
        choice = choices[0, 0]
        events = [*self._parser.feed(choice.text), *self._parser.finish()]
        reason, sequence = self._stopped(choice.finish_reason, choice.stop_reason, usage.completion_tokens)
        return self._message(_blocks(events), _usage_of(usage), reason, sequence)

    def chunks(self, number: int, output: RequestOutput) -> bytes:
        chunk = b""
        if not self._has_begun:
            self._has_begun = True
            chunk = self._beginning(output)
        events = self._parser.feed(output.text)
        if output.finish_reason is not None:
            events = [*events, *self._parser.finish()]
        for event in events:
            chunk += self._write(event)
        if output.finish_reason is not None:
            chunk += self._close()
            self._stop = self._stopped(output.finish_reason, output.stop_reason, output.num_output_tokens)
        return chunk

    def end(self, usage: Usage) -> bytes:
        reason, sequence = self._stop
        delta = _compact({"stop_reason": reason, "stop_sequence": sequence})
        shown = _usage_of(usage).model_dump_json()
        return _event("message_delta", f'"delta":{delta},"usage":{shown}') + _event("message_stop")

    def failure(self, error: ApiError) -> bytes:
        body = anthropic_error(error, self._request_id).model_dump_json(exclude_none=True)
        return f"event: error\ndata: {body}\n\n".encode()

    def _message(
        self,
        content: list[TextContentBlock | ToolUseContentBlock],
        usage: MessageUsage,
        stop_reason: StopReason | None,
        stop_sequence: str | None,
    ) -> MessageResponse:
        return MessageResponse(
            id=self._job.request_id,
            model=self._job.model,
            content=content,
            stop_reason=stop_reason,
            stop_sequence=stop_sequence,
            usage=UsageAndTier(**usage.model_dump(), service_tier=self._tier),
        )

    def _beginning(self, output: RequestOutput) -> bytes:
        usage = _usage(output.num_prompt_tokens, output.num_cached_tokens, output.num_output_tokens)
        message = self._message([], usage, None, None)
        return _event("message_start", f'"message":{message.model_dump_json()}')

    def _write(self, event: ParserEvent) -> bytes:
        match event:
            case TextDelta(text):
                begin = b"" if self._open == "text" else self._begin("text", {"type": "text", "text": ""})
                return begin + self._delta(f'{{"type":"text_delta","text":{json.dumps(text)}}}')
            case CallStart(_, id, name):
                return self._begin("tool_use", {"type": "tool_use", "id": id, "name": name, "input": {}})
            case ArgumentsDelta(_, text):
                return self._delta(f'{{"type":"input_json_delta","partial_json":{json.dumps(text)}}}')
            case CallEnd():
                return self._close()

    def _begin(self, kind: Literal["text", "tool_use"], block: dict[str, object]) -> bytes:
        begin = self._close()
        self._open = kind
        begin += _event(
            "content_block_start", f'"index":{self._num_blocks},"content_block":{_compact(block)}'
        )
        return begin if self._num_blocks else begin + _PING

    def _delta(self, delta: str) -> bytes:
        return _event("content_block_delta", f'"index":{self._num_blocks},"delta":{delta}')

    def _close(self) -> bytes:
        if self._open is None:
            return b""
        self._open = None
        self._num_blocks += 1
        return _event("content_block_stop", f'"index":{self._num_blocks - 1}')

    def _stopped(
        self, finish_reason: str, stop_reason: str | int | None, num_output_tokens: int
    ) -> tuple[StopReason, str | None]:
        """Why the answer ends, and the stop sequence that ended it."""
        if finish_reason == "length":
            is_full = num_output_tokens == self._job.params.max_tokens
            return "max_tokens" if is_full else "model_context_window_exceeded", None
        if isinstance(stop_reason, str):
            return "stop_sequence", stop_reason
        return "tool_use" if self._parser.num_calls else "end_turn", None


def _usage_of(usage: Usage) -> MessageUsage:
    return _usage(usage.prompt_tokens, usage.prompt_tokens_details.cached_tokens, usage.completion_tokens)


def _usage(num_prompt_tokens: int, num_cached_tokens: int, num_output_tokens: int) -> MessageUsage:
    return MessageUsage(
        input_tokens=num_prompt_tokens - num_cached_tokens,
        cache_read_input_tokens=num_cached_tokens,
        output_tokens=num_output_tokens,
    )


def _compact(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


def _event(name: str, fields: str = "") -> bytes:
    return f'event: {name}\ndata: {{"type":"{name}"{"," if fields else ""}{fields}}}\n\n'.encode()


def _blocks(events: Iterable[ParserEvent]) -> list[TextContentBlock | ToolUseContentBlock]:
    blocks: list[TextContentBlock | ToolUseContentBlock] = []
    arguments = ""
    for event in events:
        match event:
            case TextDelta(text):
                if blocks and isinstance(blocks[-1], TextContentBlock):
                    blocks[-1].text += text
                else:
                    blocks.append(TextContentBlock(text=text))
            case CallStart(_, id, name):
                arguments = ""
                blocks.append(ToolUseContentBlock(id=id, name=name, input={}))
            case ArgumentsDelta(_, text):
                arguments += text
            case CallEnd():
                call = blocks[-1]
                assert isinstance(call, ToolUseContentBlock)
                call.input = _input(arguments)
    return blocks


def _input(arguments: str) -> dict[str, object]:
    """Of a call that the token limit cut, what came."""
    parsed = from_json(arguments, allow_partial=True) if arguments else {}
    return parsed if isinstance(parsed, dict) else {}
