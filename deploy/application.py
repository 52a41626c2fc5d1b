"""The Serve application of a configuration, and the file by which a cluster that runs already deploys it.

`peregrine serve` builds it in its own process. KubeRay, or `serve deploy` on machines of one's own, sends
`serve_config`'s document to the cluster, which calls `application` with its `args`.
"""

import asyncio
import contextlib
import dataclasses
import hashlib
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy import ray_environment
from deploy.config import ClusterSettings, ConfigError, PeregrineConfig, config_from
from engine import EngineConfig, InferenceEngine
from serving import AutoscalingSettings
from serving.state import package_version

if TYPE_CHECKING:  # imports ray, which reads its environment then
    from ray.serve import Application

    from serving.replica import EngineFactory

APP_NAME = "peregrine"
REPLICAS = "Replica"
ROUTER = "RequestRouter"
API_KEY_VARIABLE = "PEREGRINE_API_KEY"
# Ray clamps to the bounds itself. The policy gets these, so that new bounds are no new policy, for which
# Serve would replace every replica.
_ANY_NUMBER = {"min_replicas": 1, "max_replicas": 1024}
_CGROUP_CPU_LIMIT = Path("/sys/fs/cgroup/cpu.max")  # "<quota or max> <period>"


def build(
    config: PeregrineConfig, *, on_gpu: bool, has_router: bool, factory: "EngineFactory | None" = None
) -> "Application":
    """factory: starts another engine than the configured one."""
    from serving.autoscaling_policy import autoscaling_config
    from serving.dispatch.deployment import build_router
    from serving.replica import build_deployment, start_async_engine
    from serving.tenants.deployment import build_ledger

    cluster = config.cluster
    deployment = build_deployment(config.serving, ray_environment.drain_s(config)).options(
        num_replicas="auto" if cluster.autoscaling else cluster.replicas,
        autoscaling_config=(
            autoscaling_config(cluster.autoscaling, cluster.replicas) if cluster.autoscaling else None
        ),
        # On a GPU machine every replica has one whole GPU; on the CPU the engine's threads are its share.
        ray_actor_options={"num_cpus": 0.1, "num_gpus": 1 if on_gpu else 0},
    )
    # Ray would take every deployment for a change of code and replace all replicas, also to scale.
    deployment._version = _version_of(
        config.engine, config.serving, config.telemetry, config.tenants, has_router
    )
    ledger = None
    if config.tenants.is_on:
        ledger = build_ledger(config.tenants, config.telemetry)
        ledger._bound_deployment._version = _version_of(config.tenants, config.telemetry)
    bound = deployment.bind(
        config.engine,
        config.serving,
        factory or start_async_engine,
        has_router=has_router,
        telemetry=config.telemetry,
        tenants=config.tenants,
        ledger=ledger,
    )
    if has_router:
        router = build_router(
            config.routing,
            config.serving.tiers,
            deployment.name,
            config.telemetry,
            metrics=config.serving.metrics,
            target_replicas=_target(cluster),
        )
        router._bound_deployment._version = _version_of(
            config.routing, config.serving.tiers, config.telemetry, config.serving.metrics
        )
        bound = bound._with_ingress_request_router(router)
    return bound


def application(args: dict[str, Any]) -> "Application":
    """What `import_path` names. `args` are the sections of the configuration.

    API keys come from the environment, as secrets do not belong into a document that many can read.

    Raises ConfigError.
    """
    config = config_from(args)
    if keys := tuple(os.environ.get(API_KEY_VARIABLE, "").split()):
        serving = config.serving.model_copy(update={"api_keys": (*config.serving.api_keys, *keys)})
        config = dataclasses.replace(config, serving=serving)
    has_router = ray_environment.wants_haproxy(config.cluster) and config.routing.policy != "none"
    return build(config, on_gpu=_is_on_gpu(config), has_router=has_router, factory=start_on_this_node)


