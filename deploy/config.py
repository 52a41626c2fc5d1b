"""The YAML configuration: seven sections, each key checked, unknown ones refused with the nearest valid."""

import dataclasses
import difflib
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from engine import EngineConfig, ParameterError
from serving import (
    AutoscalingSettings,
    LogSettings,
    RoutingSettings,
    ServingSettings,
    TelemetrySettings,
    TenantSettings,
    TraceSettings,
)
from serving.tenants.directory import TenantFileError, check_tiers

DEFAULT_MODEL = "SmolLM2-135M-Instruct"


class ConfigError(Exception):
    """One line that says which key is wrong and what is allowed."""


class ClusterSettings(BaseModel):
    """The `cluster` section: processes and addresses."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    replicas: int = Field(default=1, ge=1, le=1024)
    """At the start, where `autoscaling` is set."""
    autoscaling: AutoscalingSettings | None = None
    """None: the number of replicas stays."""
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=1, le=65535)
    haproxy: Literal["auto", "on", "off"] = "auto"
    """HAProxy in front of the replicas (one hop, retries); `auto` uses it where it is installed."""
    start_timeout_s: float = Field(default=600.0, gt=0)
    """From the start of Ray until all replicas are warm."""

    @property
    def max_replicas(self) -> int:
        """The most that may run at a time, a rolling change aside."""
        return self.autoscaling.max_replicas if self.autoscaling else self.replicas


@dataclasses.dataclass(frozen=True)
class PeregrineConfig:
    """Everything that `peregrine serve` needs. `engine.model` is a name or path, not yet resolved."""

    engine: EngineConfig
    serving: ServingSettings
    routing: RoutingSettings
    cluster: ClusterSettings
    logs: LogSettings = dataclasses.field(default_factory=LogSettings)
    traces: TraceSettings = dataclasses.field(default_factory=TraceSettings)
    tenants: TenantSettings = dataclasses.field(default_factory=TenantSettings)

    @property
    def needs_router(self) -> bool:
        """Where HAProxy can ask one, and the number of replicas changes only as `cluster` says."""
        policy = self.routing.policy
        return policy != "none" and (policy != "auto" or self.cluster.max_replicas > 1)

    @property
    def telemetry(self) -> TelemetrySettings:
        return TelemetrySettings(logs=self.logs, traces=self.traces)


_SECTIONS = ("engine", "serving", "routing", "cluster", "logs", "traces", "tenants")


def load_config(path: Path | None, overrides: dict[str, dict[str, Any]] | None = None) -> PeregrineConfig:
    """Read a YAML file (None: all defaults) and lay the overrides, by section, over it.

    Tenants that stand in it are read again from it whenever it changes; all else is read once.

    Raises:
        ConfigError: the file is unreadable, a key is unknown, or a value is not allowed.
    """
    config = config_from(read_sections(path) if path else {}, overrides)
    if path is None or not config.tenants.members:
        return config
    return dataclasses.replace(config, tenants=config.tenants.model_copy(update={"file": path.resolve()}))


def config_from(raw: dict[str, Any], overrides: dict[str, dict[str, Any]] | None = None) -> PeregrineConfig:
    """`load_config` for sections that are read already. Raises ConfigError."""
    for section in raw:
        _check_known(section, _SECTIONS, "")
    sections: dict[str, dict[str, Any]] = {}
    for name in _SECTIONS:
        value = raw.get(name) or {}
        if not isinstance(value, dict):
            raise ConfigError(f"{name}: must be a mapping of keys to values")
        sections[name] = {**value, **(overrides or {}).get(name, {})}
    engine = {"model": DEFAULT_MODEL, **sections["engine"]}
    config = PeregrineConfig(
        engine=_build(EngineConfig, engine, "engine"),
        serving=_build(ServingSettings, sections["serving"], "serving"),
        routing=_build(RoutingSettings, sections["routing"], "routing"),
        cluster=_build(ClusterSettings, sections["cluster"], "cluster"),
        logs=_build(LogSettings, sections["logs"], "logs"),
        traces=_build(TraceSettings, sections["traces"], "traces"),
        tenants=_build(TenantSettings, sections["tenants"], "tenants"),
    )
    try:
        for name, tenant in config.tenants.members.items():
            check_tiers(name, tenant, config.serving.tiers)
    except TenantFileError as error:
        raise ConfigError(str(error)) from None
    return config


def read_sections(path: Path) -> dict[str, Any]:
    """The file as it stands, nothing checked but that it is a mapping. Raises ConfigError."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: must be a mapping with the sections {', '.join(_SECTIONS)}")
    return raw


def _build(kind: Any, values: dict[str, Any], section: str) -> Any:
    known = (
        [f.name for f in dataclasses.fields(kind)]
        if dataclasses.is_dataclass(kind)
        else list(kind.model_fields)
    )
    for key in values:
        _check_known(key, known, f"{section}.")
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        cause = first.get("ctx", {}).get("error")
        if isinstance(cause, ParameterError):  # a dataclass's own check
            raise ConfigError(f"{section}.{cause}") from None
        path = ".".join(str(part) for part in (section, *first["loc"]))
        # A key that is written wrongly is a key all the same.
        is_secret = path.startswith(("serving.api_keys", "tenants.members"))
        given = "" if is_secret else f", got {first['input']!r}"
        raise ConfigError(f"{path}: {first['msg']}{given}") from None


def _check_known(key: Any, known: Any, prefix: str) -> None:
    if key in known:
        return
    nearest = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)[0]
    raise ConfigError(
        f"{prefix}{key}: unknown key; did you mean {prefix}{nearest}? (known: {', '.join(known)})"
    )
