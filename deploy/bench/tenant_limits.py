"""What a tenant's limits add to a request: finding whose key it is, asking the ledger, giving the place back.

The ledger runs in a process of its own, as it does in a cluster, on the same machine: a network's round trip
comes on top where it runs on another. Beside the time that passes stands what both processes compute for a
request, which does not depend on what else the machine does.
"""

import asyncio
import multiprocessing
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from statistics import quantiles
from typing import Any

import psutil

from monitoring import Recorder
from serving.telemetry.exchange import Exchange
from serving.tenants.directory import Directory
from serving.tenants.gate import Gate
from serving.tenants.keys import hash_key, new_key
from serving.tenants.link import LedgerLink
from serving.tenants.meter import Meter
from serving.tenants.server import LedgerServer
from serving.tenants.settings import Tenant, TenantSettings
from serving.tenants.usage import UsageRow, UsageStore
from serving.tiers import TIERS

_NUM_TENANTS = 100
_START_TIMEOUT_S = 30.0
_PROMPT_TOKENS, _OUTPUT_TOKENS = 200, 100
_LIMITS: dict[str, dict[str, int]] = {
    "none": {},
    "all three": {
        "requests_per_minute": 10**9,
        "tokens_per_minute": 10**12,
        "max_concurrent_requests": 10**6,
    },
}


def run(concurrencies: Sequence[int], num_requests: int) -> list[dict[str, Any]]:
    """One row for each set of limits and number of clients, which ask without a pause."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    ledger = context.Process(target=_serve, args=(there,), daemon=True)
    ledger.start()
    try:
        if not here.poll(_START_TIMEOUT_S):
            raise TimeoutError("the ledger did not start")
        process = psutil.Process(ledger.pid)
        return asyncio.run(_measure(here.recv(), process, concurrencies, num_requests))
    finally:
        ledger.kill()
        ledger.join()


def _serve(pipe: Connection) -> None:
    async def serve() -> None:
        pipe.send(await LedgerServer(UsageStore(None, 1)).start("127.0.0.1"))
        await asyncio.Event().wait()

    asyncio.run(serve())


async def _measure(
    address: str, ledger: psutil.Process, concurrencies: Sequence[int], num_requests: int
) -> list[dict[str, Any]]:
    async def find() -> str:
        return address

    async def no_usage(tenant: str | None) -> list[UsageRow]:
        return []

    rows = []
    for limits, rules in _LIMITS.items():
        keys = [new_key().encode() for _ in range(_NUM_TENANTS)]
        members = {
            f"t{number}": Tenant.model_validate({"keys": [hash_key(key)], **rules})
            for number, key in enumerate(keys)
        }
        meter = Meter()
        link = LedgerLink("bench", find, meter.all, timeout_s=5.0)
        directory = Directory(TenantSettings(members=members), TIERS)
        gate = Gate(directory, link, meter, Recorder(), model="m", usage=no_usage)
        await gate.start(_START_TIMEOUT_S)
        for concurrency in concurrencies:
            await _ask(gate, keys, concurrency, num_requests // 10)
            here_s, there_s = time.process_time(), sum(ledger.cpu_times()[:2])
            start = time.perf_counter()
            times = await _ask(gate, keys, concurrency, num_requests)
            taken_s = time.perf_counter() - start
            here_s, there_s = time.process_time() - here_s, sum(ledger.cpu_times()[:2]) - there_s
            cuts = quantiles(times, n=100)
            rows.append(
                {
                    "limits": limits,
                    "tenants": _NUM_TENANTS,
                    "concurrency": concurrency,
                    "added_us_p50": round(cuts[49] * 1e6, 1),
                    "added_us_p99": round(cuts[98] * 1e6, 1),
                    "requests_s": round(len(times) / taken_s),
                    "replica_cpu_us": round(here_s / len(times) * 1e6, 1),
                    "ledger_cpu_us": round(there_s / len(times) * 1e6, 1),
                }
            )
        await gate.close()
    return rows


async def _ask(gate: Gate, keys: Sequence[bytes], concurrency: int, num_requests: int) -> list[float]:
    """Seconds that each request spent on it."""
    times: list[float] = []

    async def client(first: int) -> None:
        for number in range(first, num_requests, concurrency):
            exchange = Exchange("bench", "POST", 0.0)
            start = time.perf_counter()
            visit = gate.visit(keys[number % len(keys)], exchange)
            assert visit is not None
            await visit.admit(_PROMPT_TOKENS, _OUTPUT_TOKENS)
            visit.leave()
            times.append(time.perf_counter() - start)

    await asyncio.gather(*(client(first) for first in range(concurrency)))
    return times
