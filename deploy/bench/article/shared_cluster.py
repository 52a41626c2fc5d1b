"""One Ray with its HAProxy for all shapes of a brief run, whose applications come and go in it.

    python -m deploy.bench.article.shared_cluster answers.jsonl NUM_GPUS

What `peregrine serve` starts for a configuration is deployed here by the same functions. A deployment may be
begun early: its replica imports all it needs and waits at a gate before it touches the device, so that the
engine alone is measured meanwhile. Commands come by standard input, a JSON object a line; each has an answer.
"""

import asyncio
import contextlib
import dataclasses
import functools
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import yaml

from deploy.bench.article import processes
from deploy.ray_environment import LOOPBACK, free_port
from engine import EngineConfig, InferenceEngine

_GATE_S = 900.0
_END_S = 40.0  # of an application: its replica drains for two seconds
_POLL_S = 0.05
_CHECK_POLL_S = 0.25


class SharedCluster:
    """A child process that deploys. Started at the first deployment, and again where it broke."""

    def __init__(self, directory: Path, num_gpus: int) -> None:
        self._directory, self._num_gpus = directory, num_gpus
        self._child: contextlib.ExitStack | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._log = directory / "cluster.log"
        self._answers = directory / "answers.jsonl"
        self._num_asked = 0
        self._port = 0
        self._gate: Path | None = None

    def begin(
        self, engine: dict[str, Any], serving: dict[str, Any], directory: Path, timeout_s: float
    ) -> None:
        """Deploy up to the gate, in the background. timeout_s: until it runs, the time at the gate included.

        directory: gets the configuration.
        """
        self._start_if_needed()
        directory.mkdir(parents=True, exist_ok=True)
        config = directory / "server.yaml"
        cluster = {"port": self._port, "replicas": 1, "host": LOOPBACK, "start_timeout_s": timeout_s}
        sections = {"engine": engine, "serving": serving, "cluster": cluster, "logs": {"format": "json"}}
        config.write_text(yaml.safe_dump(sections))
        self._gate = (directory / "gate").absolute()
        for file in (self._gate, _waiting(self._gate)):
            file.unlink(missing_ok=True)
        self._ask({"deploy": str(config), "gate": str(self._gate)})

    def wait_at_gate(self, timeout_s: float) -> None:
        """Until nothing of the deployment's start runs any more; returns as well where it has failed."""
        deadline = time.monotonic() + timeout_s
        while self._gate is not None and not _waiting(self._gate).exists() and time.monotonic() < deadline:
            if self._is_answered() or not self._is_running():
                return
            time.sleep(_POLL_S)

    @contextlib.contextmanager
    def server(
        self, engine: dict[str, Any], serving: dict[str, Any], directory: Path, timeout_s: float
    ) -> Iterator[str]:
        """The address of the application, warm, which was begun before or is now; its end at the end.

        Raises ChildError where it does not start in time.
        """
        if self._gate is None:
            self.begin(engine, serving, directory, timeout_s)
        gate, self._gate = self._gate, None
        assert gate is not None, "begun"
        gate.touch()
        try:
            answer = self._answer(timeout_s)
            if "failed" in answer:
                raise processes.ChildError(f"the server did not start: {answer['failed']}")
            yield f"http://{LOOPBACK}:{self._port}"
        finally:
            self._end()

    @property
    def is_begun(self) -> bool:
        """Whether a deployment waits to be taken by `server`."""
        return self._gate is not None

    def abandon(self) -> None:
        """Give up a deployment that was begun and not taken."""
        if self.is_begun:
            self.close()

    def close(self) -> None:
        """End the process and all that it started."""
        if self._child is not None:
            self._child.close()
        self._child = self._process = self._gate = None

    def _end(self) -> None:
        try:
            self._ask({"end": True})
            self._answer(_END_S)
        except (processes.ChildError, OSError):  # a new one starts at the next deployment
            self.close()

    def _start_if_needed(self) -> None:
        if self._is_running():
            return
        self.close()
        self._directory.mkdir(parents=True, exist_ok=True)
        self._answers.unlink(missing_ok=True)
        self._num_asked, self._port = 0, free_port()
        self._child = contextlib.ExitStack()
        command = [sys.executable, "-m", "deploy.bench.article.shared_cluster"]
        command += [str(self._answers), str(self._num_gpus)]
        self._process = self._child.enter_context(processes.started(command, self._log, asks=True))

    def _is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def _ask(self, command: dict[str, Any]) -> None:
        assert self._process is not None, "started"
        self._num_asked += 1
        processes.tell(self._process, json.dumps(command))

    def _is_answered(self) -> bool:
        return len(processes.lines(self._answers)) >= self._num_asked

    def _answer(self, timeout_s: float) -> dict[str, Any]:
        deadline = time.monotonic() + timeout_s
        while not self._is_answered():
            if not self._is_running():
                raise processes.ChildError(f"the cluster ended: {processes.last_words(self._log)}")
            if time.monotonic() > deadline:
                raise processes.ChildError(f"no answer of the cluster within {timeout_s:.0f} s")
            time.sleep(_POLL_S)
        answer: dict[str, Any] = json.loads(processes.lines(self._answers)[self._num_asked - 1])
        return answer


