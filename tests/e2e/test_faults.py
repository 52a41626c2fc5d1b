"""Replicas killed, hung, replaced and scaled under load, on the engine double: clients see none of it, but
for streams that a kill cuts, which end with an error event. Each run has a cluster and a process of its own.
"""

import json
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

RUN_S = 280


@pytest.mark.parametrize("scenario", ["kill", "hang", "redeploy", "scale"])
def test_no_request_is_lost(scenario, tmp_path):
    path = tmp_path / "result.json"
    command = [sys.executable, "-m", "tests.load.faults", scenario, "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=RUN_S)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    result = json.loads(path.read_text())
    assert result["requests"] > 50
    assert result["failed"] == 0, result["ends"]
    assert result["badly_ended_bodies"] == 0
    assert not any(result["ledger_at_end"].values())
    if scenario == "redeploy":
        assert result["rows"][-1]["end"] == "complete"
    if scenario == "scale":
        assert set(result["ends"]) <= {"complete", "aborted"}
