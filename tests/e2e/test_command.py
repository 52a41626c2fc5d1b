"""`peregrine serve` as a process: the Python proxy, Ctrl-C, and what is left afterwards."""

import os
import signal
import subprocess
import sys
import time

import httpx
import psutil
import pytest

from deploy.ray_environment import free_port
from tests.e2e.conftest import MODEL

pytestmark = [pytest.mark.e2e, pytest.mark.model, pytest.mark.timeout(240)]

START_S = 120
STOP_S = 60


def test_python_proxy_serves_and_ctrl_c_leaves_nothing(tmp_path, smollm2):
    port = free_port()
    config = tmp_path / "c.yaml"
    config.write_text("cluster: {haproxy: 'off'}\nserving: {api_keys: [secret]}\n")
    command = [sys.executable, "-m", "deploy.cli", "serve", "--port", str(port), "--config", str(config)]
    # A session of its own, so that the signal reaches it and its children alone.
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    log_text = (tmp_path / "log").read_text
    try:
        deadline = time.monotonic() + START_S
        while "Ready" not in log_text():
            assert process.poll() is None, log_text()
            assert time.monotonic() < deadline, log_text()
            time.sleep(0.5)
        children = psutil.Process(process.pid).children(recursive=True)
        url = f"http://127.0.0.1:{port}"
        body = {"model": MODEL, "prompt": "The capital of France is", "temperature": 0, "max_tokens": 3}
        key = {"Authorization": "Bearer secret"}
        assert httpx.post(f"{url}/v1/completions", json=body, timeout=60).status_code == 401
        answer = httpx.post(f"{url}/v1/completions", json=body, headers=key, timeout=60)
        assert answer.json()["choices"][0]["text"].startswith(" Paris")
        assert httpx.get(f"{url}/", timeout=10).text.startswith("<!doctype html>")
        shown = httpx.get(f"{url}/status.json", timeout=10).json()
        assert [r["condition"] for r in shown["replicas"]] == ["ready"]
        assert shown["needs_api_key"] is True
        with httpx.stream(
            "POST", f"{url}/v1/completions", json={**body, "stream": True}, headers=key, timeout=60
        ) as stream:
            assert "data: [DONE]" in stream.read().decode()
        os.kill(process.pid, signal.SIGINT)
        assert process.wait(STOP_S) == 0, log_text()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    _, alive = psutil.wait_procs(children, timeout=10)
    assert alive == []
    assert "Traceback" not in log_text()
