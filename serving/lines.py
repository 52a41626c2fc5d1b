"""Messages of processes to each other: one JSON array a line, the type's name first."""

import json
from dataclasses import astuple, fields
from typing import Generic, TypeVar

M = TypeVar("M")

MAX_LINE_BYTES = 2**20


class LineCodec(Generic[M]):
    """Of dataclasses whose fields are JSON's own types, or dataclasses, which arrive as lists."""

    def __init__(self, *types: type[M]) -> None:
        self._types = {kind.__name__: kind for kind in types}
        self._names = {kind: [f.name for f in fields(kind)] for kind in types}  # type: ignore[arg-type]

    def encode(self, message: M) -> bytes:
        kind = type(message)
        values = [getattr(message, name) for name in self._names[kind]]
        line = json.dumps([kind.__name__, *values], separators=(",", ":"), default=astuple)
        return line.encode() + b"\n"

    def decode(self, line: bytes) -> M:
        """Raises ValueError for anything but a message."""
        try:
            name, *values = json.loads(line)
            return self._types[name](*values)
        except (KeyError, TypeError) as error:
            raise ValueError(f"no message: {line[:80]!r}") from error
