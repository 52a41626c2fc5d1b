"""The WebSocket over a real server and a real client; the engine is a double."""

import asyncio
import contextlib
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
import pytest_asyncio
import uvicorn
from starlette.types import ASGIApp
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from monitoring import Recorder
from serving.app import create_app
from serving.settings import ServingSettings
from serving.state import ReplicaState
from serving.stream_guard import StreamGuard
from serving.telemetry.exchange import Exchange
from serving.websockets import session
from tests.timed_engine import Speed, TimedEngine

KEY = "sk-of-the-operator"
HELLO = [{"role": "user", "content": "hello there"}]
ENDLESS = {"model": "double", "messages": HELLO, "max_tokens": 5000, "ignore_eos": True, "stream": True}
STEP_S = 0.01
TIMEOUT_S = 10.0


@dataclass
class Server:
    engine: TimedEngine
    state: ReplicaState
    url: str
    uvicorn: uvicorn.Server
    app: ASGIApp
    exchanges: list[Exchange] = field(default_factory=list)

    def connect(self, path: str = "/v1/chat/completions", **options: Any) -> connect:
        return connect(self.url + path, open_timeout=TIMEOUT_S, **options)


@contextlib.asynccontextmanager
async def serving(guard: StreamGuard | None = None, **settings: Any) -> AsyncIterator[Server]:
    engine = TimedEngine("double", Speed(base_s=STEP_S, per_active_s=0.0, prefill_token_s=1e-5))
    state = ReplicaState(ServingSettings(**settings), Recorder(), replica="r0", guard=guard)
    state.ready(engine)
    app = create_app(state)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", lifespan="off"))
    running = asyncio.create_task(server.serve())
    await until(lambda: server.started)
    port = server.servers[0].sockets[0].getsockname()[1]
    one = Server(engine, state, f"ws://127.0.0.1:{port}", server, app)
    state.observers.append(one.exchanges.append)
    try:
        yield one
    finally:
        server.should_exit = True
        await running
        await engine.shutdown()


@pytest_asyncio.fixture
async def server() -> AsyncIterator[Server]:
    async with serving() as one:
        yield one


async def ask(socket: ClientConnection, **fields: Any) -> None:
    await socket.send(json.dumps({"model": "double", "messages": HELLO, **fields}))


async def read(socket: ClientConnection) -> dict[str, Any]:
    async with asyncio.timeout(TIMEOUT_S):
        return json.loads(await socket.recv())


async def rest(socket: ClientConnection) -> list[dict[str, Any]]:
    """All frames up to the last one of a request."""
    frames = [await read(socket)]
    while frames[-1].get("type") != "done":
        frames.append(await read(socket))
    return frames


async def close_code(socket: ClientConnection) -> int:
    with contextlib.suppress(ConnectionClosed):
        while True:
            await read(socket)
    return socket.close_code


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while not is_so():  # noqa: ASYNC110  # it comes over a socket
            await asyncio.sleep(STEP_S)


async def test_frames_are_the_chunks_that_http_streams(server):
    body = {"model": "double", "messages": HELLO, "max_tokens": 4, "stream": True}
    body["stream_options"] = {"include_usage": True}
    async with server.connect() as socket:
        await ask(socket, **body)
        *chunks, done = await rest(socket)
    url = server.url.replace("ws", "http") + "/v1/chat/completions"
    async with httpx.AsyncClient(timeout=TIMEOUT_S) as client:
        lines = (await client.post(url, json=body)).text.strip().split("\n\n")
    streamed = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    for chunk in (*chunks, *streamed):
        del chunk["id"], chunk["created"]
    assert chunks == streamed
    assert (done["status"], done["usage"]["completion_tokens"]) == ("completed", 4)


async def test_an_answer_in_one_piece_and_completions(server):
    async with server.connect() as socket:
        await ask(socket, max_tokens=3)
        answer, done = await rest(socket)
        assert answer["object"] == "chat.completion"
        assert done["status"] == "completed"
    async with server.connect("/v1/completions") as socket:
        await socket.send(json.dumps({"model": "double", "prompt": "a", "max_tokens": 3, "stream": True}))
        *chunks, done = await rest(socket)
        assert {chunk["object"] for chunk in chunks} == {"text_completion"}
        assert done["status"] == "completed"


@pytest.mark.parametrize("stream", [True, False])
async def test_a_cancelled_answer_ends_within_a_step_and_the_connection_stays(server, stream):
    async with server.connect() as socket:
        for _ in range(3):
            await ask(socket, max_tokens=5000, ignore_eos=True, stream=stream)
            if stream:
                for _ in range(3):
                    assert (await read(socket))["object"] == "chat.completion.chunk"
            else:
                await until(lambda: server.engine.stats().num_running == 1)
            before = server.engine.stats().total_steps
            await socket.send('{"type": "cancel"}')
            done = (await rest(socket))[-1]
            stats = server.engine.stats()
            assert (stats.num_running, stats.num_waiting, server.state.admission.num_inflight) == (0, 0, 0)
            assert (
                stats.total_steps - before <= 2
            )  # the one that ran, and one more if the frame came at its end
            assert done["status"] == "cancelled"
            if stream:
                assert 1 < done["usage"]["completion_tokens"] < 100
        await ask(socket, max_tokens=2)
        assert (await rest(socket))[-1]["status"] == "completed"
    outcomes = [e.outcome for e in server.exchanges if e.method == "POST"]
    assert outcomes == ["aborted"] * 3 + ["finished"]


