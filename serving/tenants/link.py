"""A replica's connection to the ledger, and its own part of the books, which it falls back on."""

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, replace

from serving.lines import MAX_LINE_BYTES
from serving.tenants.ledger import Ledger, Limits, Verdict
from serving.tenants.messages import Ask, FromReplica, Hello, Metered, Opened, Used, from_replica, to_replica

logger = logging.getLogger(__name__)

_CONNECT_TIMEOUT_S = 2.0
_RETRY_S = 0.25
# A ledger that does not read for so long is gone or stuck.
_MAX_UNSENT_BYTES = 2**24


class LedgerGoneError(Exception):
    """The ledger did not answer in time, or there is none at the moment."""


@dataclass(frozen=True, slots=True)
class _Full:
    """A limit that the ledger found reached."""

    limits: Limits
    verdict: Verdict
    until_s: float


class LedgerLink:
    """Asks, with a deadline; tells what was used.

    What this replica lets in stands in books of its own too. A new connection begins by telling them, so that
    a ledger that starts anew, or missed something, knows as much as before.

    find: the ledger's host:port now. Raises ConnectionError where there is none.
    metered: all usage of this replica that the ledger may not have yet.
    num_replicas: that there are, until the ledger tells.
    All methods belong to one event loop.
    """

    def __init__(
        self,
        replica: str,
        find: Callable[[], Awaitable[str]],
        metered: Callable[[], Iterable[Metered]],
        timeout_s: float,
        num_replicas: int = 1,
    ) -> None:
        self.num_replicas = num_replicas
        """As the ledger last counted them."""
        self.connected = asyncio.Event()
        self._replica, self._find, self._metered, self._timeout_s = replica, find, metered, timeout_s
        self._books = Ledger(time.monotonic)
        self._writer: asyncio.StreamWriter | None = None
        self._numbers = itertools.count()
        self._full: dict[str, _Full] = {}
        self._asked: dict[int, asyncio.Future[Verdict | None]] = {}

    async def ask(self, tenant: str, limits: Limits, prompt_tokens: int, expected_tokens: int) -> Verdict:
        """The ledger's decision. Raises LedgerGoneError."""
        number = next(self._numbers)
        answer = self._asked[number] = asyncio.get_running_loop().create_future()
        limit = (limits.requests, limits.tokens, limits.concurrency)
        if not self._send(Ask(number, tenant, prompt_tokens, expected_tokens, *limit)):
            del self._asked[number]
            raise LedgerGoneError
        try:
            async with asyncio.timeout(self._timeout_s):
                verdict = await asyncio.shield(answer)
        except TimeoutError:
            # Its answer may still come, and what it holds would no longer be what this replica has let in:
            # the next connection tells.
            logger.warning("the ledger of tenants did not answer within %g s", self._timeout_s)
            self._drop()
            raise LedgerGoneError from None
        except asyncio.CancelledError:
            answer.add_done_callback(
                lambda done: self._undo(done.result(), tenant, prompt_tokens, expected_tokens)
            )
            raise
        if verdict is None:
            raise LedgerGoneError
        if verdict.is_granted:
            self._books.enter(self._replica, tenant, prompt_tokens, expected_tokens)
        elif verdict.reason in ("requests", "tokens"):
            self._full[tenant] = _Full(limits, verdict, time.monotonic() + verdict.retry_after_s)
        return verdict

    def decide_alone(self, tenant: str, limits: Limits, prompt_tokens: int, expected_tokens: int) -> Verdict:
        """By this replica's share of the limits and what it has let in itself; and not before the time that
        the ledger's last refusal named.
        """
        full = self._full.get(tenant)
        if full is not None and full.limits == limits and (wait_s := full.until_s - time.monotonic()) > 0:
            return replace(full.verdict, retry_after_s=wait_s)
        share = limits.share(self.num_replicas)
        verdict = self._books.ask(
            self._replica, tenant, share, prompt_tokens, share.expected(prompt_tokens, expected_tokens)
        )
        if verdict.reason == "too_large" and prompt_tokens <= (limits.tokens or 0):
            return replace(verdict, reason="tokens")  # for the share alone: it may pass later
        return verdict

    def use(self, used: Used) -> None:
        self._books.use(self._replica, used.tenant, used.output_tokens, used.num_closed, used.released_tokens)
        self._send(used)

    def meter(self, metered: Metered) -> bool:
        """Whether it was sent."""
        return self._send(metered)

    def sweep(self) -> None:
        self._books.sweep()

    async def run(self) -> None:
        """Keep a connection, until cancelled."""
        while True:
            try:
                await self._connect()
            except (OSError, ValueError) as error:  # TimeoutError is an OSError
                logger.info("no ledger of tenants: %s", type(error).__name__)
            await asyncio.sleep(_RETRY_S)

    async def _connect(self) -> None:
        """Until the connection ends."""
        async with asyncio.timeout(_CONNECT_TIMEOUT_S):
            host, _, port = (await self._find()).rpartition(":")
            reader, writer = await asyncio.open_connection(host, int(port), limit=MAX_LINE_BYTES)
        try:
            self._writer = writer
            self._send(Hello(self._replica))
            now = time.monotonic()
            for tenant, account in self._books.accounts_of(self._replica):
                self._send(Opened.of(tenant, account, now))
            for metered in self._metered():
                self._send(metered)
            self.connected.set()
            while line := await reader.readline():
                answer = to_replica.decode(line)
                self.num_replicas = answer.num_replicas
                if (asked := self._asked.pop(answer.number, None)) is not None:
                    asked.set_result(answer.verdict)
        finally:
            self._drop()
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    def _send(self, message: FromReplica) -> bool:
        if self._writer is None:
            return False
        if self._writer.transport.get_write_buffer_size() > _MAX_UNSENT_BYTES:
            self._drop()
            return False
        self._writer.write(from_replica.encode(message))
        return True

    def _drop(self) -> None:
        """`_connect` notices, and its caller connects anew."""
        self.connected.clear()
        if self._writer is not None:
            self._writer.transport.abort()
            self._writer = None
        asked, self._asked = self._asked, {}
        for answer in asked.values():
            answer.set_result(None)

    def _undo(self, verdict: Verdict | None, tenant: str, prompt_tokens: int, expected_tokens: int) -> None:
        """Who asked has left before the answer came."""
        if verdict is not None and verdict.is_granted:
            self._books.enter(self._replica, tenant, prompt_tokens, expected_tokens)
            self.use(Used(tenant, 0, 1, expected_tokens))
