"""Collects the log lines of all processes of a cluster on this machine into one stream, line by line.

Ray would put a name and a process number before each line, which nothing that parses lines would read.
"""

import contextlib
import os
import socketserver
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from serving.telemetry.logs import LOG_SOCKET


class _Lines(socketserver.StreamRequestHandler):
    """One process: its lines, in order, until it ends."""

    def handle(self) -> None:
        server = self.server
        assert isinstance(server, _Relay)
        for line in self.rfile:
            server.write(line)


class _Relay(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, address: str, target: TextIO) -> None:
        super().__init__(address, _Lines)
        self._target = target
        self._lock = threading.Lock()

    def write(self, line: bytes) -> None:
        # A closed or full target must not stop the cluster; its lines are lost, as on a terminal that went.
        with self._lock, contextlib.suppress(OSError, ValueError):
            self._target.write(line.decode("utf-8", "replace"))
            self._target.flush()


@contextlib.contextmanager
def log_relay(directory: Path, target: TextIO | None) -> Iterator[None]:
    """Processes started inside send their lines to `target`; None: they write warnings alone, through Ray.

    directory: for the socket; its path must be short.
    """
    if target is None:
        os.environ[LOG_SOCKET] = ""
        yield
        return
    address = str(directory / "logs.sock")
    os.environ[LOG_SOCKET] = address
    with _Relay(address, target) as relay:
        thread = threading.Thread(target=relay.serve_forever, name="log-relay", daemon=True)
        thread.start()
        try:
            yield
        finally:
            relay.shutdown()
            thread.join()
