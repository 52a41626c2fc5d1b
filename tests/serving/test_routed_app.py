"""The whole way of a request but for Ray and HAProxy: router, four replicas' apps on the engine double, their
connections. A function of a few lines plays the proxy.
"""

import asyncio
import contextlib
import json
import random

import pytest_asyncio

from engine import EngineDeadError
from monitoring import Recorder
from serving.app import create_app
from serving.dispatch.listener import Listener
from serving.dispatch.messages import Hello, Report
from serving.dispatch.reporter import RouterLinks
from serving.settings import ServingSettings
from serving.state import ReplicaState
from tests.serving.dispatch.helpers import is_empty, make_dispatcher
from tests.serving.dispatch.test_links import until
from tests.timed_engine import HANG, Speed, TimedEngine

NUM_REPLICAS = 4
FAST = Speed(base_s=0.001, per_active_s=0.0, prefill_token_s=1e-6)


class Cluster:
    def __init__(self) -> None:
        self.dispatcher, _ = make_dispatcher(NUM_REPLICAS)
        self.listener = Listener(self.dispatcher)
        self.engines: dict[str, TimedEngine] = {}
        self.states: dict[str, ReplicaState] = {}
        self.apps = {}

    async def start(self) -> None:
        self.dispatcher.reply_to = await self.listener.start("127.0.0.1")
        for number in range(NUM_REPLICAS):
            name, engine, recorder = f"r{number}", TimedEngine("double", FAST), Recorder()
            links = RouterLinks(
                lambda name=name: Hello(name, 64, 512, 200_000),
                lambda engine=engine: Report(
                    engine.stats().num_running, 0, 0, engine.stats().total_steps, None
                ),
                recorder,
            )
            state = ReplicaState(ServingSettings(), recorder, name, links)
            state.ready(engine)
            self.engines[name], self.states[name], self.apps[name] = engine, state, create_app(state)

    async def stop(self) -> None:
        for name, state in self.states.items():
            await state.links.close()
            await self.engines[name].shutdown()
        await self.listener.close()

    async def post(self, body: dict, leave_after: int | None = None) -> tuple[int, dict[str, str], bytes]:
        """Ask the router, then the app that it names; leave when so many pieces of the body have come."""
        data = json.dumps(body).encode()
        answer = self.dispatcher.route(data, len(data))
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST",
            "path": "/v1/completions", "raw_path": b"/v1/completions", "query_string": b"", "root_path": "",
            "scheme": "http", "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2),
            "headers": [
                (b"content-type", b"application/json"),
                *((k.encode(), v.encode()) for k, v in answer.headers.items()),
            ],
        }  # fmt: skip
        status, headers, pieces, left = 0, {}, [], asyncio.Event()
        sent = False

        async def receive() -> dict:
            nonlocal sent
            if not sent:
                sent = True
                return {"type": "http.request", "body": data, "more_body": False}
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers.update({k.decode(): v.decode() for k, v in message["headers"]})
            else:
                pieces.append(message.get("body", b""))
                if leave_after is not None and len(pieces) >= leave_after:
                    left.set()

        if leave_after == 0:
            left.set()
        with contextlib.suppress(asyncio.CancelledError):
            await self.apps[answer.replica_id](scope, receive, send)
        return status, headers, b"".join(pieces)


@pytest_asyncio.fixture
async def cluster():
    cluster = Cluster()
    await cluster.start()
    yield cluster
    await cluster.stop()


def request(**rest) -> dict:
    return {"model": "double", "prompt": "Hello there, how are you?", "max_tokens": 4, **rest}


async def test_the_response_says_where_it_came_from_and_why(cluster):
    for is_stream in (False, True):
        status, headers, body = await cluster.post(request(stream=is_stream))
        assert status == 200
        assert (b"[DONE]" in body) == is_stream
        route = dict(part.split("=", 1) for part in headers["x-peregrine-route"].split("; "))
        assert route["replica"] in cluster.apps
        assert route["policy"] == "latency"
        assert float(route["predicted-ttft-ms"]) > 0
        assert float(route["actual-ttft-ms"]) > 0
    await until(lambda: is_empty(cluster.dispatcher))


async def test_a_failed_engine_counts_as_failed_and_ends_the_stream_with_an_error(cluster):
    running = asyncio.create_task(cluster.post(request(stream=True, max_tokens=50_000, prompt="x")))
    await until(lambda: cluster.dispatcher.counters()["active_decodes"] == 1)
    (name,) = [n for n, e in cluster.engines.items() if e.stats().num_running]
    for sequence in cluster.engines[name]._sequences:
        sequence.queue.put_nowait(EngineDeadError("gone"))
    status, _, body = await running
    last = body.split(b"data: ")[-2:]
    assert status == 200
    assert set(json.loads(last[0])["error"]) == {"message", "type", "param", "code"}
    assert last[1] == b"[DONE]\n\n"
    await until(lambda: is_empty(cluster.dispatcher))


async def test_bad_requests_and_refusals_leave_nothing(cluster):
    assert (await cluster.post(request(max_tokens=-1)))[0] == 400
    assert (await cluster.post(request(model="other")))[0] == 404
    for name in cluster.apps:
        cluster.dispatcher.router.set_healthy(name, False)
    status, headers, body = await cluster.post(request())
    assert (status, headers["retry-after"]) == (429, "1")
    assert json.loads(body)["error"]["code"] == "rate_limit_exceeded"
    await until(lambda: is_empty(cluster.dispatcher))


async def test_a_replica_that_hangs_is_left_by_the_next_request(cluster):
    hung = asyncio.create_task(cluster.post(request(prompt=HANG)))
    await until(lambda: cluster.dispatcher.counters()["in_flight"] == 1)
    for _ in range(20):
        status, _, _ = await asyncio.wait_for(cluster.post(request()), 60)
        assert status == 200
    hung.cancel()
    await asyncio.gather(hung, return_exceptions=True)
    await until(lambda: is_empty(cluster.dispatcher))


async def test_the_books_are_empty_after_10000_requests_of_which_a_tenth_is_aborted(cluster):
    random_, gate, results = random.Random(0), asyncio.Semaphore(64), []

    async def one() -> None:
        async with gate:
            is_stream = random_.random() < 0.5
            leave_after = None
            if random_.random() < 0.1:
                leave_after = random_.choice((0, 1, 2)) if is_stream else 0
            prompt = "word " * random_.randint(1, 40)
            body = request(stream=is_stream, max_tokens=random_.randint(1, 6), prompt=prompt)
            results.append((await cluster.post(body, leave_after))[0])

    await asyncio.gather(*(one() for _ in range(10_000)))
    assert len(results) == 10_000
    assert set(results) <= {0, 200, 499}
    assert results.count(200) > 8_500
    await until(lambda: is_empty(cluster.dispatcher))
    for name, engine in cluster.engines.items():
        assert engine.stats().num_running + engine.stats().num_waiting == 0
        assert cluster.states[name].admission.num_inflight == 0