def _waiting(gate: Path) -> Path:
    return gate.with_suffix(".waiting")


async def start_after_gate(config: EngineConfig, gate: str) -> InferenceEngine:
    """The real engine, once the gate is there. Raises TimeoutError."""
    import engine.async_engine  # noqa: F401  # what takes seconds and no device
    from serving.replica import start_async_engine

    await asyncio.to_thread(_wait_for_gate, Path(gate))
    return await start_async_engine(config)


def _wait_for_gate(gate: Path) -> None:
    deadline = time.monotonic() + _GATE_S
    _waiting(gate).touch()
    while not gate.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"the gate did not open within {_GATE_S:.0f} s")
        time.sleep(_POLL_S)


def main() -> None:
    answers, num_gpus = Path(sys.argv[1]), int(sys.argv[2])
    first = sys.stdin.readline()
    if not first:
        return
    temporary = Path(tempfile.mkdtemp(prefix="pg-"))  # short: sockets lie in it
    try:
        _run(json.loads(first), answers, num_gpus, temporary)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _run(command: dict[str, Any], answers: Path, num_gpus: int, temporary: Path) -> None:
    from deploy import ray_environment
    from deploy.cluster import own_ray
    from deploy.config import load_config
    from deploy.log_relay import log_relay

    has_haproxy = ray_environment.prepare(load_config(Path(command["deploy"]), {}), temporary)
    with log_relay(temporary, sys.stderr), own_ray(temporary, num_gpus):
        while True:
            answer = _do(command, num_gpus, has_haproxy)
            with open(answers, "a") as file:
                file.write(json.dumps(answer) + "\n")
            line = sys.stdin.readline()
            if not line:
                return
            command = json.loads(line)


def _do(command: dict[str, Any], num_gpus: int, has_haproxy: bool) -> dict[str, Any]:
    from deploy.cluster import deploy
    from deploy.config import load_config

    if "end" in command:
        return {"ended": _end_application()}
    config = load_config(Path(command["deploy"]), {})
    if num_gpus == 0:
        config = dataclasses.replace(
            config, engine=dataclasses.replace(config.engine, num_threads=psutil.cpu_count())
        )
    try:
        deploy(
            config,
            num_gpus,
            has_haproxy=has_haproxy,
            factory=functools.partial(start_after_gate, gate=command["gate"]),
        )
    except Exception as error:  # whatever it was: the next shape may start
        return {"failed": str(error) or type(error).__name__}
    return {"ready": True}


def _end_application() -> bool:
    """Whether it went in time."""
    from ray import serve

    from deploy.application import APP_NAME

    deadline = time.monotonic() + _END_S
    serve.delete(APP_NAME, _blocking=False)
    while APP_NAME in serve.status().applications:
        if time.monotonic() > deadline:
            return False
        time.sleep(_CHECK_POLL_S)
    return True


if __name__ == "__main__":
    from deploy.bench.article import shared_cluster

    shared_cluster.main()  # under its importable name: replicas look the factory up by it
