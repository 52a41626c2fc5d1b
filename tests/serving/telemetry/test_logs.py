"""Log lines: one for each request, with its figures; never a prompt unless asked, never a key at all."""

import asyncio
import json
import logging
import socketserver
import threading

import pytest

from serving.telemetry.access_log import AccessLog
from serving.telemetry.logs import LOG_SOCKET, LogWriter
from serving.telemetry.settings import LogSettings
from tests.serving.dispatch.test_links import until
from tests.serving.telemetry.conftest import BODY, HEADERS, KEY, SECRET

pytestmark = pytest.mark.usefixtures("keep_loggers")


class Lines:
    """What a process writes to standard error between the start and the end."""

    def __init__(self, capsys, **settings) -> None:
        self._capsys = capsys
        self.settings = LogSettings(**{"format": "json", **settings})
        capsys.readouterr()
        self._writer = LogWriter(self.settings, {})

    def end(self) -> list[str]:
        self._writer.stop()
        return self._capsys.readouterr().err.splitlines()


def access_lines(lines: list[str]) -> list[dict]:
    return [line for line in map(json.loads, lines) if line["logger"] == "peregrine.access"]


async def test_a_request_is_one_line_with_its_figures(client, state, capsys):
    lines = Lines(capsys)
    state.observers.append(AccessLog(lines.settings).write)
    for is_stream in (False, True):
        answer = await client.post(
            "/v1/chat/completions",
            json={**BODY, "stream": is_stream, "service_tier": "agent"},
            headers={"x-request-id": "mine.1"},
        )
        assert answer.status_code == 200
    await client.get("/health")  # a probe: told at debug only
    told = access_lines(lines.end())
    assert len(told) == 2
    for line, is_stream in zip(told, (False, True), strict=True):
        assert line["level"] == "info"
        assert line["request_id"] == "mine.1"
        assert (line["method"], line["route"], line["status"]) == ("POST", "/v1/chat/completions", 200)
        assert (line["outcome"], line["tier"], line["stream"]) == ("finished", "agent", is_stream)
        assert line["prompt_tokens"] == 4  # of 16 characters
        assert (line["cached_tokens"], line["output_tokens"]) == (0, 5)
        assert line["finish_reasons"] == ["length"]
        assert 0 < line["ttft_ms"] <= line["total_ms"]
        assert line["tpot_ms"] > 0
        assert line["replica"] == "r0"
        assert line["response_id"].startswith("chatcmpl-")
        assert "error" not in line


async def test_failures_have_their_code_and_outcome(client, state, engine, capsys):
    lines = Lines(capsys)
    state.observers.append(AccessLog(lines.settings).write)
    await client.post("/v1/chat/completions", json={**BODY, "max_tokens": -1})
    await client.post("/v1/chat/completions", json={**BODY, "model": SECRET})
    await client.post("/v1/chat/completions", json=BODY, headers={"authorization": "Bearer wrong"})
    await client.get(f"/v1/{SECRET}?api_key={KEY}")
    state.admission.num_inflight = 1000
    await client.post("/v1/chat/completions", json=BODY)
    told = access_lines(lines.end())
    assert [(t["status"], t["outcome"], t["error"]) for t in told] == [
        (400, "invalid", "invalid_value"),
        (404, "invalid", "model_not_found"),
        (401, "invalid", "invalid_api_key"),
        (404, "invalid", "not_found_error"),
        (429, "refused", "rate_limit_exceeded"),
    ]
    assert told[-1]["tier"] == "default"


async def test_a_client_that_leaves_is_told_as_aborted(state, capsys):
    from serving.app import create_app

    lines = Lines(capsys)
    state.observers.append(AccessLog(lines.settings).write)
    left, sent = asyncio.Event(), []
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST",
        "path": "/v1/chat/completions", "raw_path": b"", "query_string": b"", "root_path": "",
        "scheme": "http", "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2),
        "headers": [
            (k.encode(), v.encode()) for k, v in {**HEADERS, "content-type": "application/json"}.items()
        ],
    }  # fmt: skip
    bodies = [json.dumps({**BODY, "stream": True, "max_tokens": 5000}).encode()]

    async def receive() -> dict:
        if bodies:
            return {"type": "http.request", "body": bodies.pop(), "more_body": False}
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict) -> None:
        sent.append(message)
        if len(sent) > 4:
            left.set()

    await create_app(state)(scope, receive, send)
    (line,) = access_lines(lines.end())
    assert (line["status"], line["outcome"]) == (200, "aborted")
    assert 1 <= line["output_tokens"] < 5000


