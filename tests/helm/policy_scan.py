"""Checkov over everything the chart makes, and over the image's Dockerfile: `make scan`.

It knows no RayService, so the pods inside are given to it as pods. Its dependencies pin much, hence an
environment of its own; severities are a paid service's, so that any check that fails counts unless it is in
ACCEPTED, with the reason.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from tests.helm.rendering import FILES, NAMESPACE, render, values_file

REPOSITORY = Path(__file__).parents[2]
ACCEPTED = {
    "CKV_DOCKER_7": "every base comes by an ARG with a version, or is a stage of the same file",
    "CKV_K8S_43": "image.digest is there for it; the default is a version, as no registry is known",
    "CKV_K8S_15": "IfNotPresent, for versions that do not change: kind has no registry to pull from",
    "CKV_K8S_35": "keys and tokens as environment variables, which Ray's processes hand on to replicas",
    "CKV_K8S_38": "the head's token where KubeRay's autoscaler runs beside it, and nowhere else",
    "CKV_K8S_11": "a limit of processor time would throttle a step in its middle; requests are set",
    "CKV_K8S_8": "jobs and tests end by themselves; nodes have all three probes",
    "CKV_K8S_9": "jobs and tests end by themselves; nodes have all three probes",
}


def documents(values: dict[str, Any]) -> list[dict[str, Any]]:
    manifests = render(values)
    found = []
    for document in manifests.all:
        document.setdefault("metadata", {}).setdefault("namespace", NAMESPACE)
        found.append(document)
        if document["kind"] == "RayService":
            cluster = document["spec"]["rayClusterConfig"]
            for name, group in (
                ("head", cluster["headGroupSpec"]),
                ("worker", cluster["workerGroupSpecs"][0]),
            ):
                metadata = {**group["template"]["metadata"], "name": name, "namespace": NAMESPACE}
                pod = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata}
                found.append({**pod, "spec": group["template"]["spec"]})
    return found


def run(checkov: str, names: list[str]) -> list[str]:
    """Each failed check that is not accepted, in a line."""
    with tempfile.TemporaryDirectory() as directory:
        for name in names:
            text = yaml.safe_dump_all(documents(values_file(name)))
            (Path(directory) / name).write_text(text)
        failed = _scan(checkov, directory, "kubernetes")
    failed += _scan(checkov, str(REPOSITORY / "deploy" / "image"), "dockerfile")
    return sorted(line for check, line in failed if check not in ACCEPTED)


def _scan(checkov: str, directory: str, framework: str) -> list[tuple[str, str]]:
    command = [checkov, "-d", directory, "--framework", framework, "-o", "json", "--quiet", "--skip-download"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    try:
        report = json.loads(done.stdout)
    except json.JSONDecodeError:
        raise SystemExit(f"checkov: {done.stderr[-2000:] or done.stdout[-2000:]}") from None
    reports = report if isinstance(report, list) else [report]
    found = []
    for one in reports:
        for check in one.get("results", {}).get("failed_checks", []):
            line = f"{check['check_id']} {check['file_path']} {check['resource']}: {check['check_name']}"
            found.append((check["check_id"], line))
        print(framework, one.get("summary"))
    return found


def main(checkov: str) -> None:
    failed = run(checkov, FILES)
    print("\n".join(failed) or "nothing found that is not accepted")
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main(sys.argv[1])
