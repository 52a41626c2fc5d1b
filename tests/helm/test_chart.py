"""The chart by Helm's own engine: valid manifests, every setting, one GPU a replica, notes, current files."""

import json
import re

import helm_python as helm
import jsonschema
import kubernetes_validate
import pytest
import yaml

from deploy import chart
from deploy.application import serve_config
from deploy.config import config_from
from tests.helm import crd_schemas
from tests.helm.manifests import (
    KUBERNETES,
    all_files,
    cluster_of,
    config_of,
    containers_of,
    pods_of,
    worker_container,
)
from tests.helm.rendering import CHART, FILES, RELEASE, render, values_file


def test_there_are_enough_values_files():
    assert len(FILES) >= 12


@all_files
def test_helm_finds_nothing_to_complain_of(name):
    report = helm.lint(str(CHART), values_file(name), strict=True)
    assert report["errors"] == []
    assert [m["error"] for m in report["messages"]] == ["icon is recommended"]


@all_files
def test_every_manifest_is_valid(name):
    manifests = render(values_file(name))
    for document in manifests.all:
        if crd_schemas.is_known(document):
            crd_schemas.validate(document)
        else:
            for version in KUBERNETES:
                kubernetes_validate.validate(document, version, strict=True)
    # Pods inside the RayService, whose own schema knows no cross-checks.
    for spec in pods_of(manifests).values():
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": spec}
        for version in KUBERNETES:
            kubernetes_validate.validate(pod, version, strict=True)


def test_the_schemas_refuse_what_an_api_server_would_drop():
    service = render().one("RayService")
    service["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["restartPolices"] = "Never"
    with pytest.raises(jsonschema.ValidationError, match="restartPolices"):
        crd_schemas.validate(service)


@all_files
def test_one_resource_a_template_and_labels_on_all(name):
    manifests = render(values_file(name))
    for template, documents in manifests.by_template.items():
        assert len(documents) == 1, template
    for document in manifests.all:
        labels = document["metadata"]["labels"]
        assert labels["app.kubernetes.io/instance"] == RELEASE
        assert labels["app.kubernetes.io/managed-by"] == "Helm"
    names = [(d["kind"], d["metadata"]["name"]) for d in manifests.all]
    assert len(set(names)) == len(names)
    assert all(len(name) <= 63 for _, name in names)


@all_files
def test_the_serve_config_is_that_of_the_same_file(name):
    manifests = render(values_file(name))
    config = config_of(manifests)
    document = yaml.safe_load(manifests.one("RayService")["spec"]["serveConfigV2"])
    assert document == serve_config(config_from(config), config)


def test_every_setting_can_be_reached_and_arrives():
    given = values_file("every-setting.yaml")["config"]
    for section, kind in chart.SECTIONS.items():
        names = set(chart.field_names(kind))
        assert set(given[section]) == names - chart.LEFT_OUT[section], section
    config = config_of(render({"config": given}))
    config["serving"]["metrics"].pop("host")
    assert config == given


@all_files
def test_one_gpu_a_replica_and_one_replica_a_worker(name):
    manifests = render(values_file(name))
    (group,) = cluster_of(manifests)["workerGroupSpecs"]
    config = config_of(manifests)
    is_on_gpu = config["engine"]["device"] == "cuda"
    resource = {"placement.yaml": "nvidia.com/mig-7g.80gb"}.get(name, "nvidia.com/gpu")
    for part in ("limits", "requests"):
        assert worker_container(manifests)["resources"][part].get(resource) == (1 if is_on_gpu else None)
    assert group["rayStartParams"]["num-gpus"] == ("1" if is_on_gpu else "0")
    assert cluster_of(manifests)["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for kind, spec in pods_of(manifests).items():
        if kind != "worker":
            assert "nvidia" not in json.dumps([c["resources"] for c in containers_of(spec)])
    scaling = config["cluster"].get("autoscaling")
    bounds = (scaling.get("min_replicas", 1), scaling["max_replicas"]) if scaling else None
    replicas = config["cluster"]["replicas"]
    assert (group["minReplicas"], group["maxReplicas"]) == (bounds or (replicas, replicas))
    assert cluster_of(manifests).get("enableInTreeAutoscaling", False) is bool(scaling)
    assert "HorizontalPodAutoscaler" not in manifests.kinds


@all_files
def test_the_notes_hold_a_curl_that_asks_for_the_model(name):
    manifests = render(values_file(name))
    engine = config_of(manifests)["engine"]
    (body,) = re.findall(r"-d '(.*)'$", manifests.notes, re.M)
    served = engine.get("served_model_name") or engine["model"].rsplit("/", 1)[-1].removesuffix(".gguf")
    assert json.loads(body)["model"] == served
    has_keys = bool(values_file(name).get("auth", {}).get("existingSecret"))
    assert ("Authorization" in manifests.notes) is has_keys
    assert ("no authentication" in manifests.notes) is not has_keys


def test_made_files_are_current():
    stale = [
        str(path) for path, text in chart.made().items() if not path.exists() or path.read_text() != text
    ]
    assert stale == [], "run: python -m deploy.chart"
    assert chart.left_over() == []


def test_dashboards_arrive_as_they_are():
    (dashboards,) = render(values_file("pod-monitor.yaml")).by_template["dashboards-configmap.yaml"]
    files = {path.name: json.loads(path.read_text()) for path in (CHART / "dashboards").iterdir()}
    assert len(files) >= 4
    assert {name: json.loads(text) for name, text in dashboards["data"].items()} == files
    assert dashboards["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert dashboards["metadata"]["annotations"]["grafana_folder"] == "LLM"
    assert len(json.dumps(dashboards)) < 2**20  # what Kubernetes takes in one ConfigMap


def test_every_value_is_explained_or_plain():
    """In the table each section has its words; the schema knows every value and no other."""
    schema = json.loads((CHART / "values.schema.json").read_text())
    defaults = yaml.safe_load((CHART / "values.yaml").read_text())
    assert set(schema["properties"]) - {"global"} == set(defaults)

    def closed(node: dict, path: str) -> None:
        if "properties" in node:
            assert node.get("additionalProperties") is False, path
            for key, value in node["properties"].items():
                closed(value, f"{path}.{key}")

    closed(schema, "")
