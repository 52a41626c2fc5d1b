"""Schemas of the custom resources that the chart makes, reduced from their projects' definitions.

`python -m tests.helm.crd_schemas FILE.yaml ...` writes them to crds/, which says where they come from.
"""

import functools
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jsonschema
import yaml

DIRECTORY = Path(__file__).parent / "crds"


def validate(manifest: dict[str, Any]) -> None:
    """Raises jsonschema.ValidationError, also for fields that an API server would drop."""
    _validators()[manifest["apiVersion"], manifest["kind"]].validate(manifest)


def is_known(manifest: dict[str, Any]) -> bool:
    return (manifest["apiVersion"], manifest["kind"]) in _validators()


@functools.cache
def _validators() -> dict[tuple[str, str], jsonschema.Draft202012Validator]:
    found = (json.loads(path.read_text()) for path in DIRECTORY.glob("*.json"))
    return {
        (entry["apiVersion"], entry["kind"]): jsonschema.Draft202012Validator(_strict(entry["schema"]))
        for entry in found
    }


def _strict(node: Any) -> Any:
    """Kubernetes drops what a schema does not name: here it is an error, as with `kubectl --validate`."""
    if isinstance(node, list):
        return [_strict(item) for item in node]
    if not isinstance(node, dict):
        return node
    strict = {key: _strict(value) for key, value in node.items()}
    if isinstance(node.get("properties"), Mapping) and node.get("type") == "object":
        is_open = node.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in node
        if not is_open:
            strict["additionalProperties"] = False
    if node.get("x-kubernetes-int-or-string"):
        strict.pop("type", None)
    if isinstance(node.get("pattern"), str):  # Go allows flags behind the first character
        strict["pattern"] = re.sub(r"^\^\(\?i\)", "(?i)^", node["pattern"])
    return strict


def _without_texts(node: Any) -> Any:
    if isinstance(node, list):
        return [_without_texts(item) for item in node]
    if not isinstance(node, dict):
        return node
    return {
        key: _without_texts(value)
        for key, value in node.items()
        if not (key in ("description", "title", "example") and isinstance(value, str))
    }


def main(paths: list[str]) -> None:
    for path in map(Path, paths):
        definition = yaml.safe_load(path.read_text())
        spec = definition["spec"]
        version = next(v for v in spec["versions"] if v["name"] == "v1")
        entry = {
            "apiVersion": f"{spec['group']}/v1",
            "kind": spec["names"]["kind"],
            "annotations": definition["metadata"].get("annotations"),
            "schema": _without_texts(version["schema"]["openAPIV3Schema"]),
        }
        text = json.dumps(entry, separators=(",", ":"), sort_keys=True)
        (DIRECTORY / f"{spec['names']['plural']}.{spec['group']}.json").write_text(text + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
