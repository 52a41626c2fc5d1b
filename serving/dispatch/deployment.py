"""The request router as a Ray Serve deployment, one on each proxy's node.

Ray Serve 2.60's HAProxy posts every POST request's body to /internal/route of this deployment and sends the
request to the replica that the answer names (`Application._with_ingress_request_router`, the way of Ray's own
LLM serving; private). Two more private parts: the long poll that lists the running replicas, and the
controller's handle for it. All of Ray's private parts in use are in this file and in `deploy.cluster`. The
question itself is answered by `question`, before Ray's server around this deployment sees it.
"""

import asyncio
import contextlib
import gc
import random
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

import ray
from pydantic_core import to_json
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.schema import LoggingConfig
from starlette.applications import Starlette

from monitoring import RouterRecorder
from monitoring.exporter import Exporter, MetricsSettings
from serving.dispatch.dispatcher import Dispatcher
from serving.dispatch.headers import DECIDED, write_decided
from serving.dispatch.listener import Listener
from serving.dispatch.question import answer_questions
from serving.dispatch.settings import RoutingSettings, create_policy
from serving.routing import Router
from serving.telemetry.logs import LogWriter
from serving.telemetry.settings import TelemetrySettings
from serving.telemetry.tracing import is_on
from serving.tiers import Tier

# Of the process that runs a deployment; Serve's default writes a line to a file for every request.
QUIET = LoggingConfig(log_level="WARNING", enable_access_log=False)
_SWEEP_PERIOD_S = 1.0
_LISTED_TIMEOUT_S = 20.0
_INTRODUCTION_PERIOD_S = 0.5
_INTRODUCED_TIMEOUT_S = 2.0


@serve.ingress()
class RequestRouter:
    """Chooses the replica of each request; neither requests nor tokens pass through it."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self,
        settings: RoutingSettings,
        tiers: Mapping[str, Tier],
        replicas: str,
        telemetry: TelemetrySettings = TelemetrySettings(),  # noqa: B008  # frozen
        *,
        metrics: MetricsSettings,
    ) -> None:
        """replicas: name of the deployment, in this application, that serves the requests."""
        self._log_writer = LogWriter(telemetry.logs)
        self._is_traced = is_on(telemetry.traces)
        self._dispatcher = Dispatcher(
            Router(create_policy(settings.policy, random.Random()), time.monotonic),
            tiers,
            time.monotonic,
            recorder=RouterRecorder(),
            new_replica_delay_s=settings.new_replica_delay_s,
        )
        self._exporter = Exporter(metrics, self._dispatcher.recorder.registry)
        self._listener = Listener(self._dispatcher)
        self._dispatcher.reply_to = await self._listener.start(ray.util.get_node_ip_address())
        listed = asyncio.Event()

        def on_change(running: Collection[str]) -> None:
            self._dispatcher.list_replicas(running)
            listed.set()

        self._long_poll = follow_replicas(replicas, on_change)
        async with asyncio.timeout(_LISTED_TIMEOUT_S):
            await listed.wait()
        answer_questions(self._answer)
        self._sweeping = asyncio.create_task(self._sweep())
        self._introducing = asyncio.create_task(self._introduce(replicas))

    def __serve_build_asgi_app__(self) -> Starlette:
        gc.collect()
        gc.freeze()  # as a replica does it
        return Starlette()  # for what is no question

    def reconfigure(self, user_config: dict[str, int]) -> None:
        """Serve calls it at the start and when the wish changes, without a new process."""
        self._dispatcher.recorder.set_target(user_config["target_replicas"])

    def counters(self) -> dict[str, int]:
        """The ledger's sums, for tests and for the curious."""
        return self._dispatcher.counters()

    def _answer(self, body: bytes, num_bytes: int) -> bytes:
        start_ns = time.time_ns() if self._is_traced else 0
        answer = self._dispatcher.route(body, num_bytes)
        if answer is None:
            return _response(b"503 Service Unavailable", {"detail": "no replica"})
        # When the answer is on its way.
        asyncio.get_running_loop().call_soon(self._dispatcher.record_decisions)
        if self._is_traced:
            # The replica makes the span: it alone knows the client's trace.
            answer.headers[DECIDED] = write_decided(start_ns, time.time_ns())
        told = {"replica_id": answer.replica_id, "request_headers": answer.headers}
        return _response(b"200 OK", told)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_PERIOD_S)
            self._dispatcher.sweep()
            self._dispatcher.record_fleet()

    async def _introduce(self, replicas: str) -> None:
        """Ask the replicas to report here, until all of those that are listed do: one to which this router
        has sent nothing yet would not know of it, and this router not of what the others send there.
        """
        handle = serve.get_deployment_handle(replicas, serve.get_replica_context().app_name)
        while True:
            if self._dispatcher.is_waiting_for_replicas:
                answers = handle.broadcast("report_to", self._dispatcher.reply_to)
                with contextlib.suppress(TimeoutError, RayError, RayServeException):  # the next time, then
                    await answers.results_async(timeout_s=_INTRODUCED_TIMEOUT_S, return_exceptions=True)
            await asyncio.sleep(_INTRODUCTION_PERIOD_S)

    async def __del__(self) -> None:
        if not hasattr(self, "_introducing"):
            return
        self._long_poll.stop()
        for task in (self._sweeping, self._introducing):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        await self._listener.close()
        self._log_writer.stop()
        self._exporter.close()


