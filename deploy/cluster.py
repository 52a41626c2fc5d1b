"""A Ray Serve cluster of this machine's own: start, wait until warm, shut down. Binds the application."""

import contextlib
import dataclasses
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import httpx
import psutil

from deploy import ray_environment
from deploy.application import APP_NAME, build
from deploy.config import PeregrineConfig
from deploy.log_relay import log_relay
from deploy.models import resolve_model
from engine import EngineConfig
from serving.dispatch.headers import PEREGRINE_ROUTE

if TYPE_CHECKING:  # imports ray, which reads its environment then
    from serving.replica import EngineFactory

# What a replica's process takes beside weights and KV cache: interpreter, torch, Ray.
_REPLICA_OVERHEAD_BYTES = 700 * 2**20
_CLUSTER_OVERHEAD_BYTES = 1200 * 2**20  # two request routers among it
_DEFAULT_KV_BYTES = 2**30
_OBJECT_STORE_BYTES = 80 * 2**20  # requests travel over HTTP; Ray's store only carries deployment code
_POLL_S = 0.2
_PROBE_TIMEOUT_S = 10.0
# Marks the probes as not to be traced (W3C Trace Context, sampled flag 0).
_UNTRACED = {"traceparent": f"00-{'1' * 32}-{'1' * 16}-00"}


class StartError(Exception):
    """One line that says why the cluster does not start."""


@contextlib.contextmanager
def running_cluster(
    config: PeregrineConfig, log_to: TextIO | None = None, *, factory: "EngineFactory | None" = None
) -> Iterator[str]:
    """Start everything, yield the base URL when all replicas are warm, and shut down at the end.

    log_to: gets the log lines of all processes; None: warnings alone, the way that Ray prints them.
    factory: as in `deploy`.

    Raises:
        StartError: the port is in use, resources are short, or a replica failed; nothing is left running.
        ModelNotFoundError: there is no such model.
    """
    cluster = config.cluster
    if not ray_environment.is_port_free(cluster.host, cluster.port):
        raise StartError(f"port {cluster.port} on {cluster.host} is in use (choose another with --port)")
    model = resolve_model(config.engine.model)
    engine = dataclasses.replace(
        config.engine,
        model=str(model),
        served_model_name=config.engine.served_model_name
        or Path(config.engine.model).name.removesuffix(".gguf"),
    )
    num_gpus = _count_gpus() if engine.device != "cpu" else 0
    engine = _share_resources(engine, cluster.max_replicas, num_gpus)
    if num_gpus == 0:
        _check_memory(engine, model, cluster.max_replicas)

    with started(dataclasses.replace(config, engine=engine), num_gpus, factory, log_to) as url:
        yield url


@contextlib.contextmanager
def started(
    config: PeregrineConfig,
    num_gpus: int = 0,
    factory: "EngineFactory | None" = None,
    log_to: TextIO | None = None,
) -> Iterator[str]:
    """`running_cluster` for a configuration that is checked and resolved; `factory` as in `deploy`."""
    temporary = Path(tempfile.mkdtemp(prefix="pg-"))
    try:
        has_haproxy = ray_environment.prepare(config, temporary)
        with log_relay(temporary, log_to), own_ray(temporary, num_gpus):
            deploy(config, num_gpus, has_haproxy=has_haproxy, factory=factory)
            try:
                yield f"http://{config.cluster.host}:{config.cluster.port}"
            finally:
                with contextlib.suppress(Exception):
                    _drain(time.monotonic() + ray_environment.drain_s(config))
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def own_ray(temporary: Path, num_gpus: int) -> Iterator[None]:
    """A Ray of this process's own, on loopback, gone afterwards with all it started."""
    import ray
    from ray import serve

    before = {child.pid for child in psutil.Process().children(recursive=True)}
    ray.init(
        address="local",
        include_dashboard=False,
        _node_ip_address=ray_environment.LOOPBACK,
        _temp_dir=str(temporary),
        object_store_memory=_OBJECT_STORE_BYTES,
        # Logical CPUs are Ray's bookkeeping; the engine's threads are shared out by this module.
        num_cpus=max(8, os.cpu_count() or 1),
        num_gpus=num_gpus,
        logging_level=logging.WARNING,
        log_to_driver=True,
        configure_logging=True,
    )
    try:
        yield
    finally:
        with contextlib.suppress(Exception):
            serve.shutdown()
        ray.shutdown()
        _reap(before)


