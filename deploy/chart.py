"""Parts of the chart that are made from elsewhere: `python -m deploy.chart` writes them, a test compares.

The schema of `config` comes from the configuration's own types, the table of values in docs/kubernetes.md
from values.yaml and its comments, dashboards and rules from `monitoring`.
"""

import json
import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter

from deploy.config import ClusterSettings
from engine import EngineConfig
from monitoring.alerts.render import text as alert_rules
from monitoring.dashboards import DASHBOARDS
from monitoring.dashboards.build import build
from serving import RoutingSettings, ServingSettings
from serving.telemetry.settings import LogSettings, TraceSettings
from serving.tenants.settings import TenantSettings

REPOSITORY = Path(__file__).parents[1]
CHART = REPOSITORY / "helm" / "peregrine"
SCHEMA = CHART / "values.schema.json"
# The template puts monitoring.prometheusRule.runbooks in its place.
RUNBOOKS = "docs/runbooks"
DOCUMENT = REPOSITORY / "docs" / "kubernetes.md"

SECTIONS: dict[str, Any] = {
    "engine": EngineConfig,
    "serving": ServingSettings,
    "routing": RoutingSettings,
    "cluster": ClusterSettings,
    "logs": LogSettings,
    "traces": TraceSettings,
    "tenants": TenantSettings,
}
# Not the chart's to set, and why.
LEFT_OUT = {
    "engine": {"block_size", "num_blocks"},  # one block size is supported; the other is for tests
    "serving": {"api_keys"},  # auth.existingSecret: a secret does not belong into values
    "routing": set[str](),
    "cluster": {"host", "start_timeout_s"},  # pods listen on every address; KubeRay waits
    "logs": set[str](),
    "traces": set[str](),
    "tenants": {"members", "file"},  # tenants.existingSecret: they change without a new cluster
}
_BEGIN, _END = "<!-- values: python -m deploy.chart -->", "<!-- /values -->"


def made() -> dict[Path, str]:
    """What each file should hold."""
    schema = json.loads(SCHEMA.read_text())
    schema["properties"]["config"] = config_schema()
    text = DOCUMENT.read_text()
    begin, end = text.index(_BEGIN) + len(_BEGIN), text.index(_END)
    dashboards = {
        CHART / "dashboards" / f"{spec.uid}.json": json.dumps(build(spec), indent=1) + "\n"
        for spec in DASHBOARDS
    }
    return {
        **dashboards,
        CHART / "rules" / "peregrine.yaml": alert_rules(RUNBOOKS),
        SCHEMA: json.dumps(schema, indent=1) + "\n",
        DOCUMENT: f"{text[:begin]}\n{values_table()}{text[end:]}",
    }


def left_over() -> list[Path]:
    """Files of dashboards that there are no more."""
    return sorted(set((CHART / "dashboards").glob("*.json")) - set(made()))


def field_names(kind: Any) -> list[str]:
    return list(TypeAdapter(kind).json_schema()["properties"])


def config_schema() -> dict[str, Any]:
    sections = {name: _section(name, kind) for name, kind in SECTIONS.items()}
    # A document, and an application, are made where there may be no GPU to look for.
    sections["engine"]["properties"]["device"] = {"enum": ["cuda", "cpu"]}
    # Those of the pod's other processes follow it, and the pod declares them.
    sections["serving"]["properties"]["metrics"]["properties"].pop("host")
    sections["serving"]["properties"]["metrics"]["properties"].pop("targets_dir")
    sections["engine"]["required"] = ["model", "device"]
    sections["serving"]["required"] = ["request_timeout_s"]
    sections["cluster"]["required"] = ["replicas", "port"]
    return {
        "type": "object",
        "additionalProperties": False,
        "required": ["engine", "serving", "cluster"],
        "properties": sections,
    }


def _section(name: str, kind: Any) -> dict[str, Any]:
    schema = TypeAdapter(kind).json_schema()
    definitions = schema.pop("$defs", {})
    schema["properties"] = {k: v for k, v in schema["properties"].items() if k not in LEFT_OUT[name]}
    schema["additionalProperties"] = False
    schema.pop("required", None)
    cleaned: dict[str, Any] = _inlined(schema, definitions)
    return cleaned


def _inlined(node: Any, definitions: dict[str, Any]) -> Any:
    """Without references, which Helm's users would have to follow, and without texts."""
    if isinstance(node, list):
        return [_inlined(item, definitions) for item in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        return _inlined(definitions[node["$ref"].rsplit("/", 1)[1]], definitions)
    # A key of that name may also be a property: those are mappings.
    return {
        key: _inlined(value, definitions)
        for key, value in node.items()
        if key not in ("title", "description", "default") or isinstance(value, dict)
    }


def values_table() -> str:
    """Markdown; a value's comment is what stands behind it on its line, and on lines of their own below."""
    lines = (CHART / "values.yaml").read_text().splitlines()
    rows = ["| value | default | |", "|---|---|---|"]
    root = yaml.compose("\n".join(lines))
    assert root is not None
    for key, node in _leaves(root):
        default = yaml.safe_load(yaml.serialize(node))
        shown = "" if default is None else json.dumps(default, separators=(", ", ": "))
        rows.append(f"| `{key}` | {f'`{shown}`' if shown else ''} | {_comment(lines, node)} |")
    return "\n".join(rows).replace("\\|", "|") + "\n"


def _leaves(node: yaml.Node, prefix: str = "") -> list[tuple[str, yaml.Node]]:
    if not isinstance(node, yaml.MappingNode) or node.flow_style or not node.value:
        return [(prefix, node)]
    found = []
    for key, value in node.value:
        found += _leaves(value, f"{prefix}.{key.value}" if prefix else key.value)
    return found


def _comment(lines: list[str], node: yaml.Node) -> str:
    number = node.start_mark.line
    if match := re.search(r"\s#\s(.*)$", lines[number]):
        parts = [match[1]]
        for line in lines[number + 1 :]:
            if not (more := re.match(r"\s{20,}#\s(.*)$", line)):
                break
            parts.append(more[1])
        return " ".join(parts)
    return ""


def main() -> None:
    for path, text in made().items():
        if not path.exists() or path.read_text() != text:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
            print(path.relative_to(REPOSITORY))
    for path in left_over():
        path.unlink()


if __name__ == "__main__":
    main()
