"""Spans: made of a request's times, part of the client's trace, sent over OTLP; none where it is off."""

import asyncio
import dataclasses
import http.server
import json
import socket
import subprocess
import sys
import threading
from concurrent import futures

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from serving.dispatch.headers import DECIDED, ROUTE, read_decided, read_route, write_decided
from serving.telemetry import tracing
from serving.telemetry.exchange import Exchange, Generation
from serving.telemetry.settings import TraceSettings
from serving.telemetry.spans import SpanWriter
from tests.serving.dispatch.test_links import until
from tests.serving.telemetry.conftest import BODY, KEY, SECRET

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = {"traceparent": f"00-{TRACE_ID}-00f067aa0ba902b7-01", "tracestate": "vendor=1"}
ON = TraceSettings(exporter="otlp")


@pytest.fixture(autouse=True)
def no_otel_environment(monkeypatch):
    import os

    for name in [n for n in os.environ if n.startswith("OTEL_")]:
        monkeypatch.delenv(name)


class Traced:
    """The spans of a state's requests."""

    def __init__(self, state, settings: TraceSettings = ON) -> None:
        self.exporter = InMemorySpanExporter()
        self.provider = tracing.create_provider(settings, "1.2.3", "r0", self.exporter)
        self.writer = SpanWriter(self.provider)
        state.observers.append(self.writer.write)

    def spans(self) -> dict:
        self.provider.force_flush()
        spans = {span.name: span for span in self.exporter.get_finished_spans()}
        self.exporter.clear()
        return spans


@pytest.fixture
def scheduled(monkeypatch, engine):
    """The engine double says when it began: half a millisecond before each output."""
    generate = engine.generate

    async def telling(*args, **kw):
        async for output in generate(*args, **kw):
            import time

            yield dataclasses.replace(output, first_scheduled_s=time.monotonic() - 0.0005)

    monkeypatch.setattr(engine, "generate", telling)


@pytest.mark.usefixtures("scheduled")
async def test_a_chat_is_a_server_span_and_genai_spans_in_the_clients_trace(client, state):
    traced = Traced(state)
    body = {**BODY, "stream": True, "temperature": 0.5, "seed": 3, "service_tier": "agent", "stop": [SECRET]}
    answer = await client.post("/v1/chat/completions", json=body, headers=PARENT)
    assert answer.status_code == 200
    spans = traced.spans()
    assert set(spans) == {"POST /v1/chat/completions", "chat double", "queue", "prefill", "decode"}
    server, chat = spans["POST /v1/chat/completions"], spans["chat double"]
    assert server.kind is SpanKind.SERVER
    assert f"{server.context.trace_id:032x}" == TRACE_ID
    assert f"{server.parent.span_id:016x}" == "00f067aa0ba902b7"
    assert server.context.trace_state.get("vendor") == "1"
    assert server.attributes["http.request.method"] == "POST"
    assert server.attributes["http.route"] == "/v1/chat/completions"
    assert server.attributes["http.response.status_code"] == 200
    assert server.status.status_code is StatusCode.UNSET
    assert chat.parent.span_id == server.context.span_id
    assert {k: v for k, v in chat.attributes.items() if k.startswith("gen_ai.")} == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "peregrine",
        "gen_ai.output.type": "text",
        "gen_ai.request.model": "double",
        "gen_ai.request.stream": True,
        "gen_ai.request.max_tokens": 5,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.request.seed": 3,
        "gen_ai.request.frequency_penalty": 0.0,
        "gen_ai.request.presence_penalty": 0.0,
        "gen_ai.response.id": json.loads(answer.text.split("\n")[0][6:])["id"],
        "gen_ai.response.model": "double",
        "gen_ai.response.finish_reasons": ("length",),
        "gen_ai.response.time_to_first_chunk": chat.attributes["gen_ai.response.time_to_first_chunk"],
        "gen_ai.usage.input_tokens": 4,
        "gen_ai.usage.cache_read.input_tokens": 0,
        "gen_ai.usage.output_tokens": 5,
    }
    assert chat.attributes["peregrine.tier"] == "agent"
    phases = [spans[name] for name in ("queue", "prefill", "decode")]
    assert all(span.parent.span_id == chat.context.span_id for span in phases)
    # One after the other, without a gap, inside their parents.
    assert chat.start_time == phases[0].start_time
    assert [p.end_time for p in phases[:2]] == [p.start_time for p in phases[1:]]
    assert phases[-1].end_time == chat.end_time
    assert server.start_time <= chat.start_time < chat.end_time <= server.end_time
    assert server.resource.attributes["service.name"] == "peregrine"
    assert server.resource.attributes["service.version"] == "1.2.3"
    assert server.resource.attributes["service.instance.id"] == "r0"
    everything = "".join(span.to_json() for span in spans.values())
    assert SECRET not in everything
    assert KEY not in everything