async def test_a_closed_connection_aborts_what_it_asked_for(server):
    async with server.connect() as socket:
        await ask(socket, max_tokens=5000, ignore_eos=True, stream=True)
        await read(socket)
    await until(lambda: not server.engine.stats().num_running and not server.state.admission.num_inflight)
    assert server.exchanges[-1].outcome == "aborted"


@pytest.mark.parametrize(
    ("frame", "status", "param", "code"),
    [
        ("{", 400, None, "invalid_json"),
        ('"hello"', 400, None, "invalid_type"),
        ("{}", 400, "model", "missing_required_parameter"),
        ('{"model": "double", "messages": [], "colour": 1}', 400, "messages", "invalid_value"),
        (
            '{"model": "other", "messages": [{"role": "user", "content": "x"}]}',
            404,
            "model",
            "model_not_found",
        ),
        (json.dumps({"model": "double", "messages": HELLO, "colour": 1}), 400, "colour", "unknown_parameter"),
        (json.dumps({"model": "double", "messages": HELLO, "n": "x" * 2000}), 413, None, "request_too_large"),
    ],
    ids=["json", "kind", "empty", "messages", "model", "unknown", "large"],
)
async def test_a_wrong_request_is_an_error_frame_and_a_done_frame(frame, status, param, code):
    async with serving(max_body_bytes=1024) as server, server.connect() as socket:
        await socket.send(frame)
        error, done = await rest(socket)
        assert (error["type"], error["status"], error["error"]["code"]) == ("error", status, code)
        if param is not None:
            assert error["error"]["param"] == param
        assert set(error["error"]) == {"message", "type", "param", "code"}
        assert (done["status"], done["usage"]) == ("failed", None)
        await ask(socket, max_tokens=1)
        assert (await rest(socket))[-1]["status"] == "completed"


@pytest.mark.parametrize("frame", [b'{"type": "cancel"}', '{"type": "stop"}', '{"type": "cancel", "id": 1}'])
async def test_frames_that_are_neither_request_nor_cancellation_are_refused(server, frame):
    async with server.connect() as socket:
        await socket.send(frame)
        assert (await read(socket))["error"]["code"] == "invalid_frame"
        await ask(socket, max_tokens=1)
        assert (await rest(socket))[-1]["status"] == "completed"


async def test_a_second_request_is_refused_and_the_first_goes_on(server):
    async with server.connect() as socket:
        await ask(socket, max_tokens=20, stream=True)
        await read(socket)
        await ask(socket, max_tokens=1)
        *frames, done = await rest(socket)
        (error,) = (frame for frame in frames if frame.get("type") == "error")
        assert (error["status"], error["error"]["code"]) == (409, "request_in_progress")
        assert (done["status"], done["usage"]["completion_tokens"]) == ("completed", 20)


async def test_a_cancellation_that_comes_too_late_is_told_so(server):
    async with server.connect() as socket:
        for _ in range(100):
            await socket.send('{"type": "cancel"}')
            assert (await read(socket))["error"]["code"] == "no_active_request"
        await ask(socket, max_tokens=1)
        assert (await rest(socket))[-1]["status"] == "completed"


async def test_who_goes_on_sending_what_is_refused_is_left(server):
    async with server.connect() as socket:
        for _ in range(40):
            await socket.send('{"type": "stop"}')
        assert await close_code(socket) == 1008


async def test_idle_connections_are_closed_and_busy_ones_are_not():
    async with serving(websocket={"idle_timeout_s": 0.3}) as server, server.connect() as socket:
        await ask(socket, max_tokens=100, stream=True)
        assert (await rest(socket))[-1]["status"] == "completed"
        assert await close_code(socket) == 1001


async def test_a_client_that_does_not_read_is_left(server, monkeypatch):
    monkeypatch.setattr(session, "_SEND_TIMEOUT_S", 0.2)
    messages = iter(
        [{"type": "websocket.connect"}, {"type": "websocket.receive", "text": json.dumps(ENDLESS)}]
    )
    num_sent = 0

    async def receive() -> dict[str, Any]:
        return next(messages, None) or await asyncio.Event().wait()

    async def send(_: object) -> None:
        nonlocal num_sent
        num_sent += 1
        if num_sent > 5:
            await asyncio.Event().wait()

    path = "/v1/chat/completions"
    scope = {"type": "websocket", "path": path, "headers": [], "subprotocols": [], "scheme": "ws"}
    async with asyncio.timeout(TIMEOUT_S):
        await server.app(scope, receive, send)
    assert server.exchanges[-1].outcome == "aborted"
    assert (server.engine.stats().num_running, server.state.admission.num_inflight) == (0, 0)


