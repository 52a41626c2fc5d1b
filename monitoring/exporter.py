"""An address of its own for each process's metrics.

A proxy in front of the replicas would answer with another one's figures each time, and Ray's metrics agent
takes one observation at a time; so Prometheus scrapes every replica and router directly.
"""

import json
import logging
import os
import threading
from pathlib import Path
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, start_http_server
from pydantic import BaseModel, ConfigDict, Field

logger = logging.getLogger(__name__)

_MAX_PROCESSES = 64  # on one host


class MetricsSettings(BaseModel):
    """`serving.metrics`: where Prometheus finds the replicas and routers of a host."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    port: int | None = Field(default=9464, ge=1, le=65_535 - _MAX_PROCESSES)
    """The first process of a host listens here, each further one on the next port that is free. None: no
    process has an address of its own."""
    host: str = "127.0.0.1"
    """What to listen on; a pod's Prometheus comes from outside: 0.0.0.0."""
    targets_dir: Path | None = None
    """Each process keeps a file here for Prometheus' file_sd_configs, where there is no service discovery."""


class Exporter:
    """Serves a registry over HTTP from a thread of its own. Scrapes do not wait for the event loop."""

    def __init__(self, settings: MetricsSettings, registry: CollectorRegistry) -> None:
        """Without a free port, or a directory that can be written, metrics are missed and nothing else."""
        self.port: int | None = None
        self._server: tuple[WSGIServer, threading.Thread] | None = None
        self._target: Path | None = None
        if settings.port is None:
            return
        for port in range(settings.port, settings.port + _MAX_PROCESSES):
            try:
                self._server = start_http_server(port, settings.host, registry)
            except OSError:
                continue
            self.port = port
            break
        else:
            logger.warning("metrics: no free port from %d on", settings.port)
            return
        if settings.targets_dir is not None:
            self._announce(settings.targets_dir, f"{settings.host}:{self.port}")

    def close(self) -> None:
        """Idempotent."""
        if self._server is not None:
            server, thread = self._server
            self._server = None
            server.shutdown()
            server.server_close()
            thread.join()
        if self._target is not None:
            self._target.unlink(missing_ok=True)
            self._target = None

    def _announce(self, directory: Path, address: str) -> None:
        # Named by the port: who takes the port of a killed process takes its file as well.
        target = directory / f"{self.port}.json"
        unfinished = target.with_suffix(f".{os.getpid()}")
        try:
            directory.mkdir(parents=True, exist_ok=True)
            unfinished.write_text(json.dumps([{"targets": [address]}]) + "\n")
            unfinished.replace(target)
        except OSError as error:
            logger.warning("metrics: %s", error)
            return
        self._target = target
