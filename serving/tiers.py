"""Service tiers: when the first token is due, who gives way to whom, who is refused first."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field

from engine import MAX_PRIORITY, ParameterError, Urgency
from serving.errors import ApiError

SLO_HEADER = "x-slo-ttft-ms"
_MAX_SLO_MS = 600_000.0
# OpenAI's names for what it offers, and Anthropic's.
_ALIASES = {"auto": "default", "flex": "batch", "priority": "voice", "standard_only": "default"}


class Tier(BaseModel):
    """One entry of `serving.tiers`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ttft_s: float = Field(gt=0, le=3600)
    """From arrival to the first token; waiting requests start earliest deadline first."""
    priority: int = Field(ge=0, le=MAX_PRIORITY)
    """Running requests of a larger number give their memory to those of smaller ones."""
    refuses_late: bool = False
    """Refuse at once what is not expected to keep its deadline, instead of answering late."""
    max_load: float = Field(default=1.0, gt=0, le=1)
    """Share of `max_inflight_requests` up to which requests are admitted."""


TIERS: Mapping[str, Tier] = {
    "voice": Tier(ttft_s=0.2, priority=0, refuses_late=True),
    # A suggestion is worth 500 ms, half of which its first token may take; so with an agent's second.
    "copilot": Tier(ttft_s=0.25, priority=1, refuses_late=True),
    "agent": Tier(ttft_s=0.5, priority=2, refuses_late=True, max_load=0.95),
    "default": Tier(ttft_s=5.0, priority=3, max_load=0.9),
    "batch": Tier(ttft_s=120.0, priority=4, max_load=0.8),
}


@dataclass(frozen=True, slots=True)
class Service:
    """What one request was promised. `ttft_s` is from its arrival."""

    tier: str
    ttft_s: float
    refuses_late: bool
    max_load: float
    urgency: Urgency


def tier_named(tiers: Mapping[str, Tier], name: object) -> Tier | None:
    """The tier of a request that names it so (None: not at all); None where there is no such tier."""
    return tiers.get(_canonical(name)) if name is None or isinstance(name, str) else None


def _canonical(name: str | None) -> str:
    return _ALIASES.get(name or "default", name or "default")


def choose_service(
    tiers: Mapping[str, Tier], name: str | None, headers: Mapping[str, str], arrival_time: float
) -> Service:
    """The tier that `service_tier` names, its deadline replaced by the header's where there is one.

    Raises:
        ParameterError: no such tier.
        ApiError: 400, the header is no number of milliseconds in range.
    """
    chosen, tier = _canonical(name), tier_named(tiers, name)
    if tier is None:
        allowed = ", ".join(sorted({*tiers, *_ALIASES}))
        raise ParameterError("service_tier", f"must be one of {allowed}, got {name!r}")
    ttft_s, refuses_late = tier.ttft_s, tier.refuses_late
    if (given := headers.get(SLO_HEADER)) is not None:
        ttft_s, refuses_late = _milliseconds(given) / 1e3, True
    urgency = Urgency(arrival_time + ttft_s, tier.priority, chosen)
    return Service(chosen, ttft_s, refuses_late, tier.max_load, urgency)


def _milliseconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= _MAX_SLO_MS:
        raise ApiError(
            400,
            f"Invalid header '{SLO_HEADER}': must be milliseconds in (0, {_MAX_SLO_MS:g}], got {text!r}.",
            param=SLO_HEADER,
            code="invalid_value",
        )
    return value
