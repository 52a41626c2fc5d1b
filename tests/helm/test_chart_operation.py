"""A release in operation: ends of streams, probes, confined pods, the network, ingress, metrics, rules."""

from deploy import ray_environment
from deploy.config import config_from
from monitoring.alerts.render import rules
from tests.helm.manifests import all_files, cluster_of, config_of, containers_of, pods_of, worker_container
from tests.helm.rendering import render, values_file


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
