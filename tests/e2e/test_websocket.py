"""WebSockets over live clusters: real Ray, both proxies, a real client library."""

import asyncio
import contextlib
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import openai
import psutil
import pytest
import yaml
from openai.types.chat import ChatCompletionChunk
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from deploy.ray_environment import free_port
from serving.flushing import sentence_end
from serving.tenants.keys import hash_key, new_key
from tests.e2e.conftest import MODEL
from tests.e2e.test_disconnects import replica_stats
from tests.e2e.test_telemetry import ray_files
from tests.load.own_cluster import launched

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

PATH = "/v1/chat/completions"
TIMEOUT_S = 60.0
# Tokens that are on their way, or being made, when a client says stop.
MAX_LATE_TOKENS = 8
STORY = [{"role": "user", "content": "Tell me a long story about three mice."}]


def opened(url: str, key: str | None = None, **options: Any) -> connect:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    address = url.replace("http", "ws", 1) + PATH
    return connect(address, additional_headers=headers, open_timeout=TIMEOUT_S, **options)


async def ask(socket: ClientConnection, model: str, **fields: Any) -> None:
    body = {"model": model, "messages": STORY, "temperature": 0, "stream": True, **fields}
    await socket.send(json.dumps(body))


async def read(socket: ClientConnection) -> dict[str, Any]:
    async with asyncio.timeout(TIMEOUT_S):
        return json.loads(await socket.recv())


async def rest(socket: ClientConnection) -> list[dict[str, Any]]:
    frames = [await read(socket)]
    while frames[-1].get("type") != "done":
        frames.append(await read(socket))
    return frames


async def until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not is_so():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)


@contextlib.asynccontextmanager
async def one_on_each_replica(url: str, key: str | None = None) -> AsyncIterator[ClientConnection]:
    """Of two; `replica_stats` would only reach the one that has fewer connections."""
    async with opened(url, key) as socket, opened(url, key):
        yield socket


def is_idle(url: str, num_replicas: int) -> bool:
    return all(
        (s["num_running"], s["num_waiting"], s["num_inflight"]) == (0, 0, 0)
        and s["num_free_blocks"] == s["num_blocks"]
        for s in replica_stats(url, num_replicas).values()
    )


def num_made(url: str) -> int:
    """Tokens that the engines of the two replicas have made."""
    return sum(s["total_output_tokens"] for s in replica_stats(url, 2).values())


def content(chunks: list[ChatCompletionChunk]) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


@pytest.mark.model
async def test_frames_are_what_the_official_client_streams(cluster, client):
    async with opened(cluster) as socket:
        await ask(socket, MODEL, max_tokens=24)
        *frames, done = await rest(socket)
    chunks = [ChatCompletionChunk.model_validate(frame) for frame in frames]
    stream = client.chat.completions.create(
        model=MODEL, messages=STORY, temperature=0, max_tokens=24, stream=True
    )
    assert content(chunks) == content(list(stream))
    assert (done["status"], done["usage"]["completion_tokens"]) == ("completed", 24)


@pytest.mark.model
async def test_barge_in_stops_the_engine_and_the_connection_serves_on(cluster):
    async with one_on_each_replica(cluster) as socket:
        for _ in range(5):
            made_before = num_made(cluster)
            await ask(socket, MODEL, max_tokens=2000, ignore_eos=True)
            for _ in range(6):  # the role, and five tokens
                await read(socket)
            await socket.send('{"type": "cancel"}')
            done = (await rest(socket))[-1]
            assert done["status"] == "cancelled"
            assert 5 <= done["usage"]["completion_tokens"] <= 5 + MAX_LATE_TOKENS
            assert num_made(cluster) - made_before <= 5 + MAX_LATE_TOKENS
            stats = replica_stats(cluster, 2).values()
            assert sum(s["num_running"] + s["num_waiting"] + s["num_inflight"] for s in stats) == 0
        await ask(socket, MODEL, max_tokens=3)
        assert (await rest(socket))[-1]["status"] == "completed"
    await until(lambda: is_idle(cluster, 2))


@pytest.mark.model
async def test_who_leaves_takes_its_request_along_and_may_come_back(cluster):
    for _ in range(3):
        async with opened(cluster) as socket:
            await ask(socket, MODEL, max_tokens=2000, ignore_eos=True)
            await read(socket)
    async with opened(cluster) as socket:
        await ask(socket, MODEL, max_tokens=2000, ignore_eos=True)
        await read(socket)
        socket.transport.abort()  # as a client whose network is gone
    await until(lambda: is_idle(cluster, 2))


