"""The Ray Serve replica: a shim around an injected engine.

Its duties: start the engine and warm it up, answer health checks, publish statistics, drain and stop. All
else is the app's and the engine's.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI
from ray import serve

from engine import EngineConfig, InferenceEngine
from monitoring import Recorder
from serving.app import create_app
from serving.settings import ServingSettings
from serving.state import ReplicaState

EngineFactory = Callable[[EngineConfig], Awaitable[InferenceEngine]]

# One step of a large prefill may hold the engine for some seconds; three silent checks mean it is stuck.
HEALTH_CHECK_PERIOD_S = 10.0
HEALTH_CHECK_TIMEOUT_S = 35.0


async def start_async_engine(config: EngineConfig) -> InferenceEngine:
    """The real engine; imported late, so that the controller's process never loads torch."""
    from engine.async_engine import AsyncEngine

    return await AsyncEngine.start(config)


@serve.ingress()
class Replica:
    """One engine and its HTTP app, in one process."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, config: EngineConfig, settings: ServingSettings, factory: EngineFactory = start_async_engine
    ) -> None:
        context = serve.get_replica_context()
        self._state = ReplicaState(settings, Recorder(), replica=context.replica_id.unique_id)
        self._engine = await factory(config)
        self._state.ready(self._engine)
        self._publisher = asyncio.create_task(self._state.publish_stats())

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self._state, answers_with_id=False)

    async def check_health(self) -> None:
        await self._engine.check_health()

    def record_routing_stats(self) -> dict[str, Any]:
        """Load for the request router, straight from the engine."""
        stats = self._engine.stats()
        return {
            "num_running": stats.num_running,
            "num_waiting": stats.num_waiting,
            "num_waiting_tokens": stats.num_waiting_tokens,
            "num_free_blocks": stats.num_free_blocks,
            "last_step_s": stats.last_step_s,
            "prompt_tokens_per_s": stats.prompt_tokens_per_s,
        }

    async def __del__(self) -> None:
        # Serve awaits this once, after the drain; a replica that failed to start has nothing to stop.
        if not hasattr(self, "_publisher"):
            return
        self._state.start_draining()
        self._publisher.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._publisher
        await self._engine.shutdown()


def build_deployment(settings: ServingSettings) -> serve.Deployment:
    """The deployment, with every limit that Serve enforces set on purpose."""
    return serve.deployment(
        Replica,
        name="Replica",
        # Admission belongs to the app, which answers 429 with a reason. Serve's own limit (5 by default)
        # would queue requests where the engine cannot batch them; it stands above the app's.
        max_ongoing_requests=2 * settings.max_inflight_requests,
        # What is beyond both limits is refused by the proxy instead of piling up there without end.
        max_queued_requests=2 * settings.max_inflight_requests,
        # A replica that goes away finishes its streams first; most answers end within 30 s.
        graceful_shutdown_timeout_s=30.0,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        health_check_timeout_s=HEALTH_CHECK_TIMEOUT_S,
    )
