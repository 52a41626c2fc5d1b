"""Tenants on a live cluster of two replicas: quotas under load, revocation, a dead ledger, no key anywhere.

The engine is a double, so that two cores can carry the load; everything in front of it is real.
"""

import asyncio
import gzip
import http.server
import json
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from deploy.ray_environment import free_port
from serving.tenants.keys import hash_key, new_key
from tests.e2e.test_telemetry import ray_files
from tests.load.own_cluster import launched

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

OPERATOR, UNKNOWN = new_key(), new_key()
REQUESTS, TOKENS, PLACES = 300, 6000, 8
RULES: dict[str, dict[str, Any]] = {
    "by-requests": {"requests_per_minute": REQUESTS},
    "by-tokens": {"tokens_per_minute": TOKENS},
    "by-places": {"max_concurrent_requests": PLACES},
    "revoked": {"requests_per_minute": 1000},
    "survivor": {"requests_per_minute": 1000, "models": ["double"], "tiers": ["default"]},
}
KEYS = {name: new_key() for name in RULES}
# Whatever is admitted at once comes back after a minute and is taken at once again.
FIRST_S, SECOND_S = 50.0, 80.0
NUM_CLIENTS = 12
TIMEOUT_S = 30.0


@dataclass
class Live:
    """The cluster, and all that it said."""

    url: str
    process: subprocess.Popen[str]
    directory: Path
    spans: list[bytes]
    errors: list[str] = field(default_factory=list)

    @property
    def tenants_file(self) -> Path:
        return self.directory / "tenants.yaml"

    def write_tenants(self, names: list[str]) -> None:
        members = {name: {"keys": [hash_key(KEYS[name].encode())], **RULES[name]} for name in names}
        unfinished = self.directory / "unfinished"
        unfinished.write_text(yaml.safe_dump({"tenants": {"members": members}}))
        unfinished.replace(self.tenants_file)

    async def post(self, client: httpx.AsyncClient, key: str, **fields: object) -> httpx.Response:
        body = {"model": "double", "prompt": "word " * 8, "max_tokens": 4, **fields}
        answer = await client.post("/v1/completions", json=body, headers={"authorization": f"Bearer {key}"})
        if answer.is_error:
            self.errors.append(f"{answer.text} {answer.headers}")
        return answer

    def metrics(self) -> list[str]:
        """Of every process."""
        files = (self.directory / "targets").glob("*.json")
        targets = [
            target for file in files for entry in json.loads(file.read_text()) for target in entry["targets"]
        ]
        return [httpx.get(f"http://{target}/metrics", timeout=TIMEOUT_S).text for target in targets]

    def usage(self) -> dict[str, dict[str, int]]:
        headers = {"authorization": f"Bearer {OPERATOR}"}
        rows = httpx.get(f"{self.url}/v1/usage", headers=headers, timeout=TIMEOUT_S).json()["data"]
        counts = ("requests", "prompt_tokens", "output_tokens", "refusals")
        names = {row["tenant"] for row in rows}  # a run may cross the hour
        return {name: {c: sum(r[c] for r in rows if r["tenant"] == name) for c in counts} for name in names}


@pytest.fixture(scope="module")
def collector():
    """Bodies of all traces that are sent to it."""
    bodies: list[bytes] = []

    class Collector(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            bodies.append(gzip.decompress(body) if self.headers["content-encoding"] == "gzip" else body)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Collector) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", bodies
        server.shutdown()


@pytest.fixture(scope="module")
def live(tmp_path_factory, collector):
    endpoint, spans = collector
    directory, port = tmp_path_factory.mktemp("tenants"), free_port()
    config = {
        "serving": {
            "api_keys": [OPERATOR],
            "max_inflight_requests": 1000,
            "metrics": {"targets_dir": str(directory / "targets")},
        },
        "tenants": {"file": str(directory / "tenants.yaml"), "usage_file": str(directory / "usage.sqlite")},
        "logs": {"level": "debug", "format": "json"},
        "traces": {"endpoint": endpoint},
    }
    (directory / "peregrine.yaml").write_text(yaml.safe_dump(config))
    live = Live(f"http://127.0.0.1:{port}", None, directory, spans)  # type: ignore[arg-type]  # below
    live.write_tenants(list(RULES))
    arguments = [
        "--config",
        str(directory / "peregrine.yaml"),
        "--log",
        str(directory / "log"),
        "--replicas",
        "2",
    ]
    with launched(*arguments, port=port) as process:
        live.process = process
        yield live


