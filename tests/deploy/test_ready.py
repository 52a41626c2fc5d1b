"""Ready is said when the proxy asks its routers, and not before."""

import http.server
import threading
import time
from collections.abc import Callable

import pytest

from deploy import cluster
from deploy.cluster import StartError
from serving.dispatch.headers import PEREGRINE_ROUTE


@pytest.fixture
def proxy():
    """Starts a proxy that routes its nth probe (from 0) where it is told so; its address and the probes."""
    servers = []

    def start(is_routed: Callable[[int], bool]) -> tuple[str, list[str]]:
        probes: list[str] = []

        class Proxy(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.send_response(405)
                if is_routed(len(probes)):
                    self.send_header(PEREGRINE_ROUTE, "replica=a; policy=latency")
                self.send_header("content-length", "0")
                self.end_headers()
                probes.append(self.headers["traceparent"])

            def log_message(self, *_: object) -> None: ...

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/health", probes

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_it_waits_until_every_router_has_been_asked(proxy, monkeypatch):
    monkeypatch.setattr(cluster, "_POLL_S", 0.0)
    url, probes = proxy(lambda n: n in (1, 2) or n > 4)  # of two routers, the proxy first knows one
    cluster._wait_until_routed(url, 4, time.monotonic() + 60)
    assert len(probes) == 9
    assert all(traceparent.endswith("-00") for traceparent in probes)


def test_a_proxy_that_asks_no_router_is_an_error_with_its_last_answer(proxy):
    url, _ = proxy(lambda n: False)
    with pytest.raises(StartError, match=r"asks no router .* answered with 405"):
        cluster._wait_until_routed(url, 4, time.monotonic() + 0.5)


def test_a_proxy_that_is_not_there_is_an_error_too(proxy):
    with pytest.raises(StartError, match=r"asks no router .* a probe failed"):
        cluster._wait_until_routed("http://127.0.0.1:1/health", 4, time.monotonic() + 0.5)
