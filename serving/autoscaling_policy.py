"""`desired_replicas` as Ray Serve's autoscaling policy.

Ray adds the delays and the bounds of its own configuration. It pickles this module by value into the
controller, which imports the rest from the installed package.
"""

from typing import Any

from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

from serving.autoscaling import AutoscalingSettings, ReplicaLoad, desired_replicas

# How `Replica.record_autoscaling_stats` calls them.
METRICS = ("backlog_s", "busy", "num_kept", "num_deadlines")


class PredictedLoadPolicy:
    """Built in the controller from the keyword arguments of `AutoscalingSettings`."""

    def __init__(self, **settings: Any) -> None:
        self._settings = AutoscalingSettings(**settings)

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        metrics = context.aggregated_metrics or {}
        reporting = metrics.get(METRICS[0], {})
        loads = [
            ReplicaLoad(**{name: float(metrics.get(name, {}).get(replica, 0.0)) for name in METRICS})
            for replica in reporting
        ]
        return desired_replicas(context.target_num_replicas, loads, self._settings), {}


def autoscaling_config(settings: AutoscalingSettings, initial_replicas: int) -> AutoscalingConfig:
    """What the deployment is to be given."""
    return AutoscalingConfig(
        min_replicas=settings.min_replicas,
        initial_replicas=min(max(initial_replicas, settings.min_replicas), settings.max_replicas),
        max_replicas=settings.max_replicas,
        metrics_interval_s=1.0,
        look_back_period_s=settings.look_back_s,
        upscale_delay_s=settings.upscale_delay_s,
        downscale_delay_s=settings.downscale_delay_s,
        policy=AutoscalingPolicy(policy_function=PredictedLoadPolicy, policy_kwargs=settings.model_dump()),
    )