@pytest.fixture
async def client(live):
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=live.url, timeout=TIMEOUT_S, limits=limits) as client:
        yield client


@dataclass
class Tally:
    """What clients of one tenant got, in order of time: (seconds since the start, tokens)."""

    answers: list[tuple[float, int]] = field(default_factory=list)
    refusals: int = 0
    replicas: set[str] = field(default_factory=set)
    num_open: int = 0
    most_open: int = 0

    def count(self, until_s: float) -> int:
        return sum(when <= until_s for when, _ in self.answers)

    def tokens(self, until_s: float) -> int:
        return sum(tokens for when, tokens in self.answers if when <= until_s)


async def keep_asking(
    until: float, ask: Callable[[], Awaitable[httpx.Response]], tally: Tally, start: float
) -> None:
    """One client, which never rests but after a refusal, and then for less than it is told to."""
    while time.monotonic() < until:
        answer = await ask()
        if answer.status_code == 429:
            tally.refusals += 1
            await asyncio.sleep(0.2)
            continue
        assert answer.status_code == 200, answer.text
        tally.answers.append((time.monotonic() - start, answer.json()["usage"]["total_tokens"]))
        tally.replicas.add(answer.headers["x-peregrine-route"].partition(";")[0])


async def keep_streaming(until: float, live: Live, client: httpx.AsyncClient, tally: Tally) -> None:
    body = {"model": "double", "prompt": "word " * 8, "max_tokens": 16, "stream": True}
    headers = {"authorization": f"Bearer {KEYS['by-places']}"}
    while time.monotonic() < until:
        async with client.stream("POST", "/v1/completions", json=body, headers=headers) as answer:
            if answer.status_code == 429:
                tally.refusals += 1
            else:
                assert answer.status_code == 200
                tally.replicas.add(answer.headers["x-peregrine-route"].partition(";")[0])
                tally.num_open += 1
                tally.most_open = max(tally.most_open, tally.num_open)
                async for line in answer.aiter_lines():
                    # The place is free before the last byte has left the server.
                    tally.num_open -= line == "data: [DONE]"
        await asyncio.sleep(0.2 if answer.status_code == 429 else 0)


async def test_quotas_hold_within_two_percent_over_two_replicas(live, client):
    tallies = {name: Tally() for name in ("by-requests", "by-tokens", "by-places")}
    chance = random.Random(8)

    def ask_of(name: str) -> Callable[[], Awaitable[httpx.Response]]:
        return lambda: live.post(
            client, KEYS[name], prompt="word " * chance.randint(1, 20), max_tokens=chance.randint(1, 14)
        )

    start = time.monotonic()
    until = start + SECOND_S
    clients = [
        keep_asking(until, ask_of(name), tallies[name], start)
        for name in ("by-requests", "by-tokens")
        for _ in range(NUM_CLIENTS)
    ]
    clients += [keep_streaming(until, live, client, tallies["by-places"]) for _ in range(NUM_CLIENTS)]
    await asyncio.gather(*clients)

    requests, tokens, places = (tallies[name] for name in ("by-requests", "by-tokens", "by-places"))
    measured = {
        "requests": (
            requests.count(FIRST_S) / REQUESTS,
            requests.count(SECOND_S + TIMEOUT_S) / (2 * REQUESTS),
        ),
        "tokens": (tokens.tokens(FIRST_S) / TOKENS, tokens.tokens(SECOND_S + TIMEOUT_S) / (2 * TOKENS)),
        "places": (places.most_open / PLACES,),
    }
    print(measured)
    for shares in measured.values():
        assert all(0.98 <= share <= 1.02 for share in shares), measured
    assert places.most_open <= PLACES
    for tally in tallies.values():
        assert tally.refusals
        assert len(tally.replicas) == 2

    deadline = time.monotonic() + TIMEOUT_S
    while live.usage()["by-tokens"]["refusals"] != tokens.refusals:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.2)
    usage = live.usage()
    assert usage["by-requests"]["requests"] == len(requests.answers)
    counted = usage["by-tokens"]
    assert counted["prompt_tokens"] + counted["output_tokens"] == tokens.tokens(SECOND_S + TIMEOUT_S)
    text = "".join(live.metrics())
    assert 'peregrine_tenant_refusals_total{reason="tokens",tenant="by-tokens"}' in text
    for name in ("requests", "prompt_tokens", "output_tokens"):
        assert f'peregrine_tenant_{name}_total{{tenant="by-tokens"}}' in text


