"""What each option renders, that what is off is not rendered, and that wrong values are refused."""

import re

import helm_python as helm
import pytest

from tests.helm.manifests import STEPS
from tests.helm.rendering import render, values_file

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
