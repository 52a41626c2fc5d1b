"""API keys: made here, known by their hashes alone.

Keys carry 256 random bits, so that a plain hash keeps them: there is nothing to guess, and a slow hash, which
passwords need, would cost every request milliseconds.
"""

import hashlib
import hmac
import secrets
from collections.abc import Mapping

from serving.tenants.settings import Tenant

_PREFIX = "pg-"
_NUM_BYTES = 32


def new_key() -> str:
    return _PREFIX + secrets.token_urlsafe(_NUM_BYTES)


def hash_key(key: bytes) -> str:
    return f"sha256:{hashlib.sha256(key).hexdigest()}"


class KeyRing:
    """Whose key is it."""

    def __init__(self, members: Mapping[str, Tenant]) -> None:
        self._owners = {hash_: (hash_, name) for name, tenant in members.items() for hash_ in tenant.keys}

    def owner(self, key: bytes) -> str | None:
        """The tenant's name.

        The table's own comparison may stop early, but what it compares is a hash of the key: its time tells
        nothing that leads to a key. The last word is a comparison in constant time.
        """
        given = hash_key(key)
        known, name = self._owners.get(given, ("", None))
        return name if hmac.compare_digest(given, known) else None
