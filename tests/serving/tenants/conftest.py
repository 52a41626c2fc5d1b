"""Two replicas' apps on engine doubles, and the ledger that they share, all in this process."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import httpx
import pytest_asyncio

from monitoring import Recorder
from serving.app import create_app
from serving.settings import ServingSettings
from serving.state import ReplicaState
from serving.tenants.directory import Directory
from serving.tenants.gate import Gate
from serving.tenants.keys import hash_key, new_key
from serving.tenants.link import LedgerLink
from serving.tenants.meter import Meter
from serving.tenants.server import LedgerServer
from serving.tenants.settings import Tenant, TenantSettings
from serving.tenants.usage import UsageStore
from tests.timed_engine import Speed, TimedEngine

FAST = Speed(base_s=0.002, per_active_s=0.0, prefill_token_s=1e-5)
OPERATOR = "pg-operator"
TIMEOUT_S = 10
BODY = {"model": "double", "messages": [{"role": "user", "content": "word " * 8}], "max_tokens": 5}


async def until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not is_so():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


@dataclass
class Replica:
    state: ReplicaState
    gate: Gate
    client: httpx.AsyncClient

    async def post(self, key: str, path: str = "/v1/chat/completions", **fields: object) -> httpx.Response:
        headers = {"authorization": f"Bearer {key}"}
        return await self.client.post(path, json={**BODY, **fields}, headers=headers)

    async def stop(self) -> None:
        """As a process that is gone: nothing is said any more."""
        for task in self.gate._tasks:
            task.cancel()
        await asyncio.gather(*self.gate._tasks, return_exceptions=True)


@dataclass
class Cluster:
    server: LedgerServer
    address: str
    keys: dict[str, str]
    replicas: list[Replica] = field(default_factory=list)

    async def find(self) -> str:
        if not self.address:
            raise ConnectionError
        return self.address

    async def stop_ledger(self) -> None:
        self.address = ""
        await self.server.close()
        await until(lambda: not any(r.gate._link.connected.is_set() for r in self.replicas))

    async def start_ledger(self) -> None:
        self.server = LedgerServer(UsageStore(None, 1))
        self.address = await self.server.start("127.0.0.1")
        await until(lambda: all(r.gate._link.connected.is_set() for r in self.replicas))

    async def usage(self, tenant: str | None = None):
        return await self.server.usage(tenant)


@pytest_asyncio.fixture
async def make_cluster() -> AsyncIterator:
    async with contextlib.AsyncExitStack() as stack:

        async def make(num_replicas: int = 2, alone: str = "share", **rules: dict) -> Cluster:
            keys = {name: new_key() for name in rules}
            members = {
                name: Tenant(keys=(hash_key(keys[name].encode()),), **rule) for name, rule in rules.items()
            }
            cluster = Cluster(LedgerServer(UsageStore(None, 1)), "", keys)
            cluster.address = await cluster.server.start("127.0.0.1")
            stack.push_async_callback(lambda: cluster.server.close())
            for number in range(num_replicas):
                engine = TimedEngine("double", FAST)
                stack.push_async_callback(engine.shutdown)
                settings = ServingSettings(api_keys=(OPERATOR,))
                state = ReplicaState(settings, Recorder(settings.tiers, list(members)), f"r{number}")
                meter = Meter()
                gate = Gate(
                    Directory(TenantSettings(members=members), settings.tiers),
                    LedgerLink(f"r{number}", cluster.find, meter.all, 0.25, num_replicas),
                    meter,
                    state.recorder,
                    model="double",
                    usage=cluster.usage,
                    refuses_alone=alone == "refuse",
                )
                await gate.start(TIMEOUT_S)
                stack.push_async_callback(gate.close)
                state.gate = gate
                state.ready(engine)
                transport = httpx.ASGITransport(create_app(state), raise_app_exceptions=False)
                client = httpx.AsyncClient(transport=transport, base_url="http://test", timeout=30)
                await stack.enter_async_context(client)
                cluster.replicas.append(Replica(state, gate, client))
            return cluster

        yield make
