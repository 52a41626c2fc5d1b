"""When a sequence's tokens came, and the gaps between them, added up over all sequences."""

from collections import Counter

Gaps = Counter[tuple[str, float]]
"""(tier, seconds between two neighbouring tokens of a sequence) -> how often. Sequences that got a token in
the same two steps share the key: counting costs one addition a token, reading it one entry a step."""


class TokenTimes:
    """Of one sequence, on time.monotonic()'s clock."""

    __slots__ = ("first", "itl_s", "last", "tier")

    def __init__(self, tier: str) -> None:
        self.tier = tier
        self.first: float | None = None
        self.last: float | None = None
        self.itl_s: list[float] = []

    def note(self, time: float, gaps: Gaps) -> None:
        """A token came."""
        if self.last is None:
            self.first = time
        else:
            gap_s = time - self.last
            self.itl_s.append(gap_s)
            gaps[self.tier, gap_s] += 1
        self.last = time
