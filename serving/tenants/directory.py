"""Who the tenants are now: read at the start, and again whenever their file changes."""

import asyncio
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml
from pydantic import ValidationError

from serving.tenants.keys import KeyRing
from serving.tenants.settings import Tenant, TenantSettings

logger = logging.getLogger(__name__)

_POLL_S = 0.25


class TenantFileError(Exception):
    """One line that says what is wrong with the file, without a value of it."""


@dataclass(frozen=True, slots=True)
class Member:
    """A tenant and its name."""

    name: str
    rules: Tenant


class Directory:
    """Finds tenants by their keys.

    A file that cannot be read, or does not make sense, changes nothing: the tenants of before stay, and a
    warning says why.
    """

    def __init__(self, settings: TenantSettings, tiers: Collection[str]) -> None:
        """tiers: names that `tiers` of a tenant may have. Raises TenantFileError."""
        self._file, self._tiers = settings.file, tiers
        self._seen = _signature(self._file) if self._file else None
        self._install(read_members(self._file) if self._file else settings.members)

    @property
    def names(self) -> list[str]:
        return list(self._members)

    def identify(self, key: bytes) -> Member | None:
        """None for a key that is nobody's, or nobody's any more."""
        name = self._keys.owner(key)
        return None if name is None else Member(name, self._members[name])

    async def follow(self) -> None:
        """Look at the file several times a second, until cancelled.

        By its time and size: the volumes of Kubernetes swap a link, of which not every notification tells.
        """
        while self._file is not None:
            await asyncio.sleep(_POLL_S)
            await self.refresh()

    async def refresh(self) -> None:
        """Read the file if it has changed."""
        assert self._file is not None
        signature = await asyncio.to_thread(_signature, self._file)
        if signature == self._seen:
            return
        self._seen = signature
        try:
            self._install(await asyncio.to_thread(read_members, self._file))
        except TenantFileError as error:
            logger.warning("tenants are as before: %s", error)

    def _install(self, members: Mapping[str, Tenant]) -> None:
        for name, tenant in members.items():
            check_tiers(name, tenant, self._tiers)
        self._members, self._keys = members, KeyRing(members)


def check_tiers(name: str, tenant: Tenant, tiers: Collection[str]) -> None:
    """Raises TenantFileError for a tier that there is not."""
    if unknown := [tier for tier in tenant.tiers or () if tier not in tiers]:
        known = ", ".join(sorted(tiers))
        raise TenantFileError(f"tenants.members.{name}.tiers: must be of {known}, got {unknown[0]!r}")


def read_members(path: Path) -> Mapping[str, Tenant]:
    """`tenants.members` of a YAML file, whatever else the file has. Raises TenantFileError."""
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise TenantFileError(f"{path}: cannot be read ({type(error).__name__})") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" in line {mark.line + 1}" if mark else ""
        raise TenantFileError(f"{path}: not valid YAML{place}") from None
    section = document.get("tenants") if isinstance(document, dict) else None
    if not isinstance(section, dict) or "members" not in section:
        raise TenantFileError(f"{path}: must have 'tenants: {{members: ...}}'")
    try:
        return TenantSettings(members=section["members"] or {}).members
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        raise TenantFileError(f"{path}: tenants.{describe(first['loc'])}: {first['msg']}") from None


def describe(location: tuple[int | str, ...]) -> str:
    return ".".join(str(part) for part in location)


def _signature(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size
