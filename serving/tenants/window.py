"""How much was had within the last minute."""

import math
from collections import deque
from collections.abc import Iterable, Iterator

MINUTE_S = 60.0
_SLICE_S = 0.1


class Window:
    """Amounts of the last 60 s, by slices of 0.1 s: a minute of any traffic takes at most 600 entries.

    A slice counts until all of it is older than a minute, so that no 60 s hold more than was let in, at the
    price of a six-hundredth. A bucket that refills, the usual choice, would let twice the limit pass within
    the minute after a pause. Times are seconds of one clock and never go back.
    """

    def __init__(self, entries: Iterable[tuple[float, int]] = (), now: float = 0.0) -> None:
        """entries: (seconds before `now`, amount), oldest first, as `entries` gives them."""
        self._slices: deque[tuple[int, int]] = deque()
        self._sum = 0
        for age_s, amount in entries:
            self.add(now - age_s, amount)

    def add(self, now: float, amount: int) -> None:
        if amount <= 0:
            return
        number = math.floor(now / _SLICE_S)
        if self._slices and self._slices[-1][0] >= number:
            number, before = self._slices.pop()
            amount, self._sum = amount + before, self._sum - before
        self._slices.append((number, amount))
        self._sum += amount

    def total(self, now: float) -> int:
        while self._slices and _end_s(self._slices[0][0]) <= now:
            self._sum -= self._slices.popleft()[1]
        return self._sum

    def releases(self, now: float) -> Iterator[tuple[float, int]]:
        """(seconds from now, amount) of what the next minute gives back, soonest first."""
        return ((max(0.0, _end_s(number) - now), amount) for number, amount in self._slices)

    def reset_s(self, now: float) -> float:
        """Until all is given back."""
        return max(0.0, _end_s(self._slices[-1][0]) - now) if self._slices else 0.0

    def entries(self, now: float) -> list[tuple[float, int]]:
        """What `Window(entries, now)` makes another one of, on whatever clock."""
        return [(now - (number + 0.5) * _SLICE_S, amount) for number, amount in self._slices]


def _end_s(number: int) -> float:
    return (number + 1) * _SLICE_S + MINUTE_S
