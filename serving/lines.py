"""Messages of processes to each other: one JSON array a line, the type's name first."""

import json
from dataclasses import astuple
from typing import Any, Generic, TypeVar

M = TypeVar("M")

MAX_LINE_BYTES = 2**20


class LineCodec(Generic[M]):
    """Of dataclasses whose fields are JSON's own types, or dataclasses again of such."""

    def __init__(self, *types: type[M]) -> None:
        self._types = {kind.__name__: kind for kind in types}

    def encode(self, message: M) -> bytes:
        fields: tuple[Any, ...] = astuple(message)  # type: ignore[call-overload]  # M are dataclasses
        return json.dumps([type(message).__name__, *fields], separators=(",", ":")).encode() + b"\n"

    def decode(self, line: bytes) -> M:
        """Raises ValueError for anything but a message."""
        try:
            name, *fields = json.loads(line)
            return self._types[name](*fields)
        except (KeyError, TypeError) as error:
            raise ValueError(f"no message: {line[:80]!r}") from error