async def test_without_a_parent_a_trace_of_its_own_and_probes_leave_none(client, state):
    traced = Traced(state)
    seen = []
    state.observers.append(lambda exchange: seen.append(exchange.trace_id))
    await client.post("/v1/completions", json={"model": "double", "prompt": "x", "max_tokens": 1})
    await client.get("/health")
    await client.get("/v1/models", headers={"traceparent": "no such thing"})
    spans = traced.spans()
    assert set(spans) == {
        "POST /v1/completions", "text_completion double", "queue", "decode", "GET /v1/models"
    }  # fmt: skip
    assert spans["POST /v1/completions"].parent is None
    assert spans["GET /v1/models"].parent is None
    # For the log line.
    own = f"{spans['POST /v1/completions'].context.trace_id:032x}"
    assert seen == [own, None, f"{spans['GET /v1/models'].context.trace_id:032x}"]


async def test_failures_and_refusals_are_told_apart(client, state, engine):
    from engine import EngineDeadError

    traced = Traced(state)
    state.admission.num_inflight = 1000
    await client.post("/v1/chat/completions", json=BODY)
    server = traced.spans()["POST /v1/chat/completions"]
    assert server.attributes["error.type"] == "rate_limit_exceeded"
    assert server.status.status_code is StatusCode.UNSET  # the server did what it should
    state.admission.num_inflight = 0

    body = {**BODY, "stream": True, "max_tokens": 50_000}
    running = asyncio.create_task(client.post("/v1/chat/completions", json=body))
    await until(lambda: engine.stats().num_running)
    engine._sequences[0].queue.put_nowait(EngineDeadError(SECRET))
    await running
    spans = traced.spans()
    for name in ("POST /v1/chat/completions", "chat double"):
        assert spans[name].status.status_code is StatusCode.ERROR
        assert spans[name].attributes["error.type"] == "service_unavailable"
        assert SECRET not in spans[name].to_json()


async def test_the_routers_decision_is_a_span_by_the_times_it_sent():
    class State:
        observers: list = []  # noqa: RUF012

    traced = Traced(State)
    exchange = Exchange("id", "POST", arrival_s=100.0, arrival_ns=5_000_000_000, route="/v1/completions")
    exchange.status, exchange.ended_s = 200, 100.5
    route = "policy=latency; reason=score; predicted-ttft-ms=12.5"
    exchange.routing = {DECIDED: write_decided(4_998_000_000, 4_999_000_000), ROUTE: route}
    exchange.generation = Generation("text_completion", "m", "default", 5.0, True)
    traced.writer.write(exchange)
    span = traced.spans()["route"]
    assert (span.start_time, span.end_time) == (4_998_000_000, 4_999_000_000)
    assert dict(span.attributes) == {
        "peregrine.route.policy": "latency",
        "peregrine.route.reason": "score",
        "peregrine.route.predicted_ttft_ms": "12.5",
    }
    assert read_decided("x/1") is None
    assert read_decided("") is None
    assert read_route("nonsense") == {}


async def test_who_brings_a_trace_has_decided_whether_it_is_kept(client, state):
    traced = Traced(state, TraceSettings(exporter="otlp", sample_ratio=0))
    await client.post("/v1/chat/completions", json=BODY)
    assert traced.spans() == {}
    await client.post("/v1/chat/completions", json=BODY, headers=PARENT)
    assert "chat double" in traced.spans()
    unsampled = {"traceparent": PARENT["traceparent"][:-1] + "0"}
    always = Traced(state, TraceSettings(exporter="otlp", sample_ratio=1))
    await client.post("/v1/chat/completions", json=BODY, headers=unsampled)
    assert always.spans() == {}


