"""Answers that are kept, to be read again and to be continued: in this replica's memory, for a while."""

import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from serving.settings import ResponseStoreSettings
from serving.tools import Message

_OVERHEAD_BYTES = 512  # of an entry, beside its texts


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """owner: the tenant who alone may see it; None where there are no tenants. response: the object's JSON.
    conversation: what was said, its answer included, without instructions.
    """

    id: str
    owner: str | None
    response: bytes
    conversation: tuple[Message, ...]

    @property
    def num_bytes(self) -> int:
        """As if no conversation shared its beginning with another."""
        texts = [
            text for m in self.conversation for text in (m.content, *(c.arguments for c in m.tool_calls))
        ]
        return _OVERHEAD_BYTES + len(self.response) + sum(map(sys.getsizeof, texts))


@dataclass(slots=True)
class ResponseStore:
    """The oldest go first, when there are too many, too large or too old ones. One event loop's."""

    settings: ResponseStoreSettings
    clock: Callable[[], float] = time.monotonic
    num_bytes: int = 0
    _entries: OrderedDict[str, tuple[float, StoredResponse]] = field(default_factory=OrderedDict)

    def __len__(self) -> int:
        self._forget_old()
        return len(self._entries)

    def put(self, stored: StoredResponse) -> None:
        """Keep it; one that is larger than all the room is not kept."""
        if stored.num_bytes > self.settings.max_bytes:
            return
        self._entries[stored.id] = (self.clock() + self.settings.ttl_s, stored)
        self.num_bytes += stored.num_bytes
        self._forget_old()
        while len(self._entries) > self.settings.max_count or self.num_bytes > self.settings.max_bytes:
            self._forget(next(iter(self._entries)))

    def get(self, response_id: str, owner: str | None) -> StoredResponse | None:
        """None where there is none, any more, or of this owner's."""
        self._forget_old()
        _, stored = self._entries.get(response_id, (0.0, None))
        return stored if stored is not None and stored.owner == owner else None

    def pop(self, response_id: str, owner: str | None) -> StoredResponse | None:
        """The same, and it is forgotten."""
        if (stored := self.get(response_id, owner)) is not None:
            self._forget(response_id)
        return stored

    def _forget_old(self) -> None:
        now_s = self.clock()
        while self._entries and next(iter(self._entries.values()))[0] <= now_s:
            self._forget(next(iter(self._entries)))

    def _forget(self, response_id: str) -> None:
        _, stored = self._entries.pop(response_id)
        self.num_bytes -= stored.num_bytes
