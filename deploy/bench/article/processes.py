"""Children with deadlines: a measurement of its own process, and the server."""

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

from deploy.ray_environment import free_port

_STOP_S = 60.0
_POLL_S = 0.25
_PROBE_S = 5.0
_REASON_CHARS = 300


class ChildError(RuntimeError):
    """A child process did not do what it was started for; the message has its own last words."""


def run(module: str, arguments: Sequence[str], log: Path, timeout_s: float) -> None:
    """`python -m module` to its end.

    Raises ChildError when it fails or takes longer.
    """
    with started([sys.executable, "-m", module, *arguments], log) as child:
        wait(child, module, log, timeout_s)


def wait(child: subprocess.Popen[bytes], module: str, log: Path, timeout_s: float) -> None:
    """Its end, by itself. Raises ChildError when it fails or takes longer."""
    try:
        status = child.wait(timeout_s)
    except subprocess.TimeoutExpired:
        raise ChildError(f"{module} was stopped after {timeout_s:.0f} s") from None
    if status != 0:
        raise ChildError(last_words(log) or f"{module} ended with status {status}")


def tell(child: subprocess.Popen[bytes], line: str) -> None:
    """A line on its standard input. One that has ended does not hear it: its end says why."""
    assert child.stdin is not None, "started with asks"
    with contextlib.suppress(OSError):
        child.stdin.write(f"{line}\n".encode())
        child.stdin.flush()


def lines(file: Path) -> list[str]:
    """Whole lines of a file that another process writes; none where it has not begun."""
    text = file.read_text(errors="replace") if file.exists() else ""
    return text[: text.rfind("\n") + 1].splitlines()


@contextlib.contextmanager
def server(
    engine: dict[str, Any], serving: dict[str, Any], directory: Path, timeout_s: float
) -> Iterator[str]:
    """`peregrine serve` on loopback with one replica; its address once it is warm, and its end at the end.

    directory: gets its configuration and log. Raises ChildError where it does not start in time.
    """
    directory.mkdir(parents=True, exist_ok=True)
    port, log = free_port(), directory / "server.log"
    cluster = {"port": port, "replicas": 1, "host": "127.0.0.1", "start_timeout_s": timeout_s}
    config = directory / "server.yaml"
    config.write_text(yaml.safe_dump({"engine": engine, "serving": serving, "cluster": cluster}))
    url = f"http://127.0.0.1:{port}"
    with started([sys.executable, "-m", "deploy.cli", "serve", "--config", str(config)], log) as child:
        deadline = time.monotonic() + timeout_s
        while not _is_ready(log, url):
            if child.poll() is not None:
                raise ChildError(f"the server did not start: {last_words(log)}")
            if time.monotonic() > deadline:
                raise ChildError(f"the server did not start within {timeout_s:.0f} s: {last_words(log)}")
            time.sleep(_POLL_S)
        yield url


def _is_ready(log: Path, url: str) -> bool:
    """The command says so when replica and routers are there; an answer alone may come before the routers."""
    if "Ready at " not in log.read_text(errors="replace"):
        return False
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(f"{url}/health", timeout=_PROBE_S, trust_env=False).status_code == 200
    return False


@contextlib.contextmanager
def started(command: list[str], log: Path, *, asks: bool = False) -> Iterator[subprocess.Popen[bytes]]:
    """In a session of its own: Ctrl-C reaches this process, which ends the child in order.

    asks: it reads its standard input, see `tell`.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    source = subprocess.PIPE if asks else subprocess.DEVNULL
    with open(log, "wb") as file:
        child = subprocess.Popen(command, stdin=source, stdout=file, stderr=file, start_new_session=True)
        try:
            yield child
        finally:
            _stop(child)


def _stop(child: subprocess.Popen[bytes]) -> None:
    """Ask it to end, and end it and all that it started where it does not."""
    if child.poll() is not None:
        return
    family = psutil.Process(child.pid).children(recursive=True)
    child.terminate()
    try:
        child.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(family, timeout=_STOP_S)


def last_words(log: Path) -> str:
    """The line of a log that tells why, else its last one."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    telling = [line for line in lines if "Error" in line or line.startswith("peregrine:")]
    return (telling or lines or [""])[-1][:_REASON_CHARS]