async def test_a_failing_engine_ends_the_request_and_then_the_connection(server):
    async with server.connect() as socket:
        await ask(socket, max_tokens=500, stream=True)
        await read(socket)
        await server.engine.shutdown()
        *_, error, done = await rest(socket)
        assert (error["type"], error["error"]["code"]) == ("error", "service_unavailable")
        assert done["status"] == "failed"
    async with server.connect() as socket:
        server.state.start_draining()
        await ask(socket)
        error, done = await rest(socket)
        assert (error["status"], done["status"]) == (503, "failed")
        assert done["headers"] == {"retry-after": "2"}
        assert await close_code(socket) == 1013


async def test_a_replica_that_is_to_leave_ends_its_answers_and_then_its_connections(server):
    async with server.connect() as idle, server.connect() as busy:
        await ask(busy, max_tokens=30, stream=True)
        await read(busy)
        server.state.leaving.set()
        assert await close_code(idle) == 1012
        done = (await rest(busy))[-1]
        assert (done["status"], done["usage"]["completion_tokens"]) == ("completed", 30)
        assert await close_code(busy) == 1012


async def test_a_server_that_stops_says_so(server):
    async with server.connect() as socket:
        await ask(socket, max_tokens=5000, ignore_eos=True, stream=True)
        await read(socket)
        server.uvicorn.should_exit = True
        assert await close_code(socket) == 1012
    await until(lambda: not server.engine.stats().num_running)


# A server that can be killed.
REPLICA = """
import asyncio
from serving.stream_guard import StreamGuard
from tests.serving.test_websocket import serving

async def main():
    async with serving(StreamGuard()) as server:
        print(server.url, flush=True)
        await asyncio.sleep(60)

asyncio.run(main())
"""


async def test_a_killed_process_leaves_last_frames_where_a_request_ran():
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", REPLICA, stdout=subprocess.PIPE)
    try:
        async with asyncio.timeout(TIMEOUT_S):
            url = (await process.stdout.readline()).decode().strip() + "/v1/chat/completions"
        async with connect(url) as busy, connect(url) as idle:
            await ask(idle, max_tokens=1)
            await rest(idle)
            await busy.send(json.dumps(ENDLESS))
            await read(busy)
            process.kill()
            *_, error, done = await rest(busy)
            assert (error["type"], error["error"]["code"]) == ("error", "service_unavailable")
            assert done["status"] == "failed"
            assert await close_code(busy) == 1012
            assert await close_code(idle) == 1006
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def refusal(
    server: Server, path: str = "/v1/chat/completions", **options: Any
) -> tuple[int, str | None]:
    with pytest.raises(InvalidStatus) as refused:
        async with server.connect(path, **options):
            pass
    response = refused.value.response
    return response.status_code, json.loads(response.body)["error"]["code"]


async def test_keys_are_asked_for_at_the_handshake():
    async with serving(api_keys=(KEY,)) as server:
        assert await refusal(server) == (401, "invalid_api_key")
        wrong = {"Authorization": "Bearer sk-wrong"}
        assert await refusal(server, additional_headers=wrong) == (401, "invalid_api_key")
        assert [(e.status, e.outcome) for e in server.exchanges] == [(401, "invalid")] * 2
        async with server.connect(additional_headers={"Authorization": f"Bearer {KEY}"}) as socket:
            await ask(socket, max_tokens=1)
            assert (await rest(socket))[-1]["status"] == "completed"
        # As OpenAI's clients do in browsers.
        protocols = ["realtime", f"openai-insecure-api-key.{KEY}"]
        page = "https://elsewhere.example"
        async with server.connect(subprotocols=protocols, origin=page) as socket:
            assert socket.subprotocol == "realtime"
            await ask(socket, max_tokens=1)
            assert (await rest(socket))[-1]["status"] == "completed"
        assert [e.status for e in server.exchanges[2:] if e.method == "GET"] == [101, 101]


async def test_pages_of_other_hosts_may_not_connect_without_a_key():
    page = "https://elsewhere.example"
    async with serving() as server:
        assert await refusal(server, origin=page) == (403, "origin_not_allowed")
        async with server.connect(origin=server.url.replace("ws", "http")):
            pass
    async with serving(websocket={"allowed_origins": [page]}) as server, server.connect(origin=page):
        pass


async def test_only_so_many_connections_and_paths(server):
    assert (await refusal(server, "/v1/embeddings"))[0] == 404
    async with serving(websocket={"max_connections": 1}) as full:
        async with full.connect():
            assert await refusal(full) == (503, "service_unavailable")
        async with asyncio.timeout(TIMEOUT_S):
            while True:
                with contextlib.suppress(InvalidStatus):
                    async with full.connect():
                        break


async def test_more_requests_than_places_get_429(server):
    async with serving(max_inflight_requests=1) as full, full.connect() as first, full.connect() as second:
        await ask(first, max_tokens=5000, ignore_eos=True, stream=True)
        await read(first)
        await ask(second)
        error, done = await rest(second)
        assert (error["status"], error["error"]["code"]) == (429, "rate_limit_exceeded")
        assert int(done["headers"]["retry-after"]) >= 1
