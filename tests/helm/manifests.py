"""What the tests of the chart share: to go over every values file, and parts of the manifests by name."""

import pytest
import yaml

from tests.helm.rendering import FILES

KUBERNETES = ("1.29", "1.34")
STEPS = {
    "upgrade": {"strategy": "NewClusterWithIncrementalUpgrade", "gatewayClassName": "istio"},
    "config": {"cluster": {"autoscaling": {"max_replicas": 2}}},
}
all_files = pytest.mark.parametrize("name", FILES)


def config_of(manifests) -> dict:
    return yaml.safe_load(manifests.one("ConfigMap")["data"]["peregrine.yaml"])


def cluster_of(manifests) -> dict:
    return manifests.one("RayService")["spec"]["rayClusterConfig"]


def pods_of(manifests) -> dict[str, dict]:
    """Every pod's spec, by what it is."""
    cluster = cluster_of(manifests)
    specs = {"head": cluster["headGroupSpec"]["template"]["spec"]}
    specs["worker"] = cluster["workerGroupSpecs"][0]["template"]["spec"]
    for job in manifests.of("Job"):
        specs["job"] = job["spec"]["template"]["spec"]
    specs |= {"test": pod["spec"] for pod in manifests.of("Pod")}  # noqa: B035  # at most one
    return specs


def containers_of(spec: dict) -> list[dict]:
    return [*spec.get("initContainers", []), *spec["containers"]]


def worker_container(manifests) -> dict:
    return pods_of(manifests)["worker"]["containers"][0]
