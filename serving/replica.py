"""The Ray Serve replica: a shim around an injected engine.

Its duties: start the engine and warm it up, answer health checks, publish statistics, drain and stop. All
else is the app's and the engine's.
"""

import asyncio
import contextlib
import gc
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import TYPE_CHECKING

from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from engine import EngineConfig, EngineDeadError, InferenceEngine
from monitoring import Recorder
from monitoring.bandwidth import device_bandwidth
from monitoring.exporter import Exporter
from serving.api.responses.store import StoredResponse
from serving.app import create_app
from serving.dispatch.deployment import QUIET, follow_replicas
from serving.dispatch.messages import Hello, Report
from serving.dispatch.reporter import RouterLinks
from serving.errors import not_ready
from serving.settings import ServingSettings
from serving.state import ReplicaState, package_version
from serving.status.board import PeersSilentError
from serving.status.snapshot import Snapshot, take_snapshot
from serving.stream_guard import StreamGuard
from serving.telemetry import tracing
from serving.telemetry.access_log import AccessLog
from serving.telemetry.logs import LogWriter
from serving.telemetry.settings import TelemetrySettings
from serving.tenants.deployment import create_gate
from serving.tenants.directory import Directory
from serving.tenants.settings import TenantSettings

if TYPE_CHECKING:  # the SDK, which is loaded only where spans are made
    from serving.telemetry.spans import SpanWriter

EngineFactory = Callable[[EngineConfig], Awaitable[InferenceEngine]]

# Serve takes a replica for unhealthy after three failed checks in a row.
HEALTH_CHECK_PERIOD_S = 2.0
_HEALTH_CHECK_MARGIN_S = 5.0
_PEERS_TIMEOUT_S = 1.5
_LEDGER_WAIT_S = 10.0


async def start_async_engine(config: EngineConfig) -> InferenceEngine:
    """The real engine; imported late, so that the controller's process never loads torch."""
    from engine.async_engine import AsyncEngine

    return await AsyncEngine.start(config)


