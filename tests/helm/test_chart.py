"""The chart by Helm's own engine, over every values file: valid, strict, and right in what matters."""

import json
import re
from pathlib import Path

import helm_python as helm
import jsonschema
import kubernetes_validate
import pytest
import yaml

from deploy import chart, ray_environment
from deploy.application import serve_config
from deploy.config import config_from
from monitoring.alerts.render import rules
from tests.helm import crd_schemas
from tests.helm.rendering import CHART, RELEASE, render, values_file

KUBERNETES = ("1.29", "1.34")
FILES = ["values-cpu.yaml", *sorted(p.name for p in (Path(__file__).parent / "values").iterdir())]
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


BASE = ["ConfigMap", "Pod", "RayService"]


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("everything-off.yaml", BASE),
        ("default.yaml", [*BASE, "NetworkPolicy", "PodDisruptionBudget", "ServiceAccount"]),
        ("values-cpu.yaml", [*BASE, "ServiceAccount"]),
        ("placement.yaml", [*BASE, "NetworkPolicy", "PodDisruptionBudget"]),
        (
            "everything-on.yaml",
            [*BASE, "ConfigMap", "HTTPRoute", "Ingress", "Job", "NetworkPolicy", "NetworkPolicy",
             "PersistentVolumeClaim", "PodDisruptionBudget", "PodMonitor", "PrometheusRule",
             "ServiceAccount"],
        ),
    ],
)  # fmt: skip
def test_what_is_off_is_not_rendered(name, kinds):
    assert render(values_file(name)).kinds == sorted(kinds)


@pytest.mark.parametrize(
    ("values", "kind", "number"),
    [
        ({"modelCache": {"enabled": True}}, "PersistentVolumeClaim", 1),
        ({"modelCache": {"enabled": True}}, "Job", 1),
        ({"modelCache": {"enabled": True, "existingClaim": "x"}}, "PersistentVolumeClaim", 0),
        ({"modelCache": {"enabled": True, "prefetch": {"enabled": False}}}, "Job", 0),
        ({"ingress": {"enabled": True, "host": "h"}}, "Ingress", 1),
        ({"httpRoute": {"enabled": True, "parentRefs": [{"name": "g"}]}}, "HTTPRoute", 1),
        ({"monitoring": {"podMonitor": {"enabled": True}}}, "PodMonitor", 1),
        ({"monitoring": {"serviceMonitor": {"enabled": True}}}, "ServiceMonitor", 1),
        ({"monitoring": {"prometheusRule": {"enabled": True}}}, "PrometheusRule", 1),
        ({"monitoring": {"dashboards": {"enabled": True}}}, "ConfigMap", 2),
        ({"podDisruptionBudget": {"enabled": False}}, "PodDisruptionBudget", 0),
        ({"networkPolicy": {"enabled": False}}, "NetworkPolicy", 0),
        ({"serviceAccount": {"create": False}}, "ServiceAccount", 0),
    ],
)
def test_each_option_adds_its_resource(values, kind, number):
    assert len(render(values).of(kind)) == number


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


@all_files
def test_streams_may_end(name):
    manifests = render(values_file(name))
    longest = config_of(manifests)["serving"]["request_timeout_s"]
    drain = ray_environment.drain_s(config_from(config_of(manifests)))
    assert drain > longest
    spec = manifests.one("RayService")["spec"]
    assert spec["rayClusterDeletionDelaySeconds"] > drain
    pods = pods_of(manifests)
    for kind in ("head", "worker"):
        assert pods[kind]["terminationGracePeriodSeconds"] > drain
    hook = worker_container(manifests)["lifecycle"]["preStop"]["exec"]["command"]
    assert drain < int(hook[-1]) < pods["worker"]["terminationGracePeriodSeconds"]
    assert spec["excludeHeadPodFromServeSvc"] is True


