"""How soon a request is due, and who gives way to whom."""

import math
from dataclasses import dataclass

from engine.errors import ParameterError

MAX_PRIORITY = 9


@dataclass(frozen=True, slots=True)
class Urgency:
    """Waiting requests start earliest deadline first; running ones of a larger `priority` give way first.

    Args:
        deadline: time.monotonic() at which the first token is due; infinite where nothing was agreed on.
        priority: 0 (never gives way to others) to 9.
        tier: among whose figures the request counts; the engine makes nothing of it.

    Raises:
        ParameterError: naming the field.
    """

    deadline: float = math.inf
    priority: int = 0
    tier: str = ""

    def __post_init__(self) -> None:
        if math.isnan(self.deadline):
            raise ParameterError("deadline", "must be a number")
        if not 0 <= self.priority <= MAX_PRIORITY:
            raise ParameterError("priority", f"must be in [0, {MAX_PRIORITY}], got {self.priority}")


NOT_URGENT = Urgency()
