"""schemathesis against the app's own OpenAPI document, over HTTP: nothing it sends is answered with 5xx."""

import dataclasses
import subprocess
import sys
import threading

import pytest
import uvicorn

from deploy.ray_environment import free_port
from engine import EngineConfig
from engine.async_engine import AsyncEngine
from monitoring import Recorder
from serving.app import create_app
from serving.settings import ServingSettings
from serving.state import ReplicaState

pytestmark = pytest.mark.model


class _ShortAnswers(AsyncEngine):
    """The real engine with answers cut short: the fuzzer likes thousands of tokens."""

    async def generate(self, prompt_token_ids, params, **kw):
        short = dataclasses.replace(params, max_tokens=min(params.max_tokens or 2, 2), n=min(params.n, 2))
        async for output in super().generate(prompt_token_ids, short, **kw):
            yield output


async def serve_until(stop: threading.Event, started: threading.Event, path: str, port: int) -> None:
    import asyncio

    engine = await _ShortAnswers.start(
        EngineConfig(model=path, served_model_name="m", num_blocks=520, device="cpu")
    )
    state = ReplicaState(ServingSettings(), Recorder(), replica="test")
    state.ready(engine)
    server = uvicorn.Server(uvicorn.Config(create_app(state), host="127.0.0.1", port=port, log_level="error"))
    task = asyncio.create_task(server.serve())
    await asyncio.sleep(1)
    started.set()
    await asyncio.to_thread(stop.wait)
    server.should_exit = True
    await task
    await engine.shutdown()


@pytest.fixture(scope="module")
def url(smollm2):
    import asyncio

    port, stop, started = free_port(), threading.Event(), threading.Event()
    thread = threading.Thread(
        target=lambda: asyncio.run(serve_until(stop, started, str(smollm2), port)), daemon=True
    )
    thread.start()
    assert started.wait(60)
    yield f"http://127.0.0.1:{port}"
    stop.set()
    thread.join(30)


def test_no_server_error_and_answers_as_documented(url):
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json", "--seed", "7"]
    command += ["--max-examples", "40", "--request-timeout", "60", "--workers", "1"]
    command += ["--checks", "not_a_server_error,response_schema_conformance,content_type_conformance"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