@all_files
def test_probes_are_three(name):
    manifests = render(values_file(name))
    worker = worker_container(manifests)
    ports = {p["name"]: p["containerPort"] for p in worker["ports"]}
    assert ports["serve"] == config_of(manifests)["cluster"]["port"]
    # /health answers 200 where a warm replica can be reached, and asks for no key.
    assert worker["readinessProbe"]["httpGet"] == {"path": "/health", "port": "serve"}
    assert worker["livenessProbe"]["httpGet"] == worker["startupProbe"]["httpGet"]
    assert worker["livenessProbe"]["httpGet"]["path"] == "/api/healthz"
    startup = worker["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 300
    for pod in ("head", "worker"):
        container = pods_of(manifests)[pod]["containers"][0]
        assert {"startupProbe", "readinessProbe", "livenessProbe"} <= set(container)


@all_files
def test_pods_are_confined(name):
    manifests = render(values_file(name))
    has_autoscaler = "autoscaling" in config_of(manifests)["cluster"]
    for kind, spec in pods_of(manifests).items():
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        # The autoscaler, which KubeRay puts beside the head, speaks to the API server.
        assert spec["automountServiceAccountToken"] is (kind == "head" and has_autoscaler)
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
        assert not any("hostPath" in volume for volume in spec["volumes"])
        contexts = [c["securityContext"] for c in containers_of(spec)]
        if kind == "head" and has_autoscaler:
            contexts.append(cluster_of(manifests)["autoscalerOptions"]["securityContext"])
        for context in contexts:
            assert context["readOnlyRootFilesystem"] is True
            assert context["allowPrivilegeEscalation"] is False
            assert context["capabilities"] == {"drop": ["ALL"]}
        for container in containers_of(spec):
            assert {"requests", "limits"} <= set(container["resources"])
            assert not container["image"].endswith(":latest")
            # What the entry point writes to is a volume.
            assert {"/tmp"} <= {m["mountPath"] for m in container["volumeMounts"]}


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


def test_ingress_lets_streams_through_and_the_api_alone():
    ingress = render(values_file("ingress.yaml")).one("Ingress")
    annotations = ingress["metadata"]["annotations"]
    assert annotations["nginx.ingress.kubernetes.io/proxy-buffering"] == "off"
    assert annotations["nginx.ingress.kubernetes.io/proxy-read-timeout"] == "121"
    assert annotations["nginx.ingress.kubernetes.io/proxy-body-size"] == "1m"  # the user's own wins
    (path,) = ingress["spec"]["rules"][0]["http"]["paths"]
    assert path["path"] == "/v1"
    assert path["backend"]["service"] == {"name": "pg-peregrine-serve-svc", "port": {"number": 8000}}
    route = render(values_file("http-route.yaml")).one("HTTPRoute")["spec"]
    assert route["rules"][0]["backendRefs"] == [{"name": "pg-peregrine-serve-svc", "port": 8000}]
    assert route["rules"][0]["timeouts"] == {"request": "630s"}


def test_the_network_is_closed_but_for_those_named():
    policy = render().of("NetworkPolicy")[0]["spec"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    ports = [{p["port"] for p in rule.get("ports", [])} for rule in policy["ingress"]]
    assert ports == [set(), {8000}, {8080, 9464, 9465, 9466}, {8265, 52365, 8000}]
    assert all(rule["from"] for rule in policy["ingress"])
    assert {p["port"] for rule in policy["egress"] for p in rule.get("ports", [])} == {53, 443}
    closed = render(values_file("model-cache.yaml")).of("NetworkPolicy")
    by_name = {d["metadata"]["name"]: d["spec"] for d in closed}
    assert {p["port"] for r in by_name["pg-peregrine"]["egress"] for p in r.get("ports", [])} == {53}
    assert by_name["pg-peregrine-prefetch"]["egress"] == [{"ports": [{"port": 443, "protocol": "TCP"}]}]


def test_metrics_of_every_process_are_scraped():
    manifests = render(values_file("pod-monitor.yaml"))
    assert config_of(manifests)["serving"]["metrics"]["host"] == "0.0.0.0"
    scraped = {e["port"] for e in manifests.one("PodMonitor")["spec"]["podMetricsEndpoints"]}
    pods = pods_of(manifests)
    for kind, own in (("worker", {9464, 9465, 9466}), ("head", {9464, 9465})):
        ports = {p["name"]: p["containerPort"] for p in pods[kind]["containers"][0]["ports"]}
        # A replica and two routers on a worker, two routers on the head, and Ray's agent.
        assert {ports[name] for name in scraped & set(ports)} == own | {8080}, kind
    quiet = render({"config": {"routing": {"policy": "none"}}})
    names = {p["name"] for p in worker_container(quiet)["ports"]}
    assert names == {"serve", "metrics", "peregrine-0"}


def test_rules_are_those_of_monitoring_with_links_of_ones_own():
    values = {
        "monitoring": {"prometheusRule": {"enabled": True, "runbooks": "https://wiki.example/runbooks/"}}
    }
    groups = render(values).one("PrometheusRule")["spec"]["groups"]
    assert groups == rules("https://wiki.example/runbooks")["groups"]
    links = [r["annotations"]["runbook_url"] for g in groups for r in g["rules"] if "alert" in r]
    assert links
    assert all(link.startswith("https://wiki.example/runbooks/Peregrine") for link in links)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"replicas": 2}, "replicas"),
        ({"config": {"engine": {"modle": "x"}}}, "modle"),
        ({"config": {"serving": {"api_keys": ["plain"]}}}, "api_keys"),
        ({"config": {"engine": {"device": "auto"}}}, "device"),
        ({"config": {"cluster": {"host": "0.0.0.0"}}}, "host"),
        ({"config": {"cluster": {"autoscaling": {"min_replicas": 1}}}}, "max_replicas"),
        ({"config": {"serving": {"tiers": {"x": {"ttft_s": 1, "priority": 1, "speed": 3}}}}}, "speed"),
        ({"image": {"tag": "latest"}}, "tag"),
        ({"worker": {"gpu": {"count": 2}}}, "count"),
        ({"worker": {"resources": {"limit": {}}}}, "limit"),
        ({"security": {"runAsUser": 0}}, "runAsUser"),
        ({"upgrade": {"strategy": "Recreate"}}, "strategy"),
        ({"monitoring": {"podMonitor": {"enable": True}}}, "enable"),
        ({"modelCache": {"quantize": {"bits": 1}}}, "bits"),
    ],
)
def test_a_wrong_value_is_refused_by_its_name(values, message):
    with pytest.raises(helm.HelmError, match=message):
        render(values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ingress": {"enabled": True}}, "ingress.host"),
        ({"httpRoute": {"enabled": True}}, "httpRoute.parentRefs"),
        ({"upgrade": {"strategy": "NewClusterWithIncrementalUpgrade"}}, "autoscaling"),
        (
            {"upgrade": {"strategy": "NewClusterWithIncrementalUpgrade"},
             "config": {"cluster": {"autoscaling": {"max_replicas": 2}}}},
            "gatewayClassName",
        ),
        ({"modelCache": {"quantize": {"bits": 4}}}, "modelCache.enabled"),
        ({**STEPS, "ingress": {"enabled": True, "host": "h"}}, "ingress.enabled"),
        ({**STEPS, "httpRoute": {"enabled": True, "parentRefs": [{"name": "g"}]}}, "httpRoute.enabled"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(values, message):
    with pytest.raises(helm.HelmError, match=re.escape(message)):
        render(values)


def test_by_steps_there_is_no_service_of_the_releases_name():
    assert render(STEPS).of("Pod") == []
    assert "pg-peregrine-serve-svc" not in render(STEPS).notes
    test = render({**STEPS, "test": {"url": "http://gateway.llm"}}).one("Pod")
    assert "http://gateway.llm" in test["spec"]["containers"][0]["args"]


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
