"""The page and its figures over HTTP, on the engine double."""

import asyncio
import dataclasses
import re

import httpx
import pytest

from monitoring import Recorder
from serving.app import create_app
from serving.settings import ServingSettings
from serving.state import ReplicaState
from serving.status.board import PeersSilentError
from serving.status.snapshot import take_snapshot
from tests.timed_engine import Speed, TimedEngine

SECRET = "sesame-open-7361"


@pytest.fixture
async def engine():
    engine = TimedEngine("double", Speed(0.001, 0.0, 1e-5))
    yield engine
    await engine.shutdown()


def make_state(engine=None, **settings) -> ReplicaState:
    state = ReplicaState(ServingSettings(**settings), Recorder(), replica="r0")
    if engine is not None:
        state.ready(engine)
    return state


def client_of(state: ReplicaState, **kw) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(create_app(state, **kw)), base_url="http://t")


async def test_the_page_has_all_it_needs_and_needs_nothing_else():
    async with client_of(make_state()) as client:
        page = await client.get("/")
        assert page.status_code == 200
        assert "default-src 'none'" in page.headers["content-security-policy"]
        parts = re.findall(r'(?:href|src)="(status/[^"]+)"', page.text)
        assert len(parts) >= 4
        texts = [page.text]
        for part in [*parts, "status/format.js"]:
            answer = await client.get(f"/{part}")
            assert answer.status_code == 200
            texts.append(answer.text)
            again = await client.get(f"/{part}", headers={"if-none-match": answer.headers["etag"]})
            assert (again.status_code, again.content) == (304, b"")
    # Nothing is loaded from elsewhere; the one address is a name space.
    addresses = set(re.findall(r"https?://[^\s\"'<)]+|//[a-z]+\.[a-z]+[^\s\"']*", "".join(texts)))
    assert addresses <= {"http://www.w3.org/2000/svg"}


async def test_figures_follow_requests_and_have_no_text(engine):
    async with client_of(make_state(engine)) as client:
        before = (await client.get("/status.json")).json()
        assert (before["recent"], before["ttft_ms"]["count"]) == ([], 0)
        body = {"model": "double", "prompt": SECRET, "max_tokens": 4, "user": SECRET, "service_tier": "voice"}
        await client.post("/v1/completions", json=body)
        await client.post("/v1/completions", json={**body, "max_tokens": 0, "n": 2})  # invalid
        await asyncio.sleep(0.9)  # answers are kept for a moment
        answer = await client.get("/status.json")
    after = answer.json()
    assert SECRET not in answer.text
    assert answer.headers["cache-control"] == "no-store"
    assert after["ttft_ms"]["count"] == 1
    assert after["ttft_ms"]["p50"] > 0
    voice = next(t for t in after["tiers"] if t["tier"] == "voice")
    assert (voice["kept"], voice["attainment"]) == (1, 1.0)
    request = after["recent"][0]
    assert (request["outcome"], request["output_tokens"], request["replica"]) == ("finished", 4, "r0")
    assert after["model"]["name"] == "double"
    assert after["replicas"][0]["condition"] == "ready"


async def test_all_replicas_are_asked_once_for_many_pages(engine):
    state, num_asked = make_state(engine), 0

    async def peers():
        nonlocal num_asked
        num_asked += 1
        own = take_snapshot(state)
        return [own, dataclasses.replace(own, replica="r1", num_running=5)]

    async with client_of(state, peers=peers) as client:
        answers = await asyncio.gather(*(client.get("/status.json") for _ in range(20)))
    assert num_asked == 1
    assert {len(a.json()["replicas"]) for a in answers} == {2}
    assert answers[0].json()["running"] == 5


async def test_a_replica_that_hangs_does_not_take_the_page_along(engine):
    state, is_hung = make_state(engine), False

    async def peers():
        if is_hung:
            raise PeersSilentError("TimeoutError")
        own = take_snapshot(state)
        return [own, dataclasses.replace(own, replica="r1", taken_at=own.taken_at - 10)]

    async with client_of(state, peers=peers) as client:
        await client.get("/status.json")
        is_hung = True
        await asyncio.sleep(0.9)
        shown = (await client.get("/status.json")).json()["replicas"]
    assert {r["replica"]: r["condition"] for r in shown} == {"r0": "ready", "r1": "silent"}


async def test_while_the_model_loads_the_page_says_so():
    async with client_of(make_state()) as client:
        shown = (await client.get("/status.json")).json()
    assert shown["model"] is None
    assert shown["replicas"][0]["condition"] == "loading"


async def test_keys_are_asked_for_by_the_chat_alone_and_the_page_can_be_turned_off(engine):
    async with client_of(make_state(engine, api_keys=("k",))) as client:
        shown = await client.get("/status.json")
        assert shown.json()["needs_api_key"] is True
        assert (await client.get("/v1/models")).status_code == 401
    async with client_of(make_state(engine, status_page=False)) as client:
        assert (await client.get("/")).status_code == 404
        assert (await client.get("/status.json")).status_code == 404
