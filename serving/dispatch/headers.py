"""The headers between proxy, router and replica. Ray Serve's HAProxy takes `x-serve-router-*` from the router
alone: a client's own are stripped.
"""

from collections.abc import Sequence

from engine import MAX_PRIORITY
from serving.routing import Decision

ROUTER_PREFIX = "x-serve-router-"
FLIGHT = "x-serve-router-flight"
"""The request's id in the router's books."""
REPLY_TO = "x-serve-router-reply-to"
"""host:port where the replica reports the request's events."""
ROUTE = "x-serve-router-route"
"""The choice explained, as `describe` writes it."""
SIZE = "x-serve-router-size"
"""prompt tokens/expected output tokens/priority, as the router counts them."""
PREFIXES = "x-serve-router-prefixes"
"""The prompt's entries in a `PrefixIndex`, for the routers that did not see it: hexadecimal, dots between."""
REFUSE = "x-serve-router-refuse"
"""Instead of these: no replica may take the request; seconds after which to try again."""
DECIDED = "x-serve-router-decided"
"""Where traces are made: when the router began to decide, and for how long, in ns: since 1970/duration."""
WATCHED = "x-request-disconnect-disabled"
"""Ray Serve's: the app itself ends what its client has left, and needs no task beside it that looks."""
PEREGRINE_ROUTE = "x-peregrine-route"
"""On the response: the choice, and predicted against actual."""


def describe(policy: str, decision: Decision) -> str:
    """`policy=...; reason=...; predicted-ttft-ms=...`. Neither quotes nor braces: the proxy's parser is
    simple.
    """
    parts = [f"policy={policy}", f"reason={decision.reason}"]
    if decision.predicted_ttft_s is not None:
        parts.append(f"predicted-ttft-ms={decision.predicted_ttft_s * 1e3:.1f}")
    if decision.predicted_tpot_s is not None:
        parts.append(f"predicted-tpot-ms={decision.predicted_tpot_s * 1e3:.2f}")
    if decision.saved_tokens:
        parts.append(f"saved-tokens={decision.saved_tokens}")
    return "; ".join(parts)


_MAX_PREFIXES = 64  # 4,096 tokens; a proxy's room for headers is limited


def write_prefixes(entries: Sequence[int]) -> str:
    return ".".join(f"{entry:x}" for entry in entries[:_MAX_PREFIXES])


def read_prefixes(value: str) -> list[int]:
    """Empty for what `write_prefixes` does not write."""
    try:
        return [int(entry, 16) for entry in value.split(".")] if value else []
    except ValueError:
        return []


def write_size(prompt_tokens: int, expected_output_tokens: int, priority: int) -> str:
    return f"{prompt_tokens}/{expected_output_tokens}/{priority}"


def read_size(value: str) -> tuple[int, int, int]:
    """Prompt tokens, expected output tokens, priority; the smallest ones for what `write_size` does not
    write.
    """
    parts = value.split("/")
    if len(parts) != 3 or not all(part.isdecimal() for part in parts):
        return 1, 0, 0
    prompt, output, priority = map(int, parts)
    return prompt, output, min(priority, MAX_PRIORITY)


def write_decided(start_ns: int, end_ns: int) -> str:
    return f"{start_ns}/{max(0, end_ns - start_ns)}"


def read_decided(value: str) -> tuple[int, int] | None:
    """None for what `write_decided` does not write."""
    start, _, length = value.partition("/")
    return (int(start), int(length)) if start.isdecimal() and length.isdecimal() else None


def read_route(route: str) -> dict[str, str]:
    """The parts that `describe` wrote."""
    return dict(part.split("=", 1) for part in route.split("; ") if "=" in part)


def predicted_ttft_s(route: str) -> float | None:
    """What `describe` wrote, where it did."""
    try:
        return float(read_route(route)["predicted-ttft-ms"]) / 1e3
    except (KeyError, ValueError):
        return None
