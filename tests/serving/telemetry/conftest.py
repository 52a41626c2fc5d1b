"""The app on the engine double, with what observes it."""

import logging

import httpx
import pytest
import pytest_asyncio

from monitoring import Recorder
from serving.app import create_app
from serving.settings import ServingSettings
from serving.state import ReplicaState
from tests.timed_engine import Speed, TimedEngine

SECRET = "sesame-open-7361"
KEY = "sk-never-to-be-seen"
BODY = {"model": "double", "messages": [{"role": "user", "content": SECRET}], "max_tokens": 5}
HEADERS = {"authorization": f"Bearer {KEY}"}
FAST = Speed(base_s=0.002, per_active_s=0.0, prefill_token_s=1e-5)


@pytest_asyncio.fixture
async def engine():
    engine = TimedEngine("double", FAST)
    yield engine
    await engine.shutdown()


@pytest.fixture
def state(engine):
    state = ReplicaState(ServingSettings(api_keys=(KEY,)), Recorder(), replica="r0")
    state.ready(engine)
    return state


@pytest_asyncio.fixture
async def client(state):
    transport = httpx.ASGITransport(create_app(state), raise_app_exceptions=False)
    async with httpx.AsyncClient(
        transport=transport, base_url="http://test", headers=HEADERS, timeout=30
    ) as client:
        yield client


@pytest.fixture
def keep_loggers():
    """Root handlers and levels as they were: `LogWriter` is made for processes of its own."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