@pytest.mark.model
def test_sentences_of_the_real_model(cluster, client: openai.OpenAI):
    def answer(flush: str) -> list[str]:
        stream = client.chat.completions.create(
            model=MODEL,
            messages=STORY,
            temperature=0,
            max_tokens=120,
            stream=True,
            stream_options={"flush": flush, "include_usage": True},  # type: ignore[typeddict-unknown-key]
        )
        chunks = list(stream)
        assert chunks[-1].usage.completion_tokens == 120
        assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
        return [text for c in chunks if c.choices and (text := c.choices[0].delta.content)]

    tokens, words, sentences = answer("token"), answer("word"), answer("sentence")
    assert "".join(tokens) == "".join(words) == "".join(sentences)
    assert len(sentences) < len(words) < len(tokens)
    assert all(word.endswith((" ", "\n")) for word in words[:-1])
    # Each chunk is what the text before it was held back for: no sentence ends inside.
    assert all(sentence_end(s.rstrip()) < len(s) for s in sentences)
    assert sum(s.rstrip().endswith((".", "!", "?", '"', ":")) for s in sentences[:-1]) >= len(sentences) - 2


KEYS = {name: new_key() for name in ("operator", "one-place", "few-requests", "revoked", "unknown")}


@pytest.fixture(scope="module", params=["on", "off"], ids=["haproxy", "python-proxy"])
def tenants(request, tmp_path_factory):
    """Address of two replicas of an engine double with tenants, and what revokes the key."""
    directory, port = tmp_path_factory.mktemp("websocket"), free_port()
    rules = {
        "one-place": {"max_concurrent_requests": 1},
        "few-requests": {"requests_per_minute": 3},
        "revoked": {},
    }

    def write(names: list[str]) -> None:
        members = {n: {"keys": [hash_key(KEYS[n].encode())], **rules[n]} for n in names}
        unfinished = directory / "unfinished"
        unfinished.write_text(yaml.safe_dump({"tenants": {"members": members}}))
        unfinished.replace(directory / "tenants.yaml")

    write(list(rules))
    config = {
        "serving": {"api_keys": [KEYS["operator"]], "metrics": {"targets_dir": str(directory / "targets")}},
        "tenants": {"file": str(directory / "tenants.yaml")},
        "cluster": {"haproxy": request.param},
        "logs": {"format": "json"},
    }
    (directory / "peregrine.yaml").write_text(yaml.safe_dump(config))
    arguments = ["--config", str(directory / "peregrine.yaml"), "--replicas", "2"]
    with launched(*arguments, "--log", str(directory / "log"), port=port) as process:
        yield f"http://127.0.0.1:{port}", process, directory, lambda: write(["one-place", "few-requests"])


async def test_wrong_keys_open_nothing(tenants):
    url, process, directory, _ = tenants
    for key in (None, KEYS["unknown"]):
        with pytest.raises(InvalidStatus) as refused:
            async with opened(url, key):
                pass
        assert refused.value.response.status_code in (401, 403)
    async with opened(url, KEYS["operator"]) as socket:
        await ask(socket, "double", max_tokens=3)
        assert (await rest(socket))[-1]["status"] == "completed"
    async with opened(
        url, subprotocols=["realtime", f"openai-insecure-api-key.{KEYS['operator']}"]
    ) as socket:
        assert socket.subprotocol == "realtime"
        await ask(socket, "double", max_tokens=3)
        assert (await rest(socket))[-1]["status"] == "completed"
    written = [(directory / "log").read_text(), *ray_files(process)]
    assert not [key for key in KEYS.values() for text in written if key in text]


async def test_limits_of_tenants_hold_over_websockets(tenants):
    url, *_ = tenants
    async with opened(url, KEYS["one-place"]) as first, opened(url, KEYS["one-place"]) as second:
        await ask(first, "double", max_tokens=5000)
        await read(first)
        await ask(second, "double", max_tokens=3)
        error, _ = await rest(second)
        assert (error["status"], error["error"]["code"]) == (429, "rate_limit_exceeded")
        assert "concurrent requests" in error["error"]["message"]
        await first.send('{"type": "cancel"}')
        assert (await rest(first))[-1]["status"] == "cancelled"
        await ask(second, "double", max_tokens=3)  # the place is free when the done frame is there
        assert (await rest(second))[-1]["status"] == "completed"
    async with opened(url, KEYS["few-requests"]) as socket:
        ends = []
        for _ in range(4):
            await ask(socket, "double", max_tokens=1)
            ends.append((await rest(socket))[-1])
        assert [end["status"] for end in ends] == ["completed"] * 3 + ["failed"]
        assert [end["headers"]["x-ratelimit-remaining-requests"] for end in ends] == ["2", "1", "0", "0"]
        assert int(ends[-1]["headers"]["retry-after"]) > 1


