"""The files for machines without Kubernetes: compose, provisioning, Ray's launcher."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from deploy import application
from deploy.application import serve_config
from deploy.config import ConfigError, load_config, read_sections
from deploy.ray_environment import of_node

REPOSITORY = Path(__file__).parents[2]
COMPOSE = REPOSITORY / "deploy" / "compose"


def compose() -> dict:
    return yaml.safe_load((COMPOSE / "compose.yaml").read_text())


@pytest.mark.parametrize("name", ["compose.yaml", "compose.gpu.yaml"])
def test_compose_files_are_valid(name):
    # compose-spec/compose-spec, schema/compose-spec.json of 2026-06-23 (Apache-2.0), no descriptions.
    schema = json.loads((Path(__file__).parent / "compose-spec.json").read_text())
    jsonschema.Draft202012Validator(schema).validate(yaml.safe_load((COMPOSE / name).read_text()))


def test_services_are_pinned_confined_and_on_loopback():
    for name, service in compose()["services"].items():
        assert re.search(r":\S*\d", service["image"]), name
        assert "latest" not in service["image"]
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))


def test_what_is_mounted_exists_and_no_password_is_written_down():
    for service in compose()["services"].values():
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert (COMPOSE / source).exists() if source.startswith(".") else source in compose()["volumes"]
        for key, value in service.get("environment", {}).items():
            if re.search("KEY|TOKEN|PASSWORD", key):
                assert value.startswith("${"), key


def test_streams_may_end_before_the_container_is_killed():
    config = load_config(COMPOSE / "peregrine.yaml")
    assert compose()["services"]["peregrine"]["stop_grace_period"] == "11m"
    assert config.serving.request_timeout_s + 30 < 11 * 60


def test_prometheus_finds_what_the_replicas_announce():
    config = load_config(COMPOSE / "peregrine.yaml")
    text = (COMPOSE / "prometheus.yml").read_text()
    (job,) = yaml.safe_load(text)["scrape_configs"]
    assert job["file_sd_configs"][0]["files"] == [f"{config.serving.metrics.targets_dir}/*.json"]
    prometheus = compose()["services"]["prometheus"]
    # Their addresses are loopback's.
    assert config.serving.metrics.host == "127.0.0.1"
    assert prometheus["network_mode"] == "service:peregrine"


@pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool (Debian's prometheus) is not installed"
)
def test_promtool_takes_the_configuration(tmp_path):
    text = (COMPOSE / "prometheus.yml").read_text()
    rules = REPOSITORY / "helm" / "peregrine" / "rules"
    (tmp_path / "prometheus.yml").write_text(text.replace("/etc/prometheus/rules", str(rules)))
    done = subprocess.run(
        ["promtool", "check", "config", str(tmp_path / "prometheus.yml")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "rules found" in done.stdout


def test_grafana_is_given_the_source_and_the_dashboards():
    (source,) = yaml.safe_load((COMPOSE / "grafana" / "datasources.yaml").read_text())["datasources"]
    assert source["url"] == "http://peregrine:9090"
    grafana = compose()["services"]["grafana"]
    (provider,) = yaml.safe_load((COMPOSE / "grafana" / "dashboards.yaml").read_text())["providers"]
    mounts = {v.split(":")[1]: v.split(":")[0] for v in grafana["volumes"]}
    home = Path(grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert str(home.parent) == provider["options"]["path"]
    assert (COMPOSE / mounts[str(home.parent)] / home.name).exists()


def test_rays_launcher_takes_the_cluster_file():
    config = yaml.safe_load((REPOSITORY / "deploy" / "ray-cluster.yaml").read_text())
    validate_config(prepare_config(config))
    for commands in (config["head_start_ray_commands"], config["worker_start_ray_commands"]):
        assert "peregrine node --config /etc/peregrine/peregrine.yaml" in commands[-1]


def test_a_clusters_document_and_environment_come_from_the_one_file(tmp_path):
    path = tmp_path / "peregrine.yaml"
    path.write_text(
        "engine: {model: org/model, device: cuda}\n"
        "serving: {request_timeout_s: 60}\n"
        "routing: {max_request_bytes: 65536}\n"
        "cluster: {replicas: 3, haproxy: 'on'}\n"
    )
    sections = read_sections(path)
    document = serve_config(load_config(path), sections)
    (application,) = document["applications"]
    assert application["args"]["engine"] == sections["engine"]
    assert "replicas" not in json.dumps(application["args"])
    replica, router = application["deployments"]
    assert replica == {"name": "Replica", "num_replicas": 3, "max_surge_percent": 100}
    assert router["user_config"] == {"target_replicas": 3}
    environment = of_node(load_config(path))
    assert environment["RAY_SERVE_HAPROXY_INGRESS_REQUEST_ROUTER_BUFSIZE"] == "65536"
    assert environment["RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"] == "90"
    # Who starts the nodes decides on these.
    assert not {"RAY_AUTH_MODE", "RAY_ADDRESS", "RAY_TMPDIR"} & set(environment)


def test_a_containers_share_of_the_processor_is_its_cores(tmp_path, monkeypatch):
    limit = tmp_path / "cpu.max"
    monkeypatch.setattr(application, "_CGROUP_CPU_LIMIT", limit)
    monkeypatch.setattr(application.os, "sched_getaffinity", lambda pid: set(range(8)))
    for text, cores in (("max 100000", 8), ("250000 100000", 3), ("50000 100000", 1), ("1600000 100000", 8)):
        limit.write_text(text + "\n")
        assert application._available_cores() == cores
    limit.unlink()
    assert application._available_cores() == 8


def test_an_open_device_and_an_unknown_key_are_refused(tmp_path):
    path = tmp_path / "peregrine.yaml"
    path.write_text("engine: {device: auto}\n")
    with pytest.raises(ConfigError, match="must be cuda or cpu on a cluster"):
        serve_config(load_config(path), {})
    with pytest.raises(ConfigError, match=r"engine\.modle: unknown key"):
        application.application({"engine": {"modle": "x"}})
