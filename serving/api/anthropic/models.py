"""GET /v1/models as Anthropic's clients expect it: those that send the version header."""

from datetime import UTC, datetime
from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request
from fastapi.routing import APIRoute
from starlette.routing import Match
from starlette.types import Scope

from engine import ParameterError
from serving.api.anthropic.errors import VERSION_HEADER
from serving.api.anthropic.responses import AnthropicModel, AnthropicModels
from serving.api.anthropic.version import check_version
from serving.state import ReplicaState
from serving.tenants.visit import Visit


class _VersionedRoute(APIRoute):
    """Matches requests with the version header alone: OpenAI's API has the same paths."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        if all(name != VERSION_HEADER for name, _ in scope["headers"]):
            return Match.NONE, {}
        return super().matches(scope)


def anthropic_models_router(state: ReplicaState) -> APIRouter:
    """To be included before OpenAI's routes of the same paths, which stand in the app's document."""
    router = APIRouter(
        route_class=_VersionedRoute, dependencies=[Depends(check_version)], include_in_schema=False
    )

    def card() -> AnthropicModel:
        model = state.engine.model
        return AnthropicModel(
            id=model.name,
            display_name=model.name,
            created_at=datetime.fromtimestamp(state.created, UTC),
            max_input_tokens=model.max_model_len - 1,
            max_tokens=model.max_model_len - 1,
        )

    @router.get("/v1/models")
    async def list_models(
        request: Request,
        limit: Annotated[int, Query(ge=1, le=1000)] = 20,
        before_id: str | None = None,
        after_id: str | None = None,
    ) -> AnthropicModels:
        """A page of the models that this server has, and the caller may use."""
        model = card()
        for name, cursor in (("before_id", before_id), ("after_id", after_id)):
            if cursor not in (None, model.id):
                raise ParameterError(name, f"must be the id of a model, got {cursor!r}")
        visit: Visit = request.state.visit
        is_shown = before_id is None and after_id is None and visit.may_use(model.id)
        models = [model] if is_shown else []
        shown = models[:limit]
        ids = [m.id for m in shown]
        return AnthropicModels(data=shown, first_id=ids[0] if ids else None, last_id=ids[-1] if ids else None)

    @router.get("/v1/models/{model:path}")
    async def retrieve_model(request: Request, model: str) -> AnthropicModel:
        """One model; its name may contain slashes."""
        state.check_model(model)
        visit: Visit = request.state.visit
        visit.check_model(model)
        return card()

    return router
