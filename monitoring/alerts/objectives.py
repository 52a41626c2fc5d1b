"""Objectives of TTFT and ITL for each tier, and alerts on how fast their error budgets burn.

Several windows, after the Site Reliability Workbook (chapter 5): a long window says that it matters, a
short one that it is still so. The rates are those of a budget for 30 days: 14.4 takes 2% of it in an hour,
6 takes 5% in six, 3 takes 10% in a day, 1 takes 10% in three days.
"""

from collections.abc import Mapping

from monitoring.alerts.spec import OWNER, Alert, Record, over

OBJECTIVE = 0.99
"""Share of first tokens within their tier's deadline, and of gaps between tokens within its limit."""

ITL_LIMITS_S: Mapping[str, float] = {
    "voice": 0.05,
    "copilot": 0.05,
    "agent": 0.1,
    "default": 0.1,
    "batch": 0.5,
}
"""Built-in tiers; each limit is a bucket of peregrine_itl_seconds. Speech and typing stall above 50 ms."""

_FAST = (("1h", "5m", 14.4), ("6h", "30m", 6.0))
_SLOW = (("1d", "2h", 3.0), ("3d", "6h", 1.0))
_WINDOWS = ("5m", "30m", "1h", "2h", "6h", "1d", "3d")
_MIN_TOKENS = 20
"""First tokens, or gaps, of a tier in the long window: below it one late answer would burn anything."""
_BY = (*OWNER, "tier")
_LATE = 'kept="no"'
_DEADLINES, _ITL = "peregrine_ttft_deadlines_total", "peregrine_itl_seconds"


def records() -> list[Record]:
    """Shares that missed the objective, by tier and window."""
    made = []
    for window in _WINDOWS:
        q = over(window)
        late = f"{q.sum_rate(_DEADLINES, _LATE, _BY)} / {q.sum_rate(_DEADLINES, by=_BY)}"
        slow = [q.share_above(limit, _ITL, f'tier="{tier}"', _BY) for tier, limit in ITL_LIMITS_S.items()]
        made.append(Record(_ratio("ttft_late", window), late))
        made.append(Record(_ratio("itl_slow", window), "\nor\n".join(slow)))
    return made


def alerts() -> list[Alert]:
    """A page where a budget would be gone in days, a ticket where it would not last its month."""
    texts = {
        "ttft_late": (
            "Ttft",
            "first tokens of tier {{ $labels.tier }} come after their time",
            _DEADLINES,
        ),
        "itl_slow": ("Itl", "tokens of tier {{ $labels.tier }} come too far apart", f"{_ITL}_count"),
    }
    made = []
    for ratio, (name, what, counter) in texts.items():
        made += [
            Alert(
                f"Peregrine{name}BudgetBurnsFast",
                "page",
                _burns(ratio, _FAST, counter),
                "2m",
                f"Too many {what}",
                "At this rate a month's error budget is gone within days.",
            ),
            Alert(
                f"Peregrine{name}BudgetBurnsSlowly",
                "ticket",
                _burns(ratio, _SLOW, counter),
                "15m",
                f"More {what} than the objective allows",
                "The error budget does not last its month.",
            ),
        ]
    return made


def _ratio(name: str, window: str) -> str:
    return f"peregrine:{name}:ratio_rate{window}"


def _burns(ratio: str, windows: tuple[tuple[str, str, float], ...], counter: str) -> str:
    parts = []
    for long, short, rate in windows:
        limit = f"{rate * (1 - OBJECTIVE):g}"
        by = f"sum by ({', '.join(_BY)})"
        parts.append(
            f"(\n  {_ratio(ratio, long)} > {limit}\n"
            f"  and {_ratio(ratio, short)} > {limit}\n"
            f"  and {by} (increase({over(long).series(counter)}[{long}])) > {_MIN_TOKENS}\n)"
        )
    return "\nor\n".join(parts)
