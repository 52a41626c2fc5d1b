"""The ledger as a Ray Serve deployment of one process, which Serve starts again where it dies."""

import asyncio
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from monitoring import Recorder
from serving.dispatch.deployment import QUIET
from serving.telemetry.logs import LogWriter
from serving.telemetry.settings import TelemetrySettings
from serving.tenants.directory import Directory
from serving.tenants.gate import Gate
from serving.tenants.link import LedgerLink
from serving.tenants.meter import Meter
from serving.tenants.server import LedgerServer
from serving.tenants.settings import TenantSettings
from serving.tenants.usage import UsageRow, UsageStore

_ANSWER_TIMEOUT_S = 2.0


class TenantLedger:
    """Replicas ask over a socket; these methods tell them where it is, and what was used."""

    async def __init__(self, settings: TenantSettings, telemetry: TelemetrySettings) -> None:  # type: ignore[misc]
        self._log_writer = LogWriter(telemetry.logs)
        store = await asyncio.to_thread(UsageStore, settings.usage_file, settings.usage_days)
        self._server = LedgerServer(store)
        self._address = await self._server.start(ray.util.get_node_ip_address())

    async def address(self) -> str:
        return self._address

    async def usage(self, tenant: str | None) -> list[UsageRow]:
        """Of one tenant, or of all."""
        return await self._server.usage(tenant)

    async def __del__(self) -> None:
        if hasattr(self, "_address"):
            await self._server.close()
            self._log_writer.stop()


class LedgerHandle:
    """The deployment as replicas reach it. All methods raise ConnectionError where it does not answer."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

    async def address(self) -> str:
        return str(await self._ask(self._handle.address.remote()))

    async def usage(self, tenant: str | None) -> list[UsageRow]:
        rows: list[UsageRow] = await self._ask(self._handle.usage.remote(tenant))
        return rows

    async def _ask(self, answer: Any) -> Any:
        try:
            async with asyncio.timeout(_ANSWER_TIMEOUT_S):
                return await answer
        except (TimeoutError, RayError, RayServeException) as error:
            raise ConnectionError(type(error).__name__) from error


def build_ledger(settings: TenantSettings, telemetry: TelemetrySettings) -> serve.Application:
    """Of one process, wherever there is room."""
    deployment = serve.deployment(
        TenantLedger,
        name="TenantLedger",
        num_replicas=1,
        max_ongoing_requests=100,
        ray_actor_options={"num_cpus": 0},
        health_check_period_s=1.0,
        health_check_timeout_s=10.0,
        graceful_shutdown_timeout_s=5.0,
        logging_config=QUIET,
    )
    return deployment.bind(settings, telemetry)


def create_gate(
    handle: DeploymentHandle,
    settings: TenantSettings,
    directory: Directory,
    recorder: Recorder,
    replica: str,
    model: str,
    num_replicas: int,
) -> Gate:
    """For the replica of that name. num_replicas: as configured."""
    ledger, meter = LedgerHandle(handle), Meter()
    link = LedgerLink(replica, ledger.address, meter.all, settings.ledger_timeout_s, num_replicas)
    return Gate(
        directory,
        link,
        meter,
        recorder,
        model=model,
        usage=ledger.usage,
        refuses_alone=settings.when_ledger_is_gone == "refuse",
    )