async def test_barge_in_frees_the_engine(tenants):
    url, *_ = tenants
    async with one_on_each_replica(url, KEYS["operator"]) as socket:
        for _ in range(3):
            await ask(socket, "double", max_tokens=5000)
            await read(socket)
            await socket.send('{"type": "cancel"}')
            assert (await rest(socket))[-1]["status"] == "cancelled"
            assert not sum(s["num_running"] for s in replica_stats(url, 2).values())
        await ask(socket, "double", max_tokens=5000)
        await read(socket)
    await until(lambda: not sum(s["num_running"] + s["num_inflight"] for s in replica_stats(url, 2).values()))


async def test_a_revoked_key_ends_its_connections(tenants):
    url, _, _, revoke = tenants
    async with opened(url, KEYS["revoked"]) as socket:
        await ask(socket, "double", max_tokens=1)
        assert (await rest(socket))[-1]["status"] == "completed"
        revoke()
        end = {"status": "completed"}
        while end["status"] == "completed":
            await ask(socket, "double", max_tokens=1)
            *_, error, end = await rest(socket)
        assert error["status"] == 401
        with pytest.raises(ConnectionClosed) as closed:
            await read(socket)
        assert closed.value.rcvd.code == 1008


async def test_handshakes_and_their_requests_are_counted_and_logged(tenants):
    url, _, directory, _ = tenants
    async with opened(url, KEYS["operator"]) as socket:
        await ask(socket, "double", max_tokens=1)
        await rest(socket)
    targets = [
        t
        for f in (directory / "targets").glob("*.json")
        for e in json.loads(f.read_text())
        for t in e["targets"]
    ]
    async with httpx.AsyncClient(timeout=TIMEOUT_S) as client:
        text = "".join([(await client.get(f"http://{target}/metrics")).text for target in targets])
    assert f'peregrine_http_requests_total{{route="{PATH}",status="101"}}' in text
    lines = [
        json.loads(line) for line in (directory / "log").read_text().splitlines() if '"status": 101' in line
    ]
    assert {(line["method"], line["route"]) for line in lines} == {("GET", PATH)}


def is_replica(process: psutil.Process) -> bool:
    return " ".join(process.cmdline()).startswith("ray::ServeReplica:peregrine:Replica")


@contextlib.asynccontextmanager
async def busy(url: str, num_tokens: int = 90_000) -> AsyncIterator[ClientConnection]:
    async with opened(url, KEYS["operator"]) as socket:
        await ask(socket, "double", max_tokens=num_tokens)
        await read(socket)
        yield socket


async def test_a_killed_replicas_requests_end_with_frames(tenants):
    url, process, directory, _ = tenants
    if "haproxy: 'on'" not in (directory / "peregrine.yaml").read_text():
        pytest.skip("behind Ray's own proxy a replica has no connections of its own")
    async with busy(url) as first, busy(url) as second:  # one on each
        replicas = [p for p in psutil.Process(process.pid).children(recursive=True) if is_replica(p)]
        os.kill(replicas[0].pid, signal.SIGKILL)
        reading = {asyncio.create_task(rest(socket)): socket for socket in (first, second)}
        ended, running = await asyncio.wait(reading, timeout=TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
        (task,) = ended
        *_, error, done = task.result()
        assert (error["type"], error["error"]["code"]) == ("error", "service_unavailable")
        assert done["status"] == "failed"
        with pytest.raises(ConnectionClosed) as closed:
            await read(reading[task])
        assert closed.value.rcvd.code == 1012
        for other in running:
            await reading[other].send('{"type": "cancel"}')
            assert (await other)[-1]["status"] == "cancelled"


async def test_open_connections_do_not_keep_a_cluster_from_stopping(tenants):
    url, process, *_ = tenants
    # Less than a replica listens on; what takes longer is cut behind HAProxy, and waited for without it.
    async with opened(url, KEYS["operator"]) as idle, busy(url, 60) as streaming:
        process.send_signal(signal.SIGTERM)
        assert (await rest(streaming))[-1]["status"] == "completed"
        for socket in (idle, streaming):
            with pytest.raises(ConnectionClosed):
                await read(socket)
            assert socket.close_code == 1012
        await until(lambda: process.poll() is not None)
