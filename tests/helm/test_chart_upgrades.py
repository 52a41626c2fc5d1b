"""Upgrades: what changes in place, what comes as a new cluster or job, what keeps its name, the way back."""

import json

import yaml

from tests.helm.manifests import STEPS, all_files, cluster_of
from tests.helm.rendering import RELEASE, render, values_file


@all_files
def test_what_selects_never_changes(name):
    """Selectors and pods carry the release's identity alone: no version, no chart, no value."""
    manifests = render(values_file(name))
    identity = {"app.kubernetes.io/part-of": "peregrine", "app.kubernetes.io/instance": RELEASE}
    selectors = [d["spec"]["selector"]["matchLabels"] for d in manifests.of("PodDisruptionBudget")]
    selectors += [d["spec"]["podSelector"]["matchLabels"] for d in manifests.of("NetworkPolicy")]
    selectors += [d["spec"]["selector"]["matchLabels"] for d in manifests.of("PodMonitor")]
    cluster = cluster_of(manifests)
    # KubeRay's service for the head selects app.kubernetes.io/name: kuberay, so that it must not be there.
    selectors += [
        g["template"]["metadata"]["labels"] for g in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])
    ]
    for labels in selectors:
        assert {k: v for k, v in labels.items() if k != "app.kubernetes.io/component"} == identity


def cluster_hash(values: dict) -> str:
    """What KubeRay compares, to decide on a new cluster: all but the numbers of workers."""
    cluster = json.loads(json.dumps(cluster_of(render(values))))
    for group in cluster["workerGroupSpecs"]:
        for key in ("replicas", "minReplicas", "maxReplicas"):
            group.pop(key)
    return json.dumps(cluster, sort_keys=True)


def test_scaling_changes_in_place_and_all_else_comes_as_a_new_cluster():
    fixed = {"config": {"cluster": {"replicas": 2}}}
    assert cluster_hash(fixed) == cluster_hash({"config": {"cluster": {"replicas": 5}}})
    scaled = {"config": {"cluster": {"autoscaling": {"min_replicas": 1, "max_replicas": 4}}}}
    wider = {"config": {"cluster": {"autoscaling": {"min_replicas": 2, "max_replicas": 9}}}}
    assert cluster_hash(scaled) == cluster_hash(wider)
    # Serve replaces all replicas for new arguments, and for a new policy.
    documents = [
        yaml.safe_load(render(v).one("RayService")["spec"]["serveConfigV2"]) for v in (scaled, wider)
    ]
    applications = [d["applications"][0] for d in documents]
    assert applications[0]["args"] == applications[1]["args"]
    policies = [a["deployments"][0]["autoscaling_config"].pop("policy") for a in applications]
    assert policies[0] == policies[1]
    for change in (
        {"config": {"engine": {"model": "org/other"}}},
        {"config": {"serving": {"tiers": {"voice": {"ttft_s": 0.1, "priority": 0}}}}},
        {"config": {"routing": {"max_request_bytes": 65536}}},
        {"image": {"tag": "0.2.0"}},
        {"podAnnotations": {"keys": "rotated"}},
    ):
        assert cluster_hash(change) != cluster_hash({}), change


def test_an_upgrade_renders_the_same_and_a_roll_back_is_the_same_again():
    before = render(values_file("everything-on.yaml")).all
    assert render(values_file("everything-on.yaml"), is_upgrade=True).all == before


def test_a_job_that_would_change_has_another_name():
    def name(**more):
        return render({"modelCache": {"enabled": True}, **more}).one("Job")["metadata"]["name"]

    assert name() == name()
    assert name() != name(image={"tag": "0.2.0"})
    assert name() != name(config={"engine": {"model": "org/other"}})
    assert name() != name(modelCache={"enabled": True, "prefetch": {"timeoutSeconds": 60}})
    # Of what does not concern it nothing is in its name.
    assert name() == name(config={"cluster": {"replicas": 9}})


def test_by_steps_there_is_no_service_of_the_releases_name():
    assert render(STEPS).of("Pod") == []
    assert "pg-peregrine-serve-svc" not in render(STEPS).notes
    test = render({**STEPS, "test": {"url": "http://gateway.llm"}}).one("Pod")
    assert "http://gateway.llm" in test["spec"]["containers"][0]["args"]
