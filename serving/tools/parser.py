"""From a model's output to text and calls, as it comes."""

import uuid
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Literal

from serving.tools.call_json import CallObject
from serving.tools.definitions import ToolCall
from serving.tools.events import ArgumentsDelta, CallEnd, CallStart, ParserEvent, TextDelta
from serving.tools.syntax import CallSyntax

_BLANKS = " \t\r\n"
_SEPARATORS = ",;"


@dataclass(frozen=True, slots=True)
class ParsedAnswer:
    """A whole output. `text` is empty where there are only calls."""

    text: str
    calls: tuple[ToolCall, ...]


class ToolCallParser:
    """Tells calls from text in one choice's output.

    The events do not depend on how the output is cut into fragments, up to where neighbouring deltas meet.
    No part of a mark is ever given out as text. What looks like a call and is none (not JSON, or a tool that
    the request does not have) is text; whitespace between text and a call is dropped.

    Args:
        syntax: of the model's family.
        names: of the tools that may be called; without any, all is text.
        max_calls: what follows that many calls is dropped; None for no limit.
        new_id: makes the calls' ids.
    """

    def __init__(
        self,
        syntax: CallSyntax,
        names: Collection[str],
        *,
        max_calls: int | None = None,
        new_id: Callable[[], str] | None = None,
    ) -> None:
        self._syntax = syntax
        self._names = frozenset(names)
        self._max_calls = max_calls
        self._new_id = new_id or new_call_id
        self._mode: Literal["text", "call", "between", "done"] = "text"
        self._buffer = ""
        self._opening = ""
        """What has been read of a call before its brace: it is text if no call follows."""
        self._object: CallObject | None = None
        self._is_list = False
        self._is_bare = False
        self._has_begun = False
        """Something other than whitespace has been read: a call without a mark can no longer begin."""
        self._is_after_call = False
        self._num_calls = 0
        self._events: list[ParserEvent] = []

    @property
    def num_calls(self) -> int:
        """Calls begun so far."""
        return self._num_calls

    def feed(self, text: str) -> list[ParserEvent]:
        """What became certain with this fragment."""
        if not self._names:
            return [TextDelta(text)] if text else []
        self._buffer += text
        return self._drain(is_last=False)

    def finish(self) -> list[ParserEvent]:
        """What is still held back; the output has ended."""
        return self._drain(is_last=True)

    def parse(self, text: str) -> ParsedAnswer:
        """A whole output at once; for a fresh parser."""
        return collect([*self.feed(text), *self.finish()])

    def _drain(self, *, is_last: bool) -> list[ParserEvent]:
        steps = {"text": self._read_text, "call": self._read_call, "between": self._read_between}
        while self._mode != "done" and steps[self._mode](is_last):
            pass
        if self._mode == "done":
            self._buffer = ""
        events, self._events = self._events, []
        return events

    # Each step reads from the buffer and says whether there may be more to read.

    def _read_text(self, is_last: bool) -> bool:
        if not self._has_begun:
            stripped = self._buffer.lstrip(_BLANKS)
            if not stripped and not is_last:
                return False
            self._has_begun = True
            if stripped.startswith(("{", "[")):
                self._mode, self._is_bare = "call", True
                return True
        mark = self._syntax.begin
        if mark and (position := self._buffer.find(mark)) >= 0:
            text = self._buffer[:position].rstrip(_BLANKS)
            self._say(text)
            self._opening = self._buffer[len(text) : position] + mark
            self._buffer = self._buffer[position + len(mark) :]
            self._mode, self._is_bare = "call", False
            return True
        certain = self._buffer
        if not is_last:
            certain = certain[: len(certain) - _overlap(certain, mark)].rstrip(_BLANKS)
        self._say(certain)
        self._buffer = self._buffer[len(certain) :]
        return False

    def _read_call(self, is_last: bool) -> bool:
        if self._object is None:
            stripped = self._buffer.lstrip(_BLANKS)
            self._opening += self._buffer[: len(self._buffer) - len(stripped)]
            self._buffer = stripped
            if not stripped:
                return self._refuse() if is_last else False
            if stripped[0] == "[" and not self._is_list:
                self._is_list = True
                self._opening += "["
                self._buffer = stripped[1:]
                return True
            if stripped[0] != "{":
                return self._refuse()
            self._object = CallObject(self._is_bare)
        return self._read_object(self._object, is_last)

    def _read_object(self, call: CallObject, is_last: bool) -> bool:
        is_new = call.name is None
        arguments, self._buffer = call.feed(self._buffer)
        if call.state == "refused" or (call.name is not None and call.name not in self._names):
            return self._refuse()
        if call.name is None:
            return self._refuse() if is_last else False
        if is_new:
            self._opening = ""
            self._events.append(CallStart(self._num_calls, self._new_id(), call.name))
            self._num_calls += 1
        index = self._num_calls - 1
        if arguments:
            self._events.append(ArgumentsDelta(index, arguments))
        if call.state == "open" and not is_last:
            return False
        self._events.append(CallEnd(index, is_cut=call.has_open_arguments))
        self._object = None
        self._is_after_call = True
        self._mode = "done" if self._num_calls == self._max_calls else "between"
        return True

    def _read_between(self, is_last: bool) -> bool:
        """Behind a call: its mark's end, the list's next call or end, a separator, or text again."""
        self._buffer = text = self._buffer.lstrip(_BLANKS)
        end = self._syntax.end
        if not text or (end.startswith(text) and text != end):
            if is_last:
                self._buffer = ""
            return False
        if self._is_list and text[0] == "]":
            self._is_list = False
            self._buffer = text[1:]
        elif text[0] in _SEPARATORS:
            self._mode, self._buffer = "call", text[1:]
        elif text[0] == "{":
            self._mode = "call"
        else:
            self._mode, self._is_list = "text", False
            if end:
                self._buffer = text.removeprefix(end)
        return True

    def _refuse(self) -> bool:
        """It was no call: it is text, and is looked at again from the mark's second character on."""
        text = self._opening + (self._object.raw if self._object else "") + self._buffer
        mark = self._syntax.begin
        num_certain = self._opening.index(mark) + 1 if mark and mark in self._opening else 0
        self._object, self._opening, self._is_list = None, "", False
        self._say(text[:num_certain])
        self._buffer = text[num_certain:]
        self._mode = "text"
        return True

    def _say(self, text: str) -> None:
        if self._is_after_call:
            text = text.lstrip(_BLANKS)
        if not text:
            return
        self._is_after_call = False
        if self._events and isinstance(last := self._events[-1], TextDelta):
            self._events[-1] = TextDelta(last.text + text)
        else:
            self._events.append(TextDelta(text))


def collect(events: Iterable[ParserEvent]) -> ParsedAnswer:
    """All events of one output, summed up."""
    text: list[str] = []
    starts: list[CallStart] = []
    arguments: list[list[str]] = []
    for event in events:
        match event:
            case TextDelta():
                text.append(event.text)
            case CallStart():
                starts.append(event)
                arguments.append([])
            case ArgumentsDelta():
                arguments[event.index].append(event.text)
    calls = tuple(ToolCall(s.id, s.name, "".join(a)) for s, a in zip(starts, arguments, strict=True))
    return ParsedAnswer("".join(text), calls)


def new_call_id() -> str:
    """An id as OpenAI forms it."""
    return f"call_{uuid.uuid4().hex[:24]}"


def _overlap(text: str, mark: str) -> int:
    """Length of the longest end of `text` that begins `mark`."""
    return next((n for n in range(min(len(text), len(mark) - 1), 0, -1) if text.endswith(mark[:n])), 0)
