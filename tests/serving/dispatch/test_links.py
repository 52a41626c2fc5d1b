"""Replica and router over a real connection."""

import asyncio
import json

import pytest
import pytest_asyncio

from monitoring import Recorder
from serving.dispatch.headers import FLIGHT, ROUTE, FlightNote
from serving.dispatch.listener import Listener
from serving.dispatch.reporter import RouterLinks, refusal_wait_s
from serving.dispatch.unrouted import unrouted_headers
from serving.tiers import TIERS
from tests.serving.dispatch.helpers import BODY, hello, is_empty, make_dispatcher, report

DEADLINE_S = 10.0


async def until(condition) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110  # it comes over a socket
            await asyncio.sleep(0.005)


@pytest_asyncio.fixture
async def pair():
    dispatcher, _ = make_dispatcher(1)
    listener = Listener(dispatcher)
    dispatcher.reply_to = await listener.start("127.0.0.1")
    recorder = Recorder()
    links = RouterLinks(lambda: hello("r0"), lambda: report(1), recorder)
    yield dispatcher, links, recorder
    await links.close()
    await listener.close()


async def test_events_reach_the_books(pair):
    dispatcher, links, recorder = pair
    flight = links.flight(dispatcher.route(BODY, len(BODY)).headers, arrival_s=10.0)
    await until(lambda: dispatcher.counters()["unseen"] == 0)
    flight.first_token(10.5)
    flight.first_token(11.0)
    await until(lambda: dispatcher.counters()["active_decodes"] == 1)
    assert "actual-ttft-ms=500.0" in flight.explain("abc")
    assert b"peregrine_route_ttft_ratio_count 1.0" in recorder.exposition()
    flight.ended("finished", 4)
    flight.ended("failed")
    await until(lambda: is_empty(dispatcher))


async def test_events_of_a_moment_are_one_message(pair):
    dispatcher, links, _ = pair
    sent: list[bytes] = []
    flight = links.flight(dispatcher.route(BODY, len(BODY)).headers, arrival_s=10.0)
    (link,) = links._links.values()
    link.send = sent.append
    flight.first_token(10.5)
    flight.ended("finished", 4)
    assert not sent  # not in the way of what is just being done
    await until(lambda: any(b"Ended" in data for data in sent))
    assert [data.count(b"\n") for data in sent if b"Report" not in data] == [3]


async def test_requests_that_end_at_once_are_one_message(pair):
    dispatcher, links, _ = pair
    sent: list[bytes] = []
    flights = [links.flight(dispatcher.route(BODY, len(BODY)).headers, arrival_s=10.0) for _ in range(3)]
    (link,) = links._links.values()
    link.send = sent.append
    for flight in flights:
        flight.ended("finished", 4)
    await until(lambda: any(b"Ended" in data for data in sent))
    assert [data.count(b"Ended") for data in sent if b"Report" not in data] == [3]


async def test_requests_that_no_router_sent_are_in_its_books_too(pair):
    dispatcher, links, _ = pair
    assert links.flight({}, 0.0) is None
    links.connect(dispatcher.reply_to)
    body = json.dumps({"prompt": "word " * 400, "max_tokens": 9, "service_tier": "voice"}).encode()
    flight = links.flight(unrouted_headers(body, TIERS), 0.0)
    await until(lambda: dispatcher.counters()["in_flight"] == 1)
    counters = dispatcher.counters()
    assert (counters["pending_prefill"], counters["expected_output"]) == (500, 9)
    # The next one with this beginning is sent there for what it saves.
    assert "saved-tokens" in dispatcher.route(body, len(body)).headers[ROUTE]
    flight.ended("finished", 3)


async def test_a_replica_that_goes_takes_its_requests_along(pair):
    dispatcher, links, _ = pair
    links.flight(dispatcher.route(BODY, len(BODY)).headers, 0.0)
    await until(lambda: dispatcher.counters()["unseen"] == 0)
    await links.close()
    await until(lambda: len(dispatcher.router.fleet) == 0)
    assert is_empty(dispatcher)


