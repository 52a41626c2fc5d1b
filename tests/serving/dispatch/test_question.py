"""What comes over the router's connections: questions, and all else."""

import asyncio
import contextlib

import pytest
import uvicorn
import uvicorn.config

from serving.dispatch import question
from serving.dispatch.question import answer_questions

HEAD = b"POST /internal/route HTTP/1.0\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n"
TIMEOUT_S = 10


async def app(scope, receive, send):
    await send({"type": "http.response.start", "status": 404, "headers": []})
    await send({"type": "http.response.body", "body": scope["path"].encode()})


@pytest.fixture
async def router(monkeypatch):
    """The address of a server that answers with what it was asked, and the server."""
    monkeypatch.setattr(uvicorn.config, "HTTP_PROTOCOLS", dict(uvicorn.config.HTTP_PROTOCOLS))
    answer_questions(lambda body, num_bytes: b"HTTP/1.0 200 OK\r\n\r\n%b of %d" % (body, num_bytes))
    server = uvicorn.Server(uvicorn.Config(app, port=0, lifespan="off", log_level="warning"))
    serving = asyncio.create_task(server.serve())
    async with asyncio.timeout(TIMEOUT_S):
        while not server.started:  # noqa: ASYNC110  # uvicorn has no event for it
            await asyncio.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[:2], server
    server.should_exit = True
    await asyncio.wait_for(serving, TIMEOUT_S)


async def ask(address, *pieces: bytes) -> bytes:
    """All that comes until the other end closes."""
    reader, writer = await asyncio.open_connection(*address)
    with contextlib.closing(writer):
        for piece in pieces:
            writer.write(piece)
            await asyncio.sleep(0.02)
        return await asyncio.wait_for(reader.read(), TIMEOUT_S)


async def test_a_question_is_answered_and_the_connection_closed(router):
    address, server = router
    assert await ask(address, HEAD + b"Content-Length: 3\r\n\r\nabc") == b"HTTP/1.0 200 OK\r\n\r\nabc of 3"
    assert not server.server_state.connections


@pytest.mark.parametrize("size", [1, 7, 40])
async def test_it_may_come_in_pieces(router, size):
    asked = HEAD + b"Content-Length: 5\r\nx-request-id: 1\r\n\r\nhello"
    pieces = [asked[i : i + size] for i in range(0, len(asked), size)]
    if size == 1:
        pieces = [*pieces[:5], b"".join(pieces[5:])]  # also within its first line
    assert (await ask(router[0], *pieces)).endswith(b"hello of 5")


async def test_the_whole_bodys_length_is_told_where_only_its_beginning_comes(router):
    asked = HEAD + b"Content-Length: 3\r\nX-Body-Truncated: 3/70000\r\n\r\nabc"
    assert (await ask(router[0], asked)).endswith(b"abc of 70000")


async def test_no_header_of_the_body_counts(router):
    body = b"x\r\nContent-Length: 1\r\n\r\n"
    asked = HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body
    assert (await ask(router[0], asked)).endswith(body + b" of %d" % len(body))


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET /-/healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 404),
        (b"POST /internal/route HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 0\r\n\r\n", 404),
        (HEAD + b"\r\n", 404),  # without a length
        (b"nonsense\r\n\r\n", 400),
    ],
)
async def test_what_is_no_question_is_uvicorns(router, request_, status):
    assert (await ask(router[0], request_)).startswith(b"HTTP/1.1 %d " % status)


async def test_connections_that_ask_nothing_do_not_hold_up_the_servers_end(router):
    address, server = router
    reader, writer = await asyncio.open_connection(*address)
    await asyncio.sleep(0.05)
    server.should_exit = True
    assert await asyncio.wait_for(reader.read(), TIMEOUT_S) == b""
    writer.close()


async def test_a_question_that_is_never_whole_ends(router, monkeypatch):
    monkeypatch.setattr(question, "_WHOLE_WITHIN_S", 0.1)
    assert await ask(router[0], HEAD + b"Content-Length: 3\r\n\r\na") == b""
