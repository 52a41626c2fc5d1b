"""Rate limits in the headers that clients of either API know."""

from datetime import UTC, datetime, timedelta

from serving.tenants.ledger import Limits, Verdict


def openai_headers(limits: Limits, verdict: Verdict) -> dict[str, str]:
    """`x-ratelimit-*`; resets are durations such as 1m6.2s."""
    headers: dict[str, str] = {}
    for kind, limit, remaining, reset_s in _kinds(limits, verdict):
        headers |= {
            f"x-ratelimit-limit-{kind}": str(limit),
            f"x-ratelimit-remaining-{kind}": str(remaining),
            f"x-ratelimit-reset-{kind}": duration(reset_s),
        }
    return headers


def anthropic_headers(limits: Limits, verdict: Verdict, now: datetime | None = None) -> dict[str, str]:
    """`anthropic-ratelimit-*`; resets are moments in RFC 3339."""
    moment = now or datetime.now(UTC)
    headers: dict[str, str] = {}
    for kind, limit, remaining, reset_s in _kinds(limits, verdict):
        reset = (moment + timedelta(seconds=reset_s)).isoformat(timespec="seconds").replace("+00:00", "Z")
        headers |= {
            f"anthropic-ratelimit-{kind}-limit": str(limit),
            f"anthropic-ratelimit-{kind}-remaining": str(remaining),
            f"anthropic-ratelimit-{kind}-reset": reset,
        }
    return headers


def duration(seconds: float) -> str:
    """As Go writes durations, to the millisecond: 6m0s, 1.2s, 40ms."""
    milliseconds = round(seconds * 1e3)
    if milliseconds < 1000:
        return f"{milliseconds}ms" if milliseconds else "0s"
    minutes, rest = divmod(milliseconds, 60_000)
    return f"{minutes}m{rest / 1e3:g}s" if minutes else f"{rest / 1e3:g}s"


def _kinds(limits: Limits, verdict: Verdict) -> list[tuple[str, int, int, float]]:
    """(kind, limit, remaining, seconds to the reset) of the limits that there are."""
    kinds = [
        ("requests", limits.requests, verdict.remaining_requests, verdict.reset_requests_s),
        ("tokens", limits.tokens, verdict.remaining_tokens, verdict.reset_tokens_s),
    ]
    return [
        (kind, limit, remaining, reset_s)
        for kind, limit, remaining, reset_s in kinds
        if limit is not None and remaining is not None
    ]
