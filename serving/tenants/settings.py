"""The `tenants` section of the configuration."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator

KeyHash = Annotated[str, StringConstraints(pattern=r"^sha256:[0-9a-f]{64}$")]
TenantName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]
"""It is a label of metrics and a column of the usage."""


class Tenant(BaseModel):
    """One entry of `tenants.members`. A limit that is None is none."""

    # A key in plain text, where its hash belongs, is not to come back in an error.
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    keys: tuple[KeyHash, ...] = ()
    """Hashes, as `peregrine keys new` prints them; several, so that a key can live beside its successor."""
    requests_per_minute: int | None = Field(default=None, ge=1)
    tokens_per_minute: int | None = Field(default=None, ge=1)
    """Prompt and output tokens together."""
    max_concurrent_requests: int | None = Field(default=None, ge=1)
    models: tuple[str, ...] | None = None
    """Names that may be asked for; None: all that are served."""
    tiers: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """Service tiers that may be asked for; a request that names none gets the first. None: all tiers."""


class TenantSettings(BaseModel):
    """The `tenants` section. Without members and file there are no tenants, and no ledger runs."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    members: Mapping[TenantName, Tenant] = Field(default_factory=dict)
    file: Path | None = None
    """A YAML file that has `tenants: {members: ...}` instead, such as a mounted secret; read again when it
    changes. `peregrine serve --config` sets it to the configuration itself where that has members."""
    ledger_timeout_s: float = Field(default=0.25, gt=0, le=5)
    """How long a request waits for the ledger's answer before its replica decides alone."""
    when_ledger_is_gone: Literal["share", "refuse"] = "share"
    """share: each replica allows its part of every limit; refuse: 503 for requests of tenants with limits."""
    usage_file: Path | None = None
    """SQLite file of the ledger; None keeps the usage in memory."""
    usage_days: int = Field(default=35, ge=1, le=3660)
    """Hours older than that are dropped from the usage."""

    @field_validator("members")
    @classmethod
    def _no_key_of_two(cls, members: Mapping[str, Tenant]) -> Mapping[str, Tenant]:
        counts = Counter(key for tenant in members.values() for key in set(tenant.keys))
        if doubled := {key for key, count in counts.items() if count > 1}:
            names = [name for name, tenant in members.items() if doubled & set(tenant.keys)]
            raise ValueError(f"{' and '.join(names)} have a key in common")
        return members

    @model_validator(mode="after")
    def _one_source(self) -> "TenantSettings":
        if self.members and self.file is not None:
            raise ValueError("members and file: give one of them")
        return self

    @property
    def is_on(self) -> bool:
        return bool(self.members) or self.file is not None
