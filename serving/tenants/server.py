"""The ledger behind a socket, one for the cluster."""

import asyncio
import contextlib
import logging
import sqlite3
import time
from collections import defaultdict
from collections.abc import Coroutine

from serving.lines import MAX_LINE_BYTES
from serving.tenants.ledger import Ledger
from serving.tenants.messages import (
    Answer,
    Ask,
    FromReplica,
    Hello,
    Metered,
    Opened,
    Used,
    from_replica,
    to_replica,
)
from serving.tenants.usage import UsageRow, UsageStore

logger = logging.getLogger(__name__)

_HELLO_TIMEOUT_S = 5.0
_WRITE_PERIOD_S = 1.0
# A replica whose connection broke is dead, or connects again at once and says what it has in flight.
_RECONNECT_S = 1.0


class LedgerServer:
    """Answers the replicas' asks in the order of their coming, each without a wait in between, so that no two
    are granted the same last place.
    """

    def __init__(self, store: UsageStore) -> None:
        self._clock = time.monotonic
        self._ledger = Ledger(self._clock)
        self._store = store
        self._server: asyncio.Server | None = None
        self._connections: dict[str, asyncio.StreamWriter] = {}
        self._unwritten: defaultdict[str, dict[tuple[int, str, str], Metered]] = defaultdict(dict)
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self, host: str) -> str:
        """Listen on a free port of `host`; returns host:port."""
        self._server = await asyncio.start_server(self._serve, host, 0, limit=MAX_LINE_BYTES)
        self._spawn(self._keep())
        return f"{host}:{self._server.sockets[0].getsockname()[1]}"

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for writer in list(self._connections.values()):
            writer.close()
        await self._write()
        await asyncio.to_thread(self._store.close)

    async def usage(self, tenant: str | None) -> list[UsageRow]:
        """Of one tenant, or of all."""
        await self._write()
        return await asyncio.to_thread(self._store.rows, tenant)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        replica = None
        try:
            async with asyncio.timeout(_HELLO_TIMEOUT_S):
                hello = from_replica.decode(await reader.readline())
            if not isinstance(hello, Hello):
                raise ValueError("a connection begins with Hello")
            replica = hello.replica
            self._connections[replica] = writer
            self._ledger.close_all(replica)
            while line := await reader.readline():
                if (answer := self._receive(replica, from_replica.decode(line))) is not None:
                    writer.write(to_replica.encode(answer))
        except (ValueError, OSError) as error:
            logger.warning("connection of replica %s: %s", replica, type(error).__name__)
        finally:
            writer.close()
            if replica is not None and self._connections.get(replica) is writer:
                del self._connections[replica]
                self._spawn(self._forget(replica))
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    def _receive(self, replica: str, message: FromReplica) -> Answer | None:
        match message:
            case Ask(number, tenant, prompt_tokens, expected_tokens):
                verdict = self._ledger.ask(replica, tenant, message.limits, prompt_tokens, expected_tokens)
                return Answer(
                    number,
                    len(self._connections),
                    verdict.reason,
                    verdict.retry_after_s,
                    verdict.remaining_requests,
                    verdict.reset_requests_s,
                    verdict.remaining_tokens,
                    verdict.reset_tokens_s,
                )
            case Used(tenant, output_tokens, num_closed, released_tokens):
                self._ledger.use(replica, tenant, output_tokens, num_closed, released_tokens)
            case Metered(hour, tenant, model):
                self._unwritten[replica][hour, tenant, model] = message
            case Opened(tenant):
                self._ledger.put(replica, tenant, message.account(self._clock()))
            case Hello():
                raise ValueError("Hello comes first and once")
        return None

    async def _forget(self, replica: str) -> None:
        await asyncio.sleep(_RECONNECT_S)
        if replica not in self._connections:
            self._ledger.close_all(replica)

    async def _keep(self) -> None:
        while True:
            await asyncio.sleep(_WRITE_PERIOD_S)
            self._ledger.sweep()
            await self._write()

    async def _write(self) -> None:
        if not self._unwritten:
            return
        taken, self._unwritten = self._unwritten, defaultdict(dict)
        try:
            await asyncio.to_thread(self._store.write, {r: list(m.values()) for r, m in taken.items()})
        except sqlite3.Error as error:  # a full disk: tried again, what came meanwhile wins
            logger.warning("usage cannot be written: %s", error)
            for replica, metered in taken.items():
                self._unwritten[replica] = {**metered, **self._unwritten[replica]}

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