def serve_config(config: PeregrineConfig, args: dict[str, Any]) -> dict[str, Any]:
    """Ray Serve's own configuration of `config`, whose sections as they were read are `args`.

    How many replicas there are stands in the deployment's options and not in `args`: what changes there
    changes in place, anything in `args` replaces every replica.

    Raises ConfigError: the device is left open.
    """
    cluster = config.cluster
    replicas: dict[str, Any] = {"name": REPLICAS, "num_replicas": cluster.replicas}
    # Ahead of those they replace where there is room; else the old ones go on serving.
    replicas["max_surge_percent"] = 100
    if not _is_on_gpu(config):
        replicas["max_replicas_per_node"] = 1  # it takes all cores of its node, as the other one whole GPU
    if cluster.autoscaling:
        replicas["num_replicas"] = "auto"
        replicas["autoscaling_config"] = _autoscaling(cluster.autoscaling, cluster.replicas)
    deployments = [replicas]
    if cluster.haproxy != "off" and config.routing.policy != "none":
        deployments.append({"name": ROUTER, "user_config": {"target_replicas": _target(cluster)}})
    kept = {section: values for section, values in args.items() if values and section != "cluster"}
    if "haproxy" in (args.get("cluster") or {}):
        kept["cluster"] = {"haproxy": cluster.haproxy}
    return {
        "proxy_location": "EveryNode",
        "http_options": {
            "host": "0.0.0.0",
            "port": cluster.port,
            # The app's own deadline comes first and answers in the API's form; this one is the backstop.
            "request_timeout_s": ray_environment.backstop_s(config),
        },
        "logging_config": {"log_level": "WARNING", "enable_access_log": False},
        "applications": [
            {
                "name": APP_NAME,
                "route_prefix": "/",
                "import_path": "deploy.application:application",
                "args": kept,
                "deployments": deployments,
            }
        ],
    }


async def start_on_this_node(config: EngineConfig) -> InferenceEngine:
    """An engine whose model's files and share of the processor are looked up where it runs.

    Raises ModelNotFoundError.
    """
    from deploy.models import resolve_model
    from serving.replica import start_async_engine

    model = await asyncio.to_thread(resolve_model, config.model)
    name = config.served_model_name or Path(config.model).name.removesuffix(".gguf")
    threads = config.num_threads or _available_cores()
    return await start_async_engine(
        dataclasses.replace(config, model=str(model), served_model_name=name, num_threads=threads)
    )


def _target(cluster: ClusterSettings) -> int:
    """How many replicas are to run at least."""
    return cluster.autoscaling.min_replicas if cluster.autoscaling else cluster.replicas


def _autoscaling(settings: AutoscalingSettings, initial: int) -> dict[str, Any]:
    return {
        "min_replicas": settings.min_replicas,
        "initial_replicas": min(max(initial, settings.min_replicas), settings.max_replicas),
        "max_replicas": settings.max_replicas,
        "metrics_interval_s": 1.0,
        "look_back_period_s": settings.look_back_s,
        "upscale_delay_s": settings.upscale_delay_s,
        "downscale_delay_s": settings.downscale_delay_s,
        "policy": {
            "policy_function": "serving.autoscaling_policy:PredictedLoadPolicy",
            "policy_kwargs": {
                **_ANY_NUMBER,
                "target_backlog_s": settings.target_backlog_s,
                "target_busy": settings.target_busy,
                "target_attainment": settings.target_attainment,
                "hysteresis": settings.hysteresis,
            },
        },
    }


def _is_on_gpu(config: PeregrineConfig) -> bool:
    if config.engine.device == "auto":
        # The document is written, and the application built, where there may be no GPU to look for.
        raise ConfigError("engine.device: must be cuda or cpu on a cluster, got 'auto'")
    return config.engine.device == "cuda"


def _available_cores() -> int:
    """Of this container: its limit is a share of time, which the scheduler's own mask does not show."""
    cores = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):
        quota, period = _CGROUP_CPU_LIMIT.read_text().split()
        if quota != "max":
            cores = min(cores, math.ceil(int(quota) / int(period)))
    return max(1, cores)


def _version_of(*configuration: object) -> str:
    return hashlib.sha256(repr((package_version(), configuration)).encode()).hexdigest()[:12]
