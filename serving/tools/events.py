"""What a parser finds in a model's output."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TextDelta:
    """Text for the reader."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A call of a tool that the request has. `index` counts the answer's calls from 0."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class ArgumentsDelta:
    """The next piece of a call's arguments, JSON text."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallEnd:
    """The call's arguments are complete; where `is_cut`, the output ended inside them."""

    index: int
    is_cut: bool = False


ParserEvent = TextDelta | CallStart | ArgumentsDelta | CallEnd
