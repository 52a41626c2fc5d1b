"""The chart, rendered by Helm's own engine."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import helm_python as helm
import yaml

CHART = Path(__file__).parents[2] / "helm" / "peregrine"
RELEASE, NAMESPACE = "pg", "llm"
FILES = ["values-cpu.yaml", *sorted(p.name for p in (Path(__file__).parent / "values").iterdir())]


@dataclass(frozen=True)
class Manifests:
    """by_template: documents by the template's name below templates/."""

    by_template: dict[str, list[dict[str, Any]]]
    notes: str

    @property
    def all(self) -> list[dict[str, Any]]:
        return [document for documents in self.by_template.values() for document in documents]

    @property
    def kinds(self) -> list[str]:
        return sorted(document["kind"] for document in self.all)

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [document for document in self.all if document["kind"] == kind]

    def one(self, kind: str) -> dict[str, Any]:
        (document,) = [d for d in self.of(kind) if not d["metadata"]["name"].endswith("-dashboards")]
        return document


def values_file(name: str) -> dict[str, Any]:
    """Beside the chart, or of the tests."""
    path = next(p for p in (CHART / name, Path(__file__).parent / "values" / name) if p.exists())
    return yaml.safe_load(path.read_text()) or {}


@functools.cache
def _chart() -> helm.Chart:
    return helm.Chart.load(str(CHART))


def render(values: dict[str, Any] | None = None, *, is_upgrade: bool = False) -> Manifests:
    """Checks the values against the schema as Helm does. Raises helm.HelmError."""
    _chart().validate_schema(_chart().merge_values(values or {}))
    texts = _chart().render(values or {}, name=RELEASE, namespace=NAMESPACE, is_upgrade=is_upgrade)
    found: dict[str, list[dict[str, Any]]] = {}
    for path, text in texts.items():
        if path.endswith("NOTES.txt"):
            continue
        documents = [d for d in yaml.safe_load_all(text) if d]
        if documents:
            found[path.split("/templates/")[1]] = documents
    notes = next((text for path, text in texts.items() if path.endswith("NOTES.txt")), "")
    return Manifests(found, notes)