def _response(status: bytes, content: dict[str, Any]) -> bytes:
    body = to_json(content)
    return b"HTTP/1.0 %b\r\nContent-Length: %d\r\n\r\n%b" % (status, len(body), body)


def build_router(
    settings: RoutingSettings,
    tiers: Mapping[str, Tier],
    replicas: str,
    telemetry: TelemetrySettings = TelemetrySettings(),  # noqa: B008  # frozen
    *,
    metrics: MetricsSettings | None = None,
    target_replicas: int = 0,
) -> serve.Application:
    """The application to attach to that of the deployment `replicas`.

    How many routers run is the proxies' matter: RAY_SERVE_INGRESS_ROUTER_REPLICAS_PER_NODE.
    target_replicas: how many of `replicas` are to run at least, for the metric of that name; 0 is unknown.
    """
    deployment = serve.deployment(
        RequestRouter,
        name="RequestRouter",
        # A decision takes a fraction of a millisecond; what comes together waits in the socket, not for a
        # place. The node of a proxy may have no CPU to spare in Ray's books.
        max_ongoing_requests=10_000,
        ray_actor_options={"num_cpus": 0},
        health_check_period_s=2.0,
        graceful_shutdown_timeout_s=10.0,
        logging_config=QUIET,
        user_config={"target_replicas": target_replicas},
    )
    return deployment.bind(settings, dict(tiers), replicas, telemetry, metrics=metrics or MetricsSettings())


def follow_replicas(deployment: str, on_change: Callable[[Collection[str]], None]) -> Any:
    """Tells, in this event loop, which replicas run, now and when that changes; those that are to leave are
    none of them. For the code of a replica. Returns what is to be stopped.
    """
    from ray.serve._private.common import DeploymentID
    from ray.serve._private.long_poll import LongPollClient, LongPollNamespace
    from ray.serve.context import _get_global_client

    context = serve.get_replica_context()
    key = (LongPollNamespace.DEPLOYMENT_TARGETS, DeploymentID(name=deployment, app_name=context.app_name))

    def take(targets: Any) -> None:
        on_change([replica.actor_name for replica in targets.running_replicas])

    return LongPollClient(
        _get_global_client()._controller,
        {key: take},
        call_in_event_loop=asyncio.get_running_loop(),
        client_id=f"peregrine:{context.replica_id.unique_id}",
    )