async def test_what_is_cancelled_before_its_answer_began_is_aborted_too(client, state, engine, capsys):
    """As Ray Serve ends the handler of a client that left."""
    lines = Lines(capsys)
    state.observers.append(AccessLog(lines.settings).write)
    running = asyncio.create_task(client.post("/v1/chat/completions", json={**BODY, "max_tokens": 50_000}))
    await until(lambda: engine.stats().num_running)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    (line,) = access_lines(lines.end())
    assert (line["status"], line["outcome"]) == (499, "aborted")


@pytest.mark.parametrize("log_format", ["json", "text"])
async def test_neither_prompts_nor_keys_appear(client, state, engine, capsys, log_format, monkeypatch):
    """Also where an exception quotes them."""
    lines = Lines(capsys, level="debug", format=log_format)
    state.observers.append(AccessLog(lines.settings).write)
    for body in (BODY, {**BODY, "stream": True}, {**BODY, "stop": [SECRET]}, {**BODY, SECRET: 1}):
        await client.post("/v1/chat/completions", json=body)
    await client.post("/v1/completions", json={"model": "double", "prompt": SECRET, "user": SECRET})
    await client.post("/v1/completions", content=SECRET)
    await client.get(f"/v1/{SECRET}?key={KEY}", headers={"x-request-id": "a b\nforged line"})

    async def quoting(text: str, **_: object) -> list[int]:
        try:
            raise KeyError(text)
        except KeyError as error:
            raise ValueError(f"cannot tokenize {text!r} for {KEY}") from error

    monkeypatch.setattr(engine, "tokenize", quoting)
    answer = await client.post("/v1/chat/completions", json=BODY)
    assert answer.status_code == 500
    written = lines.end()
    text = "\n".join(written)
    assert "builtins.ValueError" in text  # kind and place are told
    assert "caused by" in text
    assert "quoting" in text
    assert SECRET not in text
    assert KEY not in text
    assert not any(line.startswith("forged") for line in written)
    if log_format == "json":
        last = access_lines(written)[-1]
        assert (last["status"], last["outcome"], last["error"]) == (500, "failed", "internal_error")


async def test_prompts_are_told_where_asked(client, state, capsys):
    lines = Lines(capsys, prompts=True)
    state.keeps_prompts = True
    state.observers.append(AccessLog(lines.settings).write)
    await client.post("/v1/chat/completions", json=BODY)
    await client.post("/v1/completions", json={"model": "double", "prompt": SECRET})
    chat, completion = access_lines(lines.end())
    assert chat["prompt"][0]["content"] == SECRET
    assert completion["prompt"] == SECRET
    assert KEY not in json.dumps([chat, completion])


def test_levels_are_of_the_own_loggers_and_text_is_for_people(capsys):
    lines = Lines(capsys, format="text", level="error")
    logging.getLogger("serving.x").warning("not told")
    logging.getLogger("serving.x").error("told\nonce", extra={"replica": "r1", "note": "a b"})
    logging.getLogger("some.library").info("not told")
    logging.getLogger("some.library").warning("told, too")
    first, second = lines.end()
    assert first.endswith('ERROR   serving.x: told\\nonce  replica=r1 note="a b"')
    assert second.endswith("WARNING some.library: told, too")


def test_lines_go_to_the_socket_of_the_command_whole_and_in_order(tmp_path):
    received: list[bytes] = []

    class Collect(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            received.extend(self.rfile)

    with socketserver.UnixStreamServer(str(tmp_path / "s"), Collect) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        writer = LogWriter(LogSettings(format="json"), {LOG_SOCKET: str(tmp_path / "s")})
        for number in range(200):
            logging.getLogger("serving.x").info("line %d", number)
        writer.stop()
        thread.join(10)
    assert [json.loads(line)["message"] for line in received] == [f"line {n}" for n in range(200)]


def test_where_nobody_reads_only_warnings_are_written(capsys):
    capsys.readouterr()
    writer = LogWriter(LogSettings(format="text", level="debug"), {LOG_SOCKET: ""})
    logging.getLogger("serving.x").info("not told")
    logging.getLogger("serving.x").warning("told")
    writer.stop()
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_full_queue_loses_lines_but_says_so(capsys):
    lines = Lines(capsys)
    entrance = lines._writer._entrance
    is_free = threading.Event()

    class Slow(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            is_free.wait(10)

    slow = Slow()
    lines._writer._listener.handlers = (slow, *lines._writer._listener.handlers)
    for _ in range(entrance.queue.maxsize + 50):
        logging.getLogger("serving.x").info("x")
    is_free.set()
    while not entrance.queue.empty():
        pass
    logging.getLogger("serving.x").info("last")
    written = [json.loads(line)["message"] for line in lines.end()]
    assert written[-1] == "last"
    assert "log lines dropped" in written[-2]
