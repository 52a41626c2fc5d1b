"""Asks all replicas when somebody looks, and only then."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence

from serving.state import ReplicaState, package_version
from serving.status.overview import Overview, overview
from serving.status.snapshot import Snapshot, take_snapshot

logger = logging.getLogger(__name__)


class PeersSilentError(Exception):
    """They could not be asked, or did not all answer in time."""


Peers = Callable[[], Awaitable[Sequence[Snapshot]]]
"""Snapshots of all replicas, this one's among them. Raises PeersSilentError."""

_FRESH_S = 0.8
"""Any number of open pages cost one round of questions in so long."""
_FORGET_AFTER_S = 30.0
"""A replica that does not answer is shown as silent so long."""


class StatusBoard:
    """The overview, from this replica's state and its peers'.

    peers: None where this replica is alone.
    """

    def __init__(
        self, state: ReplicaState, peers: Peers | None, clock: Callable[[], float] = time.time
    ) -> None:
        self._state = state
        self._peers = peers
        self._clock = clock
        self._known: dict[str, Snapshot] = {}
        self._asked_at = 0.0
        self._lock = asyncio.Lock()

    async def overview(self) -> Overview:
        async with self._lock:
            if self._clock() - self._asked_at >= _FRESH_S:
                await self._ask()
                self._asked_at = self._clock()
        return overview(
            list(self._known.values()),
            self._state.settings.tiers,
            package_version(),
            self._clock(),
            needs_api_key=bool(self._state.settings.api_keys),
        )

    async def _ask(self) -> None:
        heard: Sequence[Snapshot] = ()
        kept: dict[str, Snapshot] = {}
        if self._peers is not None:
            try:
                heard = await self._peers()
            except PeersSilentError as error:
                # Perhaps one of them hangs: all keep their last word, and grow silent where it gets old.
                oldest = self._clock() - _FORGET_AFTER_S
                kept = {name: s for name, s in self._known.items() if s.taken_at >= oldest}
                logger.warning("not all replicas told their status: %s", error)
        own = take_snapshot(self._state)
        self._known = kept | {s.replica: s for s in heard} | {own.replica: own}
