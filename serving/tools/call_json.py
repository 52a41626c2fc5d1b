"""One call as JSON, read while it is written.

Incremental JSON libraries give out values; arguments must go out as the text that the model writes. So
this finds where values end; a library reads what is whole.
"""

import json
import re
from dataclasses import dataclass, field
from typing import Literal

from pydantic_core import from_json

_HEAD = re.compile(
    r'\{\s*"name"\s*:\s*(?P<name>"(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)', re.DOTALL
)
"""A call in the usual order of its members: from here on arguments can be streamed."""

_BEGINNING = '{"name":'
_BEGINNING_CHARS = 100  # white space included


@dataclass(slots=True)
class ValueEnd:
    """Finds where a JSON object or array ends, whatever is in it."""

    _depth: int = 0
    _is_in_string: bool = False
    _is_escaped: bool = False

    def feed(self, text: str) -> int | None:
        """The position in `text` behind the value; None while it goes on. `text` continues the last one."""
        for position, char in enumerate(text):
            if self._is_in_string:
                if self._is_escaped:
                    self._is_escaped = False
                elif char == "\\":
                    self._is_escaped = True
                elif char == '"':
                    self._is_in_string = False
            elif char == '"':
                self._is_in_string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    return position + 1
        return None


@dataclass(slots=True)
class CallObject:
    """A call that is being written. Feed it from its brace on.

    `raw` is its text so far, `name` is None until it is known; it is refused when it turns out to be no call.

    is_bare: nothing but its form says that it is a call, so that only the usual form is one.
    """

    is_bare: bool = False
    raw: str = ""
    name: str | None = None
    state: Literal["open", "complete", "refused"] = "open"
    _end: ValueEnd = field(default_factory=ValueEnd)
    _arguments_end: ValueEnd | None = None

    def feed(self, text: str) -> tuple[str, str]:
        """New argument text, and what of `text` lies behind the object."""
        end = self._end.feed(text)
        taken, rest = (text, "") if end is None else (text[:end], text[end:])
        self.raw += taken
        arguments = ""
        if self.name is not None:
            arguments = self._more(taken)
        elif (head := _HEAD.match(self.raw)) is not None:
            self.name = _string(head["name"])
            if self.name is not None:
                self._arguments_end = ValueEnd()
                arguments = self._more(self.raw[head.end() :])
            else:
                self.state = "refused"
        elif self.is_bare and (end is not None or not self._may_be_usual()):
            self.state = "refused"
        elif end is not None:
            arguments = self._read_whole()
        if end is not None and self.state == "open":
            self.state = "complete"
        return arguments, rest

    @property
    def has_open_arguments(self) -> bool:
        """They have begun and not ended."""
        return self._arguments_end is not None

    def _may_be_usual(self) -> bool:
        begun = re.sub(r"\s+", "", self.raw[:_BEGINNING_CHARS])
        return begun.startswith(_BEGINNING) or _BEGINNING.startswith(begun)

    def _more(self, text: str) -> str:
        if self._arguments_end is None:
            return ""
        end = self._arguments_end.feed(text)
        if end is None:
            return text
        self._arguments_end = None
        return text[:end]

    def _read_whole(self) -> str:
        """The arguments of a call whose members stand in another order, or whose arguments are no object."""
        try:
            call = from_json(self.raw, allow_inf_nan=False)
        except ValueError:
            call = {}
        name, arguments = call.get("name"), call.get("arguments", call.get("parameters"))
        if isinstance(arguments, str):  # encoded twice
            try:
                arguments = from_json(arguments or "{}", allow_inf_nan=False)
            except ValueError:
                arguments = False
        if not isinstance(name, str) or not isinstance(arguments, dict | None):
            self.state = "refused"
            return ""
        self.name = name
        return json.dumps(arguments or {}, ensure_ascii=False)


def _string(text: str) -> str | None:
    try:
        value: str = from_json(text)
    except ValueError:
        return None
    return value