@serve.ingress()
class Replica:
    """One engine and its HTTP app, in one process."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self,
        config: EngineConfig,
        settings: ServingSettings,
        factory: EngineFactory = start_async_engine,
        *,
        has_router: bool = False,
        telemetry: TelemetrySettings = TelemetrySettings(),  # noqa: B008  # frozen
        tenants: TenantSettings = TenantSettings(),  # noqa: B008  # frozen
        ledger: DeploymentHandle | None = None,
    ) -> None:
        """has_router: a proxy in front vouches for the router's headers; without one nobody does, and they
        are ignored.
        ledger: of the tenants; None where there are none.
        """
        context = serve.get_replica_context()
        replica_id = context.replica_id
        directory = None if ledger is None else Directory(tenants, settings.tiers)
        self._config = config
        self._log_writer = LogWriter(telemetry.logs)
        recorder = Recorder(settings.tiers, () if directory is None else directory.names)
        self._exporter = Exporter(settings.metrics, recorder.registry)
        self._name = replica_id.to_full_id_str()
        self._links = RouterLinks(self._hello, self._report, recorder) if has_router else None
        self._is_hung = False
        self._guard = StreamGuard()
        self._state = ReplicaState(settings, recorder, replica_id.unique_id, self._links, self._guard)
        self._state.kv_block_tokens, self._state.kv_dtype = config.block_size, config.kv_cache_dtype
        self._state.keeps_prompts = telemetry.logs.prompts
        self._span_writer = self._observe(telemetry)
        self._engine = await factory(config)
        self._describe(recorder)
        if ledger is not None and directory is not None:
            model, num_replicas = self._engine.model.name, max(1, context.world_size)
            gate = create_gate(ledger, tenants, directory, recorder, self._name, model, num_replicas)
            await gate.start(_LEDGER_WAIT_S)
            self._state.gate = gate
        self._state.admission.max_num_seqs = config.max_num_seqs
        self._state.ready(self._engine)
        self._is_listed = False
        self._long_poll = follow_replicas(context.deployment, self._note_listed)
        self._publisher = asyncio.create_task(self._state.publish_stats())

    def __serve_build_asgi_app__(self) -> FastAPI:
        app = create_app(
            self._state, answers_with_id=False, peers=self._peers, response_peers=self._ask_for_response
        )
        # What is there now stays as long as the process: to look through it for garbage takes 0.2 s.
        gc.collect()
        gc.freeze()
        return app

    def _note_listed(self, running: Collection[str]) -> None:
        """Serve tells a replica nothing when it is to leave, but that it has waited for its requests: an open
        WebSocket is one.
        """
        if self._name in running:
            self._is_listed = True
        elif self._is_listed:
            self._state.leaving.set()

    async def report_to(self, router: str) -> None:
        """A router asks for this replica's events: host:port. It may ask again."""
        if self._links is not None:
            self._links.connect(router)

    async def status_snapshot(self) -> Snapshot:
        """What this replica adds to the status page, whichever replica shows it."""
        return take_snapshot(self._state)

    async def _peers(self) -> Sequence[Snapshot]:
        """Those of all running replicas. Raises PeersSilentError."""
        context = serve.get_replica_context()
        handle = serve.get_deployment_handle(context.deployment, context.app_name)
        try:
            answers = await handle.broadcast("status_snapshot").results_async(
                timeout_s=_PEERS_TIMEOUT_S, return_exceptions=True
            )
        except (TimeoutError, RayError, RayServeException) as error:
            raise PeersSilentError(type(error).__name__) from error
        return [answer for answer in answers if isinstance(answer, Snapshot)]

    async def kept_response(self, response_id: str, owner: str | None, forget: bool) -> StoredResponse | None:
        """What this replica keeps, for whichever is asked for it."""
        store = self._state.responses
        return store.pop(response_id, owner) if forget else store.get(response_id, owner)

    async def _ask_for_response(
        self, response_id: str, owner: str | None, forget: bool
    ) -> StoredResponse | None:
        context = serve.get_replica_context()
        handle = serve.get_deployment_handle(context.deployment, context.app_name)
        silent = not_ready("Not every replica that may keep this response could be asked; please retry.")
        try:
            answers = await handle.broadcast("kept_response", response_id, owner, forget).results_async(
                timeout_s=_PEERS_TIMEOUT_S, return_exceptions=True
            )
        except (TimeoutError, RayError, RayServeException):
            raise silent from None
        found = next((answer for answer in answers if isinstance(answer, StoredResponse)), None)
        if found is None and any(isinstance(answer, BaseException) for answer in answers):
            raise silent
        return found

    def _observe(self, telemetry: TelemetrySettings) -> "SpanWriter | None":
        """Spans first: the log line then names their trace."""
        writer = None
        if tracing.is_on(telemetry.traces):
            from serving.telemetry.spans import SpanWriter

            provider = tracing.create_provider(telemetry.traces, package_version(), self._state.replica)
            writer = SpanWriter(provider)
            self._state.observers.append(writer.write)
        self._state.observers.append(AccessLog(telemetry.logs).write)
        return writer

    async def check_health(self) -> None:
        """Raises EngineDeadError where the engine is gone, or gave no sign of life for `hung_after_s`.

        The engine answers between two steps, so that the answer is its steps' heartbeat. Once missed, it is
        not waited for again: the next checks fail at once.
        """
        if self._is_hung:
            raise EngineDeadError("the engine makes no steps")
        limit_s = self._state.settings.hung_after_s
        try:
            async with asyncio.timeout(limit_s):
                await self._engine.check_health()
        except TimeoutError:
            self._is_hung = True
            raise EngineDeadError(f"the engine has made no step for {limit_s:g} s") from None

    def _describe(self, recorder: Recorder) -> None:
        config, engine = self._config, self._engine
        bandwidth = device_bandwidth(config.device, config.num_threads, recorder.registry)
        num_blocks = engine.stats().num_blocks
        recorder.describe(
            self._state.replica, package_version(), engine.model, config.block_size, num_blocks, bandwidth
        )

    def _hello(self) -> Hello:
        config, stats = self._config, self._engine.stats()
        return Hello(
            self._name,
            config.max_num_seqs,
            stats.token_budget,
            stats.num_blocks * config.block_size,
        )

    def _report(self) -> Report:
        stats = self._engine.stats()
        return Report(
            stats.num_running,
            stats.num_waiting_tokens,
            (stats.num_blocks - stats.num_free_blocks) * self._config.block_size,
            stats.total_steps,
            stats.step_cost,
        )

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What `serving.autoscaling_policy` goes by."""
        stats, admission = self._engine.stats(), self._state.admission
        num_kept, num_deadlines = admission.attainment.counts(admission.clock())
        return {
            "backlog_s": stats.prompts_s(stats.num_waiting_tokens),
            "busy": admission.num_inflight / self._config.max_num_seqs,
            "num_kept": num_kept,
            "num_deadlines": num_deadlines,
        }

    async def __del__(self) -> None:
        # Serve awaits this once, after the drain; a replica that failed to start has nothing to stop.
        if not hasattr(self, "_publisher"):
            return
        self._state.start_draining()
        self._long_poll.stop()
        self._publisher.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._publisher
        if self._links is not None:
            await self._links.close()
        if self._state.gate is not None:
            await self._state.gate.close()
        await self._engine.shutdown()
        self._guard.close()
        if self._span_writer is not None:
            await asyncio.to_thread(self._span_writer.shutdown)
        self._log_writer.stop()
        self._exporter.close()


def build_deployment(settings: ServingSettings, drain_s: float) -> serve.Deployment:
    """The deployment, with every limit that Serve enforces set on purpose.

    drain_s: how long a replica that goes away may take to finish its streams.
    """
    return serve.deployment(
        Replica,
        name="Replica",
        # Admission belongs to the app, which answers 429 with a reason. Serve's own limit (5 by default)
        # would queue requests where the engine cannot batch them; it stands above the app's.
        max_ongoing_requests=2 * settings.max_inflight_requests,
        # What is beyond both limits is refused by the proxy instead of piling up there without end.
        max_queued_requests=2 * settings.max_inflight_requests,
        graceful_shutdown_timeout_s=drain_s,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        health_check_timeout_s=settings.hung_after_s + _HEALTH_CHECK_MARGIN_S,
        logging_config=QUIET,
    )