async def test_a_revoked_key_stops_and_what_it_had_in_flight_ends_well(live, client):
    assert (await live.post(client, KEYS["revoked"])).status_code == 200
    running = asyncio.create_task(live.post(client, KEYS["revoked"], max_tokens=200))
    await asyncio.sleep(0.5)
    live.write_tenants([name for name in RULES if name != "revoked"])
    deadline, refused_by = time.monotonic() + TIMEOUT_S, set()
    while len(refused_by) < 2:
        assert time.monotonic() < deadline
        answer = await live.post(client, KEYS["revoked"])
        replica = answer.headers["x-peregrine-route"].partition(";")[0]
        if answer.status_code == 401:
            refused_by.add(replica)
        else:
            assert replica not in refused_by
    for _ in range(20):
        answer = await live.post(client, KEYS["revoked"])
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
    assert (await live.post(client, KEYS["survivor"])).status_code == 200
    ended = await running
    assert (ended.status_code, ended.json()["usage"]["completion_tokens"]) == (200, 200)


async def test_a_ledger_that_dies_is_replaced_and_told_what_was_had(live, client):
    def ledgers() -> list[psutil.Process]:
        children = psutil.Process(live.process.pid).children(recursive=True)
        return [child for child in children if "TenantLedger" in " ".join(child.cmdline())]

    def connected() -> int:
        return sum("peregrine_tenant_ledger_connected 1.0" in text for text in live.metrics())

    async def until(is_so: Callable[[], bool]) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while not is_so():
            assert time.monotonic() < deadline
            await asyncio.sleep(0.2)

    await until(lambda: connected() == 2)
    first = await live.post(client, KEYS["survivor"])
    remaining = int(first.headers["x-ratelimit-remaining-requests"])
    (ledger,) = ledgers()
    os.kill(ledger.pid, signal.SIGKILL)
    answers = [await live.post(client, KEYS["survivor"]) for _ in range(20)]
    assert [answer.status_code for answer in answers] == [200] * 20
    await until(lambda: connected() == 2 and bool(ledgers()) and ledgers()[0].pid != ledger.pid)
    last = await live.post(client, KEYS["survivor"])
    # Requests of the quota test are older than a minute by now, or were another tenant's.
    assert int(last.headers["x-ratelimit-remaining-requests"]) == remaining - 21


async def test_no_key_is_in_anything_that_is_written_or_sent(live, client):
    for key, fields in (
        (UNKNOWN, {}),
        (KEYS["survivor"], {"model": "another"}),
        (KEYS["survivor"], {"service_tier": "voice"}),
        (KEYS["survivor"], {"max_tokens": "many"}),
        (OPERATOR, {"max_tokens": -1}),
    ):
        assert (await live.post(client, key, **fields)).is_error
    await client.post("/v1/messages", json={"model": 3}, headers={"x-api-key": KEYS["survivor"]})
    headers = {"authorization": f"Bearer {KEYS['survivor']}"}
    own = await client.get("/v1/usage?format=csv", headers=headers)
    assert {line.split(",")[1] for line in own.text.splitlines()[1:]} == {"survivor"}
    deadline = time.monotonic() + TIMEOUT_S
    while not live.spans:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.2)
    pages = [(await client.get(path)).text for path in ("/status.json", "/stats", "/openapi.json")]
    files = ray_files(live.process)
    written = {
        "log": [(live.directory / "log").read_text()],
        "files of Ray": files,
        "metrics": live.metrics(),
        "usage": [own.text, str(live.usage())],
        "usage file": [(live.directory / "usage.sqlite").read_bytes().decode("latin-1")],
        "errors": live.errors,
        "pages": pages,
        "spans": [body.decode("latin-1") for body in live.spans],
    }
    for kind, texts in written.items():
        assert any(texts), kind
        for key in (OPERATOR, UNKNOWN, *KEYS.values()):
            assert not [text for text in texts if key in text], kind
    assert "by-requests" in "".join(written["metrics"])
    assert '"status": 429' in written["log"][0]
