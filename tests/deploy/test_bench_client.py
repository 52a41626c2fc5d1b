"""The client that measures, against servers that behave well and badly."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable

import pytest

from deploy.bench.client import RefusedError, Streams, Timeline

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
Answer = Callable[[asyncio.StreamWriter, dict], "asyncio.Future[None]"]


def chunked(*events: object) -> bytes:
    body = b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events)
    return b"%x\r\n%b\r\n" % (len(body), body)


def text(word: str) -> dict:
    return {"choices": [{"text": word}]}


USAGE = {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}
END = b"0\r\n\r\n"


@contextlib.asynccontextmanager
async def server(answer) -> AsyncIterator[tuple[str, list[bytes]]]:
    """Its address, and the heads of the requests it got. `answer` writes what the client is to read."""
    heads: list[bytes] = []

    async def serve(reader, writer):
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                body = json.loads(await reader.readexactly(length))
                heads.append(head)
                if await answer(writer, body) == "close":
                    break
        writer.close()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with listening:
        yield f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}", heads


async def two_tokens(writer, body):
    writer.write(HEAD + chunked(text("a")))
    await asyncio.sleep(0.05)
    writer.write(chunked(text("b")))
    # A line that comes in two pieces counts when its end is there.
    last = chunked(USAGE) + END
    writer.write(last[:30])
    await asyncio.sleep(0.02)
    writer.write(last[30:])


async def ask(streams: Streams, url: str, **fields) -> Timeline:
    timeline = Timeline(0.0)
    await streams.complete(url, "model", "prompt", 2, timeline, **fields)
    return timeline


async def test_tokens_are_noted_when_they_came():
    async with server(two_tokens) as (url, _), Streams(10) as streams:
        timeline = await ask(streams, url)
    assert (len(timeline.arrivals), timeline.num_tokens, timeline.num_prompt_tokens) == (2, 2, 3)
    assert timeline.gaps[0] >= 0.04


async def test_a_chunk_without_text_is_no_token():
    async def answer(writer, body):
        writer.write(HEAD + chunked(text(""), text("a"), text(""), USAGE) + END)

    async with server(answer) as (url, _), Streams(10) as streams:
        assert len((await ask(streams, url)).arrivals) == 2  # the first chunk counts whatever it brings


async def test_a_connection_is_used_again_and_replaced_where_the_server_closed_it():
    connections = set()

    async def answer(writer, body):
        connections.add(writer)
        writer.write(HEAD + chunked(text("a"), USAGE) + END)
        if body["prompt"] == "last":
            return "close"
        return None

    async with server(answer) as (url, heads), Streams(10) as streams:
        for prompt in ("one", "two", "last", "after"):
            await streams.complete(url, "model", prompt, 2, Timeline(0.0))
        assert (len(heads), len(connections)) == (4, 2)


async def test_fields_and_headers_are_sent():
    bodies = []

    async def answer(writer, body):
        bodies.append(body)
        writer.write(HEAD + chunked(text("a"), USAGE) + END)

    async with server(answer) as (url, heads), Streams(10) as streams:
        await ask(streams, url, fields={"service_tier": "voice"}, headers={"X-Slo-Ttft-Ms": "100"})
    assert bodies[0]["service_tier"] == "voice"
    assert b"X-Slo-Ttft-Ms: 100\r\n" in heads[0]


@pytest.mark.parametrize(
    ("status", "error", "message"),
    [("429 Too Many Requests", RefusedError, "busy"), ("500 Oh", RuntimeError, "500: busy")],
)
async def test_another_status_is_an_error_with_the_answers_text(status, error, message):
    async def answer(writer, body):
        writer.write(f"HTTP/1.1 {status}\r\nContent-Length: 4\r\n\r\nbusy".encode())

    async with server(answer) as (url, _), Streams(10) as streams:
        with pytest.raises(error, match=message):
            await ask(streams, url)


async def test_an_error_event_is_an_error():
    async def answer(writer, body):
        writer.write(HEAD + chunked(text("a"), {"error": {"message": "out of memory"}}) + END)

    async with server(answer) as (url, _), Streams(10) as streams:
        with pytest.raises(RuntimeError, match="out of memory"):
            await ask(streams, url)


@pytest.mark.parametrize("begun", [b"", HEAD + chunked(text("a")), b"what is this\r\n\r\n"])
async def test_an_answer_that_is_cut_off_is_no_answer(begun):
    async def answer(writer, body):
        writer.write(begun)
        return "close"

    async with server(answer) as (url, _), Streams(10) as streams:
        with pytest.raises(ConnectionError):
            await ask(streams, url)


async def test_no_request_takes_longer_than_it_may():
    async def answer(writer, body):
        writer.write(HEAD)

    async with server(answer) as (url, _), Streams(0.2) as streams:
        with pytest.raises(TimeoutError):
            await ask(streams, url)
