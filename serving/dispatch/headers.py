"""The headers between proxy, router and replica. Ray Serve's HAProxy takes `x-serve-router-*` from the router
alone: a client's own are stripped.
"""

from serving.routing import Decision

FLIGHT = "x-serve-router-flight"
"""The request's id in the router's books."""
REPLY_TO = "x-serve-router-reply-to"
"""host:port where the replica reports the request's events."""
ROUTE = "x-serve-router-route"
"""The choice explained, as `describe` writes it."""
SIZE = "x-serve-router-size"
"""prompt tokens/expected output tokens, as the router counts them."""
REFUSE = "x-serve-router-refuse"
"""Instead of these: no replica may take the request; seconds after which to try again."""
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


def predicted_ttft_s(route: str) -> float | None:
    """What `describe` wrote, where it did."""
    for part in route.split("; "):
        name, _, value = part.partition("=")
        if name == "predicted-ttft-ms":
            try:
                return float(value) / 1e3
            except ValueError:
                return None
    return None
