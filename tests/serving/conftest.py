"""The app around the real engine and model, without Ray."""

import httpx
import pytest
import pytest_asyncio

from engine import EngineConfig
from engine.async_engine import AsyncEngine
from monitoring import Recorder
from serving.app import create_app
from serving.settings import ServingSettings
from serving.state import ReplicaState

MODEL = "SmolLM2-135M-Instruct"


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def engine(smollm2):
    engine = await AsyncEngine.start(
        EngineConfig(model=str(smollm2), served_model_name=MODEL, num_blocks=520, device="cpu")
    )
    yield engine
    await engine.shutdown()


@pytest.fixture
def make_state(engine):
    def make(**settings) -> ReplicaState:
        state = ReplicaState(ServingSettings(**settings), Recorder(), replica="test")
        state.ready(engine)
        return state

    return make


@pytest.fixture
def make_client(make_state):
    """A client of an app with the given settings; the app is at `client.app`, its state at `client.state`."""

    def make(state: ReplicaState | None = None, **settings) -> httpx.AsyncClient:
        state = state or make_state(**settings)
        transport = httpx.ASGITransport(create_app(state), raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60)

    return make