async def test_every_router_hears_of_every_request_and_a_new_one_of_those_that_are_open(pair):
    dispatcher, links, _ = pair
    flight = links.flight(dispatcher.route(BODY, len(BODY)).headers, 0.0)
    flight.first_token(1.0)
    other, _ = make_dispatcher(1)
    listener = Listener(other)
    other.reply_to = await listener.start("127.0.0.1")
    second = links.flight(other.route(BODY, len(BODY)).headers, 0.0)
    await until(lambda: other.counters()["in_flight"] == 2 == dispatcher.counters()["in_flight"])
    assert other.counters()["active_decodes"] == 1
    flight.ended("finished", 3)
    second.ended("aborted")
    await until(lambda: is_empty(other) and is_empty(dispatcher))
    await listener.close()


async def test_a_router_that_asks_hears_of_what_others_send_and_of_what_is_cached(pair):
    dispatcher, links, _ = pair
    body = json.dumps({"prompt": "A river runs through the old town. " * 40}).encode()
    flight = links.flight(dispatcher.route(body, len(body)).headers, 0.0)
    flight.first_token(1.0)
    flight.ended("finished", 3)
    other, _ = make_dispatcher(1)
    listener = Listener(other)
    other.reply_to = await listener.start("127.0.0.1")
    for _ in range(2):
        links.connect(other.reply_to)
    await until(lambda: not other.is_waiting_for_replicas)
    await until(lambda: "saved-tokens=320" in other.route(body, len(body)).headers[ROUTE])
    links.flight(dispatcher.route(BODY, len(BODY)).headers, 0.0)
    await until(lambda: other.counters()["in_flight"] == other.counters()["unseen"] + 1)
    await listener.close()


async def test_a_connection_that_talks_nonsense_is_closed(pair):
    dispatcher, _, _ = pair
    host, port = dispatcher.reply_to.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"GET / HTTP/1.1\r\n\r\n")
    async with asyncio.timeout(DEADLINE_S):
        assert await reader.read() == b""
    writer.close()
    assert dispatcher.router.fleet.replica_ids() == ["r0"]


async def test_a_router_that_is_not_there_harms_no_request(pair):
    _, links, _ = pair
    flight = links.flight({FLIGHT: "f 1/0/0 127.0.0.1:1 -", ROUTE: ""}, 0.0)
    await asyncio.sleep(0.05)
    flight.first_token(1.0)
    flight.ended("finished", 1)
    assert flight.explain("abc") == "replica=abc; ; actual-ttft-ms=1000.0"


def test_requests_that_no_router_sent():
    links = RouterLinks(lambda: hello("r0"), lambda: report(1), Recorder())
    assert links.flight({}, 0.0) is None
    assert refusal_wait_s({}) is None
    assert refusal_wait_s({"x-serve-router-refuse": "2.5"}) == 2.5


@pytest.mark.parametrize("reply_to", ["", "10.0.0.1:5000"])
@pytest.mark.parametrize("prefixes", [[], [1, 2**63]])
def test_a_note_is_read_as_it_was_written(reply_to, prefixes):
    note = FlightNote("f", 350, 16, 2, reply_to, prefixes)
    assert FlightNote.read(note.write()) == note
    assert note.write() == note.write().strip()  # a proxy trims


@pytest.mark.parametrize(
    "value", ["f", "f 1", "f 1/2 - -", "f 1/2/x - -", "f 1/-2/3 - -", "f 1/2/3 - zz", "f 1/2/3 - - -"]
)
def test_of_a_note_that_nobody_wrote_the_id_is_kept(value):
    assert FlightNote.read(value) == FlightNote("f")


def test_a_note_without_an_id_is_none():
    with pytest.raises(ValueError, match="no flight"):
        FlightNote.read("")