@pytest.mark.parametrize(
    ("settings", "environ", "expected"),
    [
        ({}, {}, False),
        ({"exporter": "otlp"}, {}, True),
        ({"endpoint": "http://c:4318"}, {}, True),
        ({"exporter": "none", "endpoint": "http://c:4318"}, {}, False),
        ({}, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"}, True),
        ({}, {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c:4318"}, True),
        ({}, {"OTEL_TRACES_EXPORTER": "otlp"}, True),
        ({}, {"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"}, False),
        ({"exporter": "otlp"}, {"OTEL_SDK_DISABLED": "true"}, False),
    ],
)
def test_when_it_is_on(settings, environ, expected):
    assert tracing.is_on(TraceSettings(**settings), environ) is expected


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"OTEL_TRACES_EXPORTER": "zipkin"}, "OTEL_TRACES_EXPORTER: must be otlp or none, got 'zipkin'"),
        (
            {"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_PROTOCOL": "http/json"},
            "OTEL_EXPORTER_OTLP_PROTOCOL: must be one of http/protobuf, grpc, got 'http/json'",
        ),
    ],
)
def test_what_cannot_be_had_is_said_at_the_start(environ, message, monkeypatch, tmp_path):
    from tests.deploy.test_cli import failure

    with pytest.raises(ValueError, match=message):
        tracing.check_environment(TraceSettings(), environ)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert message in failure("serve", "--port", "18996")


def test_off_loads_nothing_of_the_sdk():
    """Ray brings the SDK along in its own processes; it must not be Peregrine that makes anyone load it."""
    code = (
        "import sys, serving.app, serving.telemetry.access_log, serving.telemetry.tracing as t\n"
        "from serving.telemetry.settings import TraceSettings\n"
        "assert not t.is_on(TraceSettings(), {})\n"
        "print([m for m in sys.modules if m.startswith(('opentelemetry.sdk', 'opentelemetry.exporter'))])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == "[]"


async def test_off_no_one_observes_but_the_page(state):
    assert state.observers == [state.activity.record]


def names_and_ids(request: trace_service_pb2.ExportTraceServiceRequest) -> dict[str, str]:
    return {
        span.name: span.trace_id.hex()
        for resource in request.resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    }


async def test_otlp_over_http_arrives_with_the_environments_headers(client, state, monkeypatch):
    received: list[tuple[str, str | None, bytes]] = []

    class Collector(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            received.append((self.path, self.headers["x-collector-key"], body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Collector) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-collector-key=k1")
        monkeypatch.setenv("OTEL_SERVICE_NAME", "chat-backend")
        settings = TraceSettings(endpoint=f"http://127.0.0.1:{server.server_port}/")
        writer = SpanWriter(tracing.create_provider(settings, "1", "r0"))
        state.observers.append(writer.write)
        await client.post("/v1/chat/completions", json=BODY, headers=PARENT)
        await asyncio.to_thread(writer.shutdown)
        server.shutdown()
    (path, key, body), *more = received
    assert (path, key, more) == ("/v1/traces", "k1", [])
    request = trace_service_pb2.ExportTraceServiceRequest.FromString(body)
    assert set(names_and_ids(request)) >= {"POST /v1/chat/completions", "chat double", "queue", "decode"}
    assert set(names_and_ids(request).values()) == {TRACE_ID}
    attributes = {a.key: a.value.string_value for a in request.resource_spans[0].resource.attributes}
    assert attributes["service.name"] == "chat-backend"


async def test_otlp_over_grpc_arrives(client, state, monkeypatch):
    received = []

    class Collector(trace_service_pb2_grpc.TraceServiceServicer):
        def Export(self, request, context):
            received.append(request)
            return trace_service_pb2.ExportTraceServiceResponse()

    server = grpc.server(futures.ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(Collector(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
        assert tracing.is_on(TraceSettings())
        writer = SpanWriter(tracing.create_provider(TraceSettings(), "1", "r0"))
        state.observers.append(writer.write)
        await client.post("/v1/chat/completions", json=BODY, headers=PARENT)
        await asyncio.to_thread(writer.shutdown)
    finally:
        server.stop(0)
    assert "chat double" in names_and_ids(received[0])


async def test_a_collector_that_is_not_there_costs_no_answer(client, state, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    writer = SpanWriter(
        tracing.create_provider(TraceSettings(endpoint=f"http://127.0.0.1:{port}"), "1", "r0")
    )
    state.observers.append(writer.write)
    for _ in range(3):
        assert (await client.post("/v1/chat/completions", json=BODY)).status_code == 200
    await asyncio.wait_for(asyncio.to_thread(writer.shutdown), 30)
