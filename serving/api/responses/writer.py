"""From a model's output to output items, and to the events that tell how they grow."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from engine import PositionLogprobs
from serving.api.chat_presenter import chat_logprobs
from serving.api.responses.objects import OutputFunctionCall, OutputItem, OutputMessage, OutputText
from serving.chat_schemas import ChatLogprob
from serving.tools import (
    ArgumentsDelta,
    CallEnd,
    CallStart,
    Message,
    ParserEvent,
    TextDelta,
    ToolCall,
    ToolCallParser,
)

Event = tuple[str, dict[str, Any]]
"""Its type behind "response.", and its fields. To be read before the next one is asked for."""


class AnswerWriter:
    """Text and calls take turns as items.

    new_id: an item's id, from its kind ("msg" or "fc") and its place.
    """

    def __init__(self, parser: ToolCallParser, new_id: Callable[[str, int], str]) -> None:
        self.items: list[OutputItem] = []
        self._parser, self._new_id = parser, new_id
        self._message: OutputMessage | None = None
        self._logprobs: list[ChatLogprob] = []
        """Of tokens whose text is held back."""

    def feed(self, text: str, logprobs: Sequence[PositionLogprobs]) -> Iterator[Event]:
        if logprobs:
            self._logprobs += chat_logprobs(tuple(logprobs)).content
        for event in self._parser.feed(text):
            yield from self._take(event)

    def finish(self, *, is_cut: bool) -> Iterator[Event]:
        """The output has ended, or was cut at its limit. An answer has one item at least."""
        for event in self._parser.finish():
            yield from self._take(event)
        if not self.items:
            yield from self._open_message()
        yield from self._close_message(is_cut=is_cut)

    def as_message(self) -> Message:
        """The answer as a conversation's next turn."""
        texts = [part.text for item in self.items if isinstance(item, OutputMessage) for part in item.content]
        calls = [
            ToolCall(item.call_id, item.name, item.arguments)
            for item in self.items
            if isinstance(item, OutputFunctionCall)
        ]
        return Message("assistant", "".join(texts), tuple(calls))

    def _take(self, event: ParserEvent) -> Iterator[Event]:
        match event:
            case TextDelta(text):
                yield from self._write(text)
            case CallStart(_, call_id, name):
                yield from self._close_message(is_cut=False)
                item_id = self._new_id("fc", len(self.items))
                self.items.append(OutputFunctionCall(id=item_id, call_id=call_id, name=name))
                yield self._item_event("output_item.added")
            case ArgumentsDelta(_, text):
                call = self._call
                call.arguments += text
                yield "function_call_arguments.delta", {**self._place, "delta": text}
            case CallEnd(_, is_cut):
                call = self._call
                call.status = "incomplete" if is_cut else "completed"
                yield "function_call_arguments.done", {**self._place, "arguments": call.arguments}
                yield self._item_event("output_item.done")

    def _write(self, text: str) -> Iterator[Event]:
        if self._message is None:
            yield from self._open_message()
        assert self._message is not None
        part, logprobs = self._message.content[0], self._take_logprobs()
        part.text += text
        part.logprobs += logprobs
        shown = [logprob.model_dump() for logprob in logprobs]
        yield "output_text.delta", {**self._text_place, "delta": text, "logprobs": shown}

    def _open_message(self) -> Iterator[Event]:
        self._message = OutputMessage(id=self._new_id("msg", len(self.items)))
        self.items.append(self._message)
        yield self._item_event("output_item.added")
        self._message.content = [OutputText()]
        yield "content_part.added", {**self._text_place, "part": self._message.content[0].model_dump()}

    def _close_message(self, *, is_cut: bool) -> Iterator[Event]:
        if (message := self._message) is None:
            return
        part = message.content[0]
        part.logprobs += self._take_logprobs()
        shown = part.model_dump()
        yield (
            "output_text.done",
            {**self._text_place, "text": shown["text"], "logprobs": shown["logprobs"]},
        )
        yield "content_part.done", {**self._text_place, "part": shown}
        message.status = "incomplete" if is_cut else "completed"
        yield self._item_event("output_item.done")
        self._message = None

    def _take_logprobs(self) -> list[ChatLogprob]:
        logprobs, self._logprobs = self._logprobs, []
        return logprobs

    @property
    def _call(self) -> OutputFunctionCall:
        call = self.items[-1]
        assert isinstance(call, OutputFunctionCall)
        return call

    @property
    def _place(self) -> dict[str, Any]:
        return {"item_id": self.items[-1].id, "output_index": len(self.items) - 1}

    @property
    def _text_place(self) -> dict[str, Any]:
        return {**self._place, "content_index": 0}

    def _item_event(self, kind: str) -> Event:
        return kind, {"output_index": len(self.items) - 1, "item": self.items[-1].model_dump()}
