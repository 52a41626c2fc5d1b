"""The replica's side: tells the routers what becomes of the requests that they sent."""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping

from monitoring import Recorder
from serving.dispatch.headers import FLIGHT, REFUSE, ROUTE, FlightNote, predicted_ttft_s
from serving.dispatch.messages import (
    Arrived,
    Ended,
    EndReason,
    FirstToken,
    Held,
    Hello,
    Message,
    Report,
    encode,
)
from serving.routing.prefix_index import PrefixIndex

logger = logging.getLogger(__name__)

_REPORT_PERIOD_S = 0.25
# Events are collected for so long: each message wakes every router, just when a prompt is computed or a
# first chunk goes to the client. An end frees a place, of which the next choice is to know; of an arrival
# the router that chose knows already, and the others hear with whatever comes next.
_COLLECT_S: dict[type[Message], float] = {Arrived: 0.1, FirstToken: 0.02, Ended: 0.0}
_CONNECT_TIMEOUT_S = 2.0
# A router that does not read for so long is gone or stuck; its books are rebuilt when it connects again.
_MAX_UNSENT_BYTES = 2**20
# Whose prefixes a new router is told of: 256,000 tokens. More may be cached: it is a hint.
_MAX_HELD_BLOCKS = 16_384


class Flight:
    """One request on this replica, as the routers know it. Each event counts once, later ones are ignored."""

    def __init__(
        self,
        arrived: Arrived,
        route: str,
        send: Callable[[Message], None],
        arrival_s: float,
        recorder: Recorder,
    ) -> None:
        self.route = route
        self.ttft_s: float | None = None
        self.has_ended = False
        self._has_told = False  # of the first token
        self._arrived, self._send, self._arrival_s, self._recorder = arrived, send, arrival_s, recorder
        send(arrived)

    def first_token(self, now_s: float) -> None:
        """`now_s` is on the clock that the arrival was stamped with."""
        if self.ttft_s is not None or self.has_ended:
            return
        self.ttft_s = now_s - self._arrival_s
        # When the first chunk is on its way.
        asyncio.get_running_loop().call_soon(self._tell_first_token)

    def _tell_first_token(self) -> None:
        if self._has_told or self.ttft_s is None:
            return
        self._has_told = True
        self._send(FirstToken(self._arrived.flight_id))
        if (predicted_s := predicted_ttft_s(self.route)) and self.ttft_s > 0:
            self._recorder.record_prediction(predicted_s, self.ttft_s)

    def ended(self, reason: EndReason, output_tokens: int = 0) -> None:
        if not self.has_ended:
            self.has_ended = True
            self._tell_first_token()
            self._send(Ended(self._arrived.flight_id, reason, output_tokens))

    @property
    def prefixes(self) -> list[int]:
        return self._arrived.prefixes

    def history(self) -> list[Message]:
        """What was said of it so far, for a router that was not there."""
        flight_id = self._arrived.flight_id
        return [self._arrived] if self.ttft_s is None else [self._arrived, FirstToken(flight_id)]

    def explain(self, replica: str) -> str:
        """The value of the `x-peregrine-route` header."""
        actual = "" if self.ttft_s is None else f"; actual-ttft-ms={self.ttft_s * 1e3:.1f}"
        return f"replica={replica}; {self.route}{actual}"


