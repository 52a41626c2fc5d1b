"""What a replica tells a router: one JSON array a line, the type's name first."""

from dataclasses import dataclass, field
from typing import Literal

from engine import StepCost
from serving.lines import LineCodec

EndReason = Literal["finished", "aborted", "failed"]
END_REASONS: tuple[EndReason, ...] = ("finished", "aborted", "failed")


@dataclass(frozen=True, slots=True)
class Hello:
    """First on every connection. `replica_id` is the name that the proxy knows the replica by."""

    replica_id: str
    max_num_seqs: int
    chunk_tokens: int
    kv_capacity_tokens: int


@dataclass(frozen=True, slots=True)
class Arrived:
    """Said to every router, so that those that did not choose the replica know its load too."""

    flight_id: str
    prompt_tokens: int
    expected_output_tokens: int
    priority: int = 0
    prefixes: list[int] = field(default_factory=list)
    """The prompt's entries in a `PrefixIndex`."""


@dataclass(frozen=True, slots=True)
class Held:
    """Said to a router that is new: what earlier requests have left in the prefix cache."""

    prefixes: list[int]
    """Entries of a `PrefixIndex`, the newest first."""


@dataclass(frozen=True, slots=True)
class FirstToken:
    flight_id: str


@dataclass(frozen=True, slots=True)
class Ended:
    flight_id: str
    reason: EndReason
    output_tokens: int

    def __post_init__(self) -> None:
        if self.reason not in END_REASONS:
            raise ValueError(f"reason must be one of {', '.join(END_REASONS)}, got {self.reason!r}")


@dataclass(frozen=True, slots=True)
class Report:
    """The replica's load and speed, a few times a second."""

    num_running: int
    num_waiting_tokens: int
    kv_tokens: int
    total_steps: int
    cost: StepCost | None
    """What its steps take, as it measured them."""

    def __post_init__(self) -> None:
        if isinstance(self.cost, list):  # as it comes out of JSON
            object.__setattr__(self, "cost", StepCost(*self.cost))


Message = Hello | Held | Arrived | FirstToken | Ended | Report
_codec: LineCodec[Message] = LineCodec(Hello, Held, Arrived, FirstToken, Ended, Report)
encode, decode = _codec.encode, _codec.decode
