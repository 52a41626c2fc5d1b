"""The FastAPI application of one replica."""

from typing import Any

from fastapi import FastAPI

from serving.api.anthropic.messages import messages_router
from serving.api.anthropic.models import anthropic_models_router
from serving.api.chat import chat_router
from serving.api.completions import completions_router
from serving.api.embeddings import embeddings_router
from serving.api.operations import operations_router
from serving.api.responses.kept import AskPeers
from serving.api.responses.routes import responses_router
from serving.api.tokens import tokens_router
from serving.base_path import WithoutPrefix
from serving.direct_routes import DirectRoutes
from serving.errors import ErrorResponse, install_error_handlers
from serving.middleware import FrontDoor
from serving.state import ReplicaState, package_version
from serving.status.board import Peers, StatusBoard
from serving.status.routes import status_router
from serving.tenants.routes import usage_router
from serving.websockets.door import WebSocketDoor

_RESPONSES: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorResponse, "description": "The request cannot be served as it is."},
    "5XX": {"model": ErrorResponse, "description": "The server cannot serve it now."},
    # FastAPI would document its own validation error here; ours are 400s in OpenAI's form.
    422: {"model": ErrorResponse, "description": "Not used."},
}


def create_app(
    state: ReplicaState,
    *,
    answers_with_id: bool = True,
    peers: Peers | None = None,
    response_peers: AskPeers | None = None,
) -> FastAPI:
    """The app; `state` may get its engine later (`ReplicaState.ready`), until then requests get 503.

    `answers_with_id`: see `FrontDoor`. `peers`: see `StatusBoard`. `response_peers`: see `KeptResponses`.
    """
    app = FastAPI(
        title="Peregrine",
        version=package_version(),
        description="OpenAI-compatible inference",
        docs_url="/docs",
        redoc_url=None,
        # The app makes its own spans and metrics. An older FastAPI has none, and ignores this.
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    docs = list(app.router.routes)
    install_error_handlers(app)
    routers = [router(state, _RESPONSES) for router in (chat_router, completions_router)]
    routers += [messages_router(state), anthropic_models_router(state)]
    routers.append(responses_router(state, _RESPONSES, response_peers))
    routers += [router(state, _RESPONSES) for router in (embeddings_router, tokens_router, operations_router)]
    for router in routers:
        app.include_router(router)
    if state.gate is not None:
        app.include_router(usage_router(state.gate, _RESPONSES))
    if state.settings.status_page:
        app.include_router(status_router(StatusBoard(state, peers), _RESPONSES))
    # Behind the others: Ray Serve goes through them for each request, to name its route.
    app.router.routes[:] = [*(route for route in app.router.routes if route not in docs), *docs]
    app.add_middleware(DirectRoutes, routes=[route for router in routers for route in router.routes])
    app.add_middleware(FrontDoor, state=state, answers_with_id=answers_with_id)
    app.add_middleware(WebSocketDoor, state=state)
    app.add_middleware(WithoutPrefix)
    app.state.replica = state
    return app