def deploy(
    config: PeregrineConfig,
    num_gpus: int,
    *,
    has_haproxy: bool,
    factory: "EngineFactory | None" = None,
) -> None:
    """Deploy, or change what is deployed, and wait until all of it runs.

    factory: starts another engine than the configured one (tests).
    Raises StartError.
    """
    from ray import serve
    from ray.serve.api import _run
    from ray.serve.schema import LoggingConfig

    cluster = config.cluster
    serve.start(
        http_options={
            "host": cluster.host,
            "port": cluster.port,
            # The app's own deadline comes first and answers in the API's form; this one is the backstop.
            "request_timeout_s": ray_environment.backstop_s(config),
        },
        logging_config=LoggingConfig(log_level="WARNING", enable_access_log=False),
    )
    has_router = has_haproxy and config.needs_router
    application = build(config, on_gpu=num_gpus > 0, has_router=has_router, factory=factory)
    # serve.run would wait without a deadline and without the replica's own reason for a failure.
    _run(application, name=APP_NAME, route_prefix="/", _blocking=False)
    deadline = time.monotonic() + cluster.start_timeout_s
    _wait_until_running(deadline)
    if has_router:
        url = f"http://{cluster.host}:{cluster.port}/health"
        _wait_until_routed(url, 2 * config.routing.routers_per_node, deadline)
        if cluster.replicas > 1:  # until then a router may choose among half of them
            time.sleep(config.routing.new_replica_delay_s)


def _drain(deadline: float) -> None:
    """Take the application away and wait for its streams: Serve's own shutdown ends the proxies first."""
    from ray import serve

    serve.delete(APP_NAME, _blocking=False)
    while APP_NAME in serve.status().applications and time.monotonic() < deadline:
        time.sleep(_POLL_S)


def _wait_until_running(deadline: float) -> None:
    from ray import serve

    while time.monotonic() < deadline:
        application = serve.status().applications.get(APP_NAME)
        if application is not None:
            state = application.status.value
            if state == "RUNNING":
                return
            if state in ("DEPLOY_FAILED", "UNHEALTHY"):
                raise StartError(_reason(application))
        time.sleep(_POLL_S)
    raise StartError("the replicas were not ready within cluster.start_timeout_s")


def _wait_until_routed(url: str, num_probes: int, deadline: float) -> None:
    """HAProxy hears of the routers some seconds after Serve calls the application running; until then it
    chooses by itself.

    Returns after `num_probes` routed ones in a row: it asks its routers in turn. A probe is a POST to a path
    that only knows GET: routed as every POST is, and refused by the replica at once. Raises StartError.
    """
    num_routed = 0
    with httpx.Client(timeout=_PROBE_TIMEOUT_S, headers=_UNTRACED, trust_env=False) as client:
        while True:
            try:
                # On a connection of its own: one that is kept stays with a HAProxy that has been replaced.
                answer = client.post(url, headers={"connection": "close"})
                is_routed, last = PEREGRINE_ROUTE in answer.headers, f"answered with {answer.status_code}"
            except httpx.HTTPError as error:
                is_routed, last = False, f"failed: {error!r}"
            num_routed = num_routed + 1 if is_routed else 0
            if num_routed == num_probes:
                return
            if time.monotonic() > deadline:
                raise StartError(f"HAProxy asks no router within cluster.start_timeout_s; a probe {last}")
            if not is_routed:
                time.sleep(_POLL_S)


def _reason(application: object) -> str:
    """The replica's own exception, without Ray's layers of traceback around it."""
    deployments = getattr(application, "deployments", {})
    text = " ".join(d.message for d in deployments.values()) or str(getattr(application, "message", ""))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "Error:" in line or "Error(" in line]
    return f"a replica failed to start: {(errors or lines or ['no reason given'])[-1]}"


def _share_resources(engine: EngineConfig, replicas: int, num_gpus: int) -> EngineConfig:
    if num_gpus:
        if replicas > num_gpus:
            raise StartError(f"{replicas} replicas need {replicas} GPUs, this machine has {num_gpus}")
        return engine
    if engine.device == "cuda":
        raise StartError("engine.device is cuda, but no GPU was found (allowed here: auto, cpu)")
    if engine.num_threads is not None:
        return engine
    cores = len(os.sched_getaffinity(0))
    return dataclasses.replace(engine, num_threads=max(1, cores // replicas))


def _check_memory(engine: EngineConfig, model: Path, replicas: int) -> None:
    files = [model] if model.is_file() else list(model.glob("*.safetensors"))
    weights = sum(f.stat().st_size for f in files)
    kv_cache = engine.kv_cache_bytes or _DEFAULT_KV_BYTES
    needed = _CLUSTER_OVERHEAD_BYTES + replicas * (weights + kv_cache + _REPLICA_OVERHEAD_BYTES)
    available = psutil.virtual_memory().available
    if needed > available:
        raise StartError(
            f"{replicas} replica(s) need about {needed / 2**30:.1f} GiB of memory, "
            f"{available / 2**30:.1f} GiB are free (fewer --replicas, or a smaller engine.kv_cache_bytes)"
        )


def _count_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _reap(before: set[int]) -> None:
    """End what Ray left behind of the processes that this run started."""
    started = [c for c in psutil.Process().children(recursive=True) if c.pid not in before]
    _, alive = psutil.wait_procs(started, timeout=5)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=5)
