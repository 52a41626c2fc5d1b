"""Clients that leave in the middle of a stream: nothing of theirs stays behind."""

import asyncio
import time

import httpx
import pytest

from tests.e2e.conftest import MODEL
from tests.serving.malformed import CASES

pytestmark = [pytest.mark.e2e, pytest.mark.model, pytest.mark.timeout(180)]

NUM_CLIENTS = 200


async def leave_mid_stream(client: httpx.AsyncClient, number: int) -> None:
    body = {
        "model": MODEL,
        "prompt": f"{number}: once upon a time",
        "max_tokens": 2000,
        "ignore_eos": True,
        "stream": True,
    }
    async with client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200
        num_chunks = 0
        async for line in response.aiter_lines():
            num_chunks += line.startswith("data:")
            if num_chunks > number % 5:
                return  # leaving the context closes the connection


def replica_stats(url: str, num_replicas: int) -> dict[str, dict]:
    """Statistics of every replica, by asking until each has answered."""
    found: dict[str, dict] = {}
    for _ in range(100):
        stats = httpx.get(f"{url}/stats", timeout=10).json()
        found[stats["replica"]] = stats
        if len(found) == num_replicas:
            return found
    raise AssertionError(f"only {list(found)} answered")


async def test_after_200_disconnects_no_request_runs_and_no_block_is_held(cluster):
    limits = httpx.Limits(max_connections=16)
    before = sum(s["total_output_tokens"] for s in replica_stats(cluster, 2).values())
    async with httpx.AsyncClient(base_url=cluster, timeout=60, limits=limits) as client:
        gate = asyncio.Semaphore(16)

        async def one(number: int) -> None:
            async with gate:
                await leave_mid_stream(client, number)

        await asyncio.gather(*(one(i) for i in range(NUM_CLIENTS)))
    deadline = time.monotonic() + 10
    while True:
        stats = replica_stats(cluster, 2)
        busy = [s for s in stats.values() if s["num_running"] or s["num_waiting"] or s["num_inflight"]]
        if not busy or time.monotonic() > deadline:
            break
        await asyncio.sleep(0.2)
    for s in stats.values():
        assert (s["num_running"], s["num_waiting"], s["num_inflight"]) == (0, 0, 0)
        assert s["num_free_blocks"] == s["num_blocks"]
    # Had nobody been stopped, 400,000 tokens would have been made.
    after = sum(s["total_output_tokens"] for s in stats.values())
    assert after - before < NUM_CLIENTS * 500


@pytest.mark.parametrize("case", CASES[::4], ids=lambda c: c.name)
def test_malformed_requests_through_the_whole_path(cluster, case):
    response = httpx.request(
        case.method, cluster + case.path, content=case.content, headers=case.headers, timeout=60
    )
    assert response.status_code == case.status, response.text
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
