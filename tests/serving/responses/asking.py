"""The official client against an app in process, on the scripted engine or on any other."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import openai

from monitoring import Recorder
from serving.api.responses.kept import AskPeers
from serving.app import create_app
from serving.settings import ServingSettings
from serving.state import ReplicaState

TOOL = {
    "type": "function",
    "name": "weather",
    "description": "The weather of a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "strict": True,
}


@asynccontextmanager
async def client_of(
    engine: Any, *, replica: str = "one", response_peers: AskPeers | None = None, **settings: Any
) -> AsyncGenerator[tuple[openai.AsyncOpenAI, ReplicaState]]:
    state = ReplicaState(ServingSettings(**settings), Recorder(), replica=replica)
    state.ready(engine)
    app = create_app(state, response_peers=response_peers)
    http_client = httpx.AsyncClient(transport=httpx.ASGITransport(app, raise_app_exceptions=False))
    async with openai.AsyncOpenAI(
        base_url="http://test/v1", api_key="none", max_retries=0, http_client=http_client
    ) as client:
        yield client, state
