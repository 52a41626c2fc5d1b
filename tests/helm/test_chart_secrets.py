"""Keys, tokens and tenants: by reference to secrets alone, and only for those who need them."""

import json
import re

import yaml

from tests.helm.manifests import all_files, cluster_of, config_of, containers_of, pods_of
from tests.helm.rendering import render, values_file


@all_files
def test_no_secret_stands_in_plain_text(name):
    values = values_file(name)
    manifests = render(values)
    assert "Secret" not in manifests.kinds
    for spec in pods_of(manifests).values():
        for container in containers_of(spec):
            for variable in container.get("env", []):
                if re.search(r"KEY|TOKEN|PASSWORD|SECRET|HEADERS", variable["name"]):
                    assert "value" not in variable
                    assert "secretKeyRef" in variable["valueFrom"]
    assert "api_keys" not in json.dumps(manifests.all)


def test_tenants_come_by_a_volume_that_follows_their_secret():
    manifests = render(values_file("secrets.yaml"))
    file = "/etc/peregrine-tenants/members.yaml"
    assert config_of(manifests)["tenants"] == {"file": file}
    document = yaml.safe_load(manifests.one("RayService")["spec"]["serveConfigV2"])
    assert document["applications"][0]["args"]["tenants"] == {"file": file}
    for kind in ("head", "worker"):  # the ledger may run on either
        spec = pods_of(manifests)[kind]
        assert {"name": "tenants", "secret": {"secretName": "peregrine-tenants"}} in spec["volumes"]
        mount = {"name": "tenants", "mountPath": "/etc/peregrine-tenants", "readOnly": True}
        assert mount in spec["containers"][0]["volumeMounts"]
    assert "tenants" not in json.dumps(render().all)


def test_secrets_go_to_those_who_need_them():
    pods = pods_of(render(values_file("everything-on.yaml")))
    names = {
        kind: {v["name"] for c in containers_of(spec) for v in c.get("env", []) if "valueFrom" in v}
        for kind, spec in pods.items()
    }
    assert names == {
        "head": {"PEREGRINE_API_KEY"},
        "worker": {"PEREGRINE_API_KEY"},
        "job": {"HF_TOKEN"},
        "test": {"PEREGRINE_API_KEY"},
    }
    without_job = pods_of(render(values_file("secrets.yaml")))
    reference = next(
        v for v in without_job["worker"]["containers"][0]["env"] if v["name"] == "PEREGRINE_API_KEY"
    )
    assert reference["valueFrom"]["secretKeyRef"] == {"name": "peregrine-keys", "key": "tokens"}
    names = {v["name"] for v in without_job["worker"]["containers"][0]["env"]}
    assert {"HF_TOKEN", "OTEL_EXPORTER_OTLP_HEADERS"} <= names
    redis = cluster_of(render(values_file("secrets.yaml")))["gcsFaultToleranceOptions"]
    assert redis["redisPassword"]["valueFrom"]["secretKeyRef"] == {"name": "redis", "key": "pass"}
