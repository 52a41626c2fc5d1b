"""Usage by hour, tenant and model, in SQLite."""

import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from serving.tenants.messages import Metered

HOUR_S = 3600
_DAY_S = 24 * HOUR_S
_TABLE = """
CREATE TABLE IF NOT EXISTS usage (
    hour INTEGER NOT NULL, tenant TEXT NOT NULL, model TEXT NOT NULL, replica TEXT NOT NULL,
    requests INTEGER NOT NULL, prompt_tokens INTEGER NOT NULL, output_tokens INTEGER NOT NULL,
    refusals INTEGER NOT NULL,
    PRIMARY KEY (hour, tenant, model, replica)
) WITHOUT ROWID
"""
_INSERT = "INSERT OR REPLACE INTO usage VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
_SELECT = """
SELECT hour, tenant, model, sum(requests), sum(prompt_tokens), sum(output_tokens), sum(refusals)
FROM usage WHERE tenant = coalesce(?, tenant) GROUP BY hour, tenant, model ORDER BY hour, tenant, model
"""


@dataclass(frozen=True, slots=True)
class UsageRow:
    """Over all replicas. `hour` is its beginning in UTC, as ISO 8601."""

    hour: str
    tenant: str
    model: str
    requests: int
    prompt_tokens: int
    output_tokens: int
    refusals: int


class UsageStore:
    """Takes replicas' counts as they stand, each replacing the replica's former one of the hour: neither a
    message that comes twice nor a ledger that starts anew counts anything twice. Blocks; for any thread.
    """

    def __init__(self, file: Path | None, days: int, clock: Callable[[], float] = time.time) -> None:
        """file: None keeps all in memory. days: what is older is dropped."""
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
        self._days, self._clock = days, clock
        self._lock = threading.Lock()
        self._database = sqlite3.connect(":memory:" if file is None else file, check_same_thread=False)
        self._database.execute(_TABLE)

    def write(self, counts: Mapping[str, Iterable[Metered]]) -> None:
        """counts: by replica."""
        rows = [
            (m.hour, m.tenant, m.model, replica, m.requests, m.prompt_tokens, m.output_tokens, m.refusals)
            for replica, metered in counts.items()
            for m in metered
        ]
        with self._lock, self._database as database:
            database.executemany(_INSERT, rows)
            database.execute("DELETE FROM usage WHERE hour < ?", (self._clock() - self._days * _DAY_S,))

    def rows(self, tenant: str | None = None) -> list[UsageRow]:
        """Of one tenant, or of all, oldest first."""
        with self._lock:
            found = self._database.execute(_SELECT, (tenant,)).fetchall()
        return [UsageRow(_iso(hour), *rest) for hour, *rest in found]

    def close(self) -> None:
        with self._lock:
            self._database.close()


def _iso(hour: int) -> str:
    return time.strftime("%Y-%m-%dT%H:00:00Z", time.gmtime(hour))