class RouterLinks:
    """Connections to the routers, opened when one asks for it or a request names one, and kept until either
    side goes.

    Every router hears of every request, so that several of them have the same books but for the time that a
    message takes; one that is new is told of what is open, and of what lies in the prefix cache.

    hello: this replica's name and limits, once the engine is there.
    report: its load now.
    All methods belong to one event loop; none of them waits.
    """

    def __init__(self, hello: Callable[[], Hello], report: Callable[[], Report], recorder: Recorder) -> None:
        self._hello, self._report, self._recorder = hello, report, recorder
        self._links: dict[str, _Link] = {}
        self._open: dict[str, Flight] = {}
        self._held = PrefixIndex(1, _MAX_HELD_BLOCKS)
        self._unsent: list[Message] = []
        self._flushing: asyncio.Handle | None = None  # uvloop's has no time where it is to run at once
        self._flush_at_s = 0.0  # on the event loop's clock; of `_flushing`

    def connect(self, address: str) -> None:
        """Report to the router at host:port from now on, if that is not so already."""
        if address in self._links and not self._links[address].is_closed:
            return
        self._flush()  # what is open tells the new one all of it
        self._links = {address: link for address, link in self._links.items() if not link.is_closed}
        held = self._held.held(0)
        known: list[Message] = [Held(held)] if held else []
        known += [message for flight in self._open.values() for message in flight.history()]
        self._links[address] = _Link(address, self._hello, self._report, known)

    def flight(self, headers: Mapping[str, str], arrival_s: float) -> Flight | None:
        """None for a request that is in no router's books. One without an address to report to is told to the
        routers that are known.
        """
        if not (told := headers.get(FLIGHT)):
            return None
        note = FlightNote.read(told)
        if note.reply_to:
            self.connect(note.reply_to)
        arrived = Arrived(
            note.flight_id,
            note.prompt_tokens,
            note.expected_output_tokens,
            note.priority,
            list(note.prefixes),
        )
        flight = Flight(arrived, headers.get(ROUTE, ""), self._send, arrival_s, self._recorder)
        self._open[note.flight_id] = flight
        return flight

    async def close(self) -> None:
        self._flush()
        for link in self._links.values():
            await link.close()

    def _send(self, message: Message) -> None:
        if isinstance(message, Ended):
            self._open.pop(message.flight_id, None)
        elif isinstance(message, FirstToken):
            # Only now: the prompt's blocks are there.
            prefixes = self._open[message.flight_id].prefixes
            self._held.add(0, PrefixIndex.with_entries(prefixes))
        self._unsent.append(message)
        self._flush_within(_COLLECT_S[type(message)])

    def _flush_within(self, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        at_s = loop.time() + seconds
        if self._flushing is not None:
            if self._flush_at_s <= at_s:
                return
            self._flushing.cancel()
        self._flushing, self._flush_at_s = loop.call_later(seconds, self._flush), at_s

    def _flush(self) -> None:
        if self._flushing is not None:
            self._flushing.cancel()
            self._flushing = None
        if not self._unsent:
            return
        data = b"".join(encode(message) for message in self._unsent)
        self._unsent.clear()
        for link in self._links.values():
            link.send(data)


def refusal_wait_s(headers: Mapping[str, str]) -> float | None:
    """Seconds after which a client is to try again, where the router found no replica for the request."""
    try:
        return max(0.0, float(headers[REFUSE]))
    except (KeyError, ValueError):
        return None


class _Link:
    """One router. What is sent before the connection stands waits for it."""

    def __init__(
        self,
        address: str,
        hello: Callable[[], Hello],
        report: Callable[[], Report],
        known: list[Message],
    ) -> None:
        """known: what to say first."""
        self._address, self._hello, self._report = address, hello, report
        self._waiting: list[bytes] | None = [encode(message) for message in known]
        self._writer: asyncio.StreamWriter | None = None
        self.is_closed = False
        self._task = asyncio.create_task(self._run())

    def send(self, data: bytes) -> None:
        if self.is_closed:
            return
        if self._writer is None:
            assert self._waiting is not None
            self._waiting.append(data)
            return
        if self._writer.transport.get_write_buffer_size() > _MAX_UNSENT_BYTES:
            self.is_closed = True
            self._writer.transport.abort()
            return
        self._writer.write(data)

    async def close(self) -> None:
        self.is_closed = True
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    async def _run(self) -> None:
        host, _, port = self._address.rpartition(":")
        writer = None
        try:
            async with asyncio.timeout(_CONNECT_TIMEOUT_S):
                reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(encode(self._hello()))
            writer.write(b"".join(self._waiting or ()))
            self._waiting, self._writer = None, writer
            reporting = asyncio.create_task(self._report_load())
            try:
                await reader.read()  # a router says nothing: this returns when it closes
            finally:
                reporting.cancel()
        except (OSError, ValueError) as error:  # TimeoutError is an OSError
            logger.warning("no router at %s: %s", self._address, error)
        finally:
            self.is_closed = True
            if writer is not None:
                writer.close()

    async def _report_load(self) -> None:
        while True:
            self.send(encode(self._report()))
            await asyncio.sleep(_REPORT_PERIOD_S)
