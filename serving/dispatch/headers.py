"""The headers between proxy, router and replica. Ray Serve's HAProxy takes `x-serve-router-*` from the router
alone: a client's own are stripped.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from engine import MAX_PRIORITY
from serving.routing import Decision

ROUTER_PREFIX = "x-serve-router-"
FLIGHT = "x-serve-router-flight"
"""The request in the router's books, as `FlightNote` writes it. One header for all of it: each of them is
some 15 calls in uvicorn and Ray Serve, which the first token waits for.
"""
ROUTE = "x-serve-router-route"
"""The choice explained, as `describe` writes it."""
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


@dataclass(frozen=True, slots=True)
class FlightNote:
    """What the replica that gets a request is told of it."""

    flight_id: str
    """In the router's books."""
    prompt_tokens: int = 1
    """As the router counts them, without those that it expects in the prefix cache."""
    expected_output_tokens: int = 0
    priority: int = 0
    reply_to: str = ""
    """host:port of the router, which is to hear of the request's events too."""
    prefixes: Sequence[int] = ()
    """The prompt's entries in a `PrefixIndex`, for the routers that did not see it."""

    def write(self) -> str:
        """id, prompt/output/priority, host:port, prefixes in hexadecimal with dots between; - for none."""
        size = f"{self.prompt_tokens}/{self.expected_output_tokens}/{self.priority}"
        prefixes = ".".join([f"{entry:x}" for entry in self.prefixes[:_MAX_PREFIXES]])
        return f"{self.flight_id} {size} {self.reply_to or '-'} {prefixes or '-'}"

    @classmethod
    def read(cls, value: str) -> "FlightNote":
        """The id alone of what `write` does not write. Raises ValueError where there is not even that."""
        flight_id, _, rest = value.partition(" ")
        if not flight_id:
            raise ValueError(f"no flight: {value!r}")
        try:
            size, reply_to, prefixes = rest.split(" ")
            prompt, output, priority = map(int, size.split("/"))
            entries = [] if prefixes == "-" else [int(entry, 16) for entry in prefixes.split(".")]
        except ValueError:
            return cls(flight_id)
        if min(prompt, output, priority) < 0:
            return cls(flight_id)
        reply_to = "" if reply_to == "-" else reply_to
        return cls(flight_id, prompt, output, min(priority, MAX_PRIORITY), reply_to, entries)


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
