"""What an operator may set about the HTTP side of a replica."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from monitoring.exporter import MetricsSettings
from serving.tiers import TIERS, Tier
from serving.websockets.settings import WebSocketSettings


class ResponseStoreSettings(BaseModel):
    """The `serving.responses` section: how many of its answers each replica keeps in its memory."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_count: int = Field(default=1000, ge=0)
    """0 keeps none."""
    max_bytes: int = Field(default=64 * 2**20, ge=1024)
    """Counted as if no conversation shared its beginning with another."""
    ttl_s: float = Field(default=3600.0, gt=0)
    """After which an answer is forgotten."""


class ServingSettings(BaseModel):
    """The `serving` section of the configuration."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    api_keys: tuple[str, ...] = ()
    """Accepted bearer tokens; empty turns authentication off."""
    max_body_bytes: int = Field(default=4 * 2**20, ge=1024)
    """A prompt of a million tokens fits; what is larger is refused unread."""
    max_inflight_requests: int = Field(default=256, ge=1)
    """Running and waiting together; beyond it a request is refused at once with 429. The engine runs 64 at a
    time, so that the last of 256 waits for about three others."""
    request_timeout_s: float = Field(default=600.0, gt=0)
    """From arrival to the last token."""
    hung_after_s: float = Field(default=15.0, gt=0, le=600)
    """An engine that has answered nothing between two steps for so long is stuck: its replica is replaced.
    Longer than any step: a large prompt on the CPU takes seconds."""
    retry_after_s: int = Field(default=1, ge=1)
    """What a refused client is told to wait."""
    status_page: bool = True
    """Whether `/` shows what runs, to whoever may reach the port; it has no text of any request."""
    tiers: Mapping[str, Tier] = Field(default_factory=lambda: dict(TIERS), validate_default=True)
    """Service tiers by name; those given here replace or extend the built-in ones."""

    responses: ResponseStoreSettings = ResponseStoreSettings()
    """What `previous_response_id` may go on from."""
    websocket: WebSocketSettings = WebSocketSettings()
    """Connections of clients that interrupt answers."""
    metrics: MetricsSettings = MetricsSettings()
    """Addresses for Prometheus, one of each replica and router."""

    @field_validator("tiers", mode="before")
    @classmethod
    def _with_built_in_tiers(cls, given: Any) -> Any:
        return {**TIERS, **given} if isinstance(given, Mapping) else given
