"""The model of a release: fetched or made by a job, waited for, or found on an existing claim."""

from tests.helm.manifests import config_of, pods_of, worker_container
from tests.helm.rendering import render, values_file


def test_the_model_is_fetched_once_and_waited_for():
    manifests = render(values_file("model-cache.yaml"))
    job = manifests.one("Job")["spec"]["template"]["spec"]["containers"][0]
    (wait,) = pods_of(manifests)["worker"]["initContainers"]
    assert job["args"][:2] == ["prefetch", wait["args"][1]]
    assert job["args"][2:] == ["Qwen/Qwen2.5-7B-Instruct"]
    assert wait["args"][0] == "wait-for"
    assert {"name": "HF_HUB_OFFLINE", "value": "1"} in worker_container(manifests)["env"]
    claim = manifests.one("PersistentVolumeClaim")
    assert "annotations" not in claim["metadata"]
    for spec in (pods_of(manifests)["worker"], pods_of(manifests)["job"]):
        volume = next(v for v in spec["volumes"] if v["name"] == "cache")
        assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    kept = render({"modelCache": {"enabled": True}}).one("PersistentVolumeClaim")
    assert kept["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}


def test_bits_are_made_by_the_job_and_served_under_the_models_name():
    manifests = render(values_file("quantized.yaml"))
    arguments = manifests.one("Job")["spec"]["template"]["spec"]["containers"][0]["args"]
    out = arguments[arguments.index("--out") + 1]
    assert arguments[arguments.index("--bits") :] == ["--bits", "3.5", "--trials", "2"]
    engine = config_of(manifests)["engine"]
    assert engine["model"] == out
    assert engine["served_model_name"] == "Llama-3.1-8B-Instruct"
    assert out.startswith("/cache/")


def test_a_path_on_an_existing_claim_needs_no_job():
    manifests = render(values_file("existing-claim.yaml"))
    assert "initContainers" not in pods_of(manifests)["worker"]
    volume = next(v for v in pods_of(manifests)["worker"]["volumes"] if v["name"] == "cache")
    assert volume["persistentVolumeClaim"]["claimName"] == "models"
