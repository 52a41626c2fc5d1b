"""`peregrine serve` with logs and traces on: what is written, what is sent, and what is not."""

import gzip
import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import psutil
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2

from deploy.ray_environment import free_port
from tests.e2e.conftest import MODEL

pytestmark = [pytest.mark.e2e, pytest.mark.model, pytest.mark.timeout(240)]

SECRET, KEY = "sesame-open-7361", "sk-never-to-be-seen"
TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
START_S, STOP_S = 120, 60


@pytest.fixture
def collector():
    """Spans by name, as a collector gets them over HTTP."""
    spans: dict[str, object] = {}

    class Collector(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers["content-encoding"] == "gzip":
                body = gzip.decompress(body)
            for resource in trace_service_pb2.ExportTraceServiceRequest.FromString(body).resource_spans:
                for scope in resource.scope_spans:
                    spans.update({span.name: span for span in scope.spans})
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Collector) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", spans
        server.shutdown()


def ray_files(process: subprocess.Popen) -> list[str]:
    """What Ray's own log files say; they are gone when it is."""
    environments = [child.environ() for child in psutil.Process(process.pid).children(recursive=True)]
    (directory,) = {e["RAY_TMPDIR"] for e in environments if "RAY_TMPDIR" in e}
    return [f.read_text(errors="replace") for f in Path(directory).glob("**/logs/**/*") if f.is_file()]


def test_lines_and_spans_of_a_served_request(collector, tmp_path, smollm2):
    endpoint, spans = collector
    url = f"http://127.0.0.1:{(port := free_port())}"
    environment = {
        **os.environ,
        "PEREGRINE_API_KEY": KEY,
        "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint,
        "OTEL_EXPORTER_OTLP_COMPRESSION": "gzip",
        "OTEL_BSP_SCHEDULE_DELAY": "200",
    }
    config = tmp_path / "peregrine.yaml"
    config.write_text("routing: {policy: latency}")  # a router also before a single replica
    command = [sys.executable, "-m", "deploy.cli", "serve", str(smollm2), "--port", str(port)]
    command += ["--config", str(config)]
    command += ["--served-model-name", MODEL, "--log-format", "json", "--log-level", "debug"]
    out, err = tmp_path / "out", tmp_path / "err"
    with open(out, "wb") as stdout, open(err, "wb") as stderr:
        process = subprocess.Popen(
            command, stdout=stdout, stderr=stderr, env=environment, start_new_session=True
        )
    try:
        deadline = time.monotonic() + START_S
        while "Ready" not in err.read_text():
            assert process.poll() is None, err.read_text()
            assert time.monotonic() < deadline, err.read_text()
            time.sleep(0.5)
        body = {
            "model": MODEL, "messages": [{"role": "user", "content": SECRET}], "max_tokens": 8, "stream": True
        }  # fmt: skip
        headers = {
            "authorization": f"Bearer {KEY}",
            "traceparent": f"00-{TRACE_ID}-00f067aa0ba902b7-01",
            "x-request-id": "mine-1",
        }
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers, timeout=60)
        assert answer.status_code == 200
        assert answer.headers["x-request-id"] == "mine-1"
        refused = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
        assert refused.status_code == 401
        deadline = time.monotonic() + 20
        while "route" not in spans and time.monotonic() < deadline:
            time.sleep(0.2)
        files = ray_files(process)
        os.kill(process.pid, signal.SIGINT)
        assert process.wait(STOP_S) == 0, err.read_text()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)

    lines = [json.loads(line) for line in out.read_text().splitlines()]  # nothing else is among them
    told = {line["request_id"]: line for line in lines if line["logger"] == "peregrine.access"}
    line = told["mine-1"]
    assert (line["status"], line["outcome"], line["trace_id"]) == (200, "finished", TRACE_ID)
    assert 0 < line["queue_ms"] < line["ttft_ms"] < line["total_ms"]
    assert line["prompt_tokens"] > line["output_tokens"] >= 1
    assert next(x for x in told.values() if x["status"] == 401)["error"] == "invalid_api_key"

    server, chat = spans["POST /v1/chat/completions"], spans[f"chat {MODEL}"]
    assert server.trace_id.hex() == TRACE_ID
    assert server.parent_span_id.hex() == "00f067aa0ba902b7"
    assert spans["route"].parent_span_id == chat.parent_span_id == server.span_id
    for name in ("queue", "prefill", "decode"):
        assert spans[name].parent_span_id == chat.span_id
    route = {a.key: a.value.string_value for a in spans["route"].attributes}
    assert route["peregrine.route.policy"] == "latency"
    # The router decides before the replica sees the request; their clocks are the same machine's.
    assert spans["route"].end_time_unix_nano <= server.start_time_unix_nano + 5_000_000

    assert files
    written = [
        out.read_text(),
        err.read_text().replace("$PEREGRINE_API_KEY", ""),
        *files,
        *map(str, spans.values()),
    ]
    for text in written:
        assert SECRET not in text
        assert KEY not in text
