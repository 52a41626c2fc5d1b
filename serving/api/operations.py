"""Models, health, statistics, metrics, version."""

import dataclasses
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse, Response

from serving.schemas import Health, ModelCard, ModelList, Stats, Version
from serving.state import ReplicaState, package_version
from serving.tenants.visit import Visit

_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def operations_router(state: ReplicaState, responses: dict[int | str, dict[str, Any]]) -> APIRouter:
    router = APIRouter()

    def card() -> ModelCard:
        model = state.engine.model
        return ModelCard(id=model.name, created=state.created, max_model_len=model.max_model_len)

    @router.get("/v1/models", tags=["models"], responses=responses)
    async def list_models(request: Request) -> ModelList:
        """The models that this server has, and the caller may use."""
        visit: Visit = request.state.visit
        return ModelList(data=[model for model in (card(),) if visit.may_use(model.id)])

    @router.get("/v1/models/{model:path}", tags=["models"], responses=responses)
    async def retrieve_model(request: Request, model: str) -> ModelCard:
        """One model; its name may contain slashes."""
        state.check_model(model)
        visit: Visit = request.state.visit
        visit.check_model(model)
        return card()

    @router.get("/health", tags=["operations"], responses=responses)
    async def health() -> Health:
        """200 once the model is loaded and warm, 503 before and while shutting down."""
        await state.engine.check_health()
        return Health()

    @router.get("/stats", tags=["operations"], responses=responses)
    async def stats() -> Stats:
        """Load and counters of the replica that answers."""
        now = state.engine.stats()
        return Stats(
            replica=state.replica,
            num_inflight=state.admission.num_inflight,
            prompt_tokens_per_s=now.prompt_tokens_per_s,
            **dataclasses.asdict(now),
        )

    @router.get("/metrics", tags=["operations"], response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Prometheus metrics of the replica that answers."""
        state.collect()
        return Response(state.recorder.exposition(), media_type=_METRICS_TYPE)

    @router.get("/version", tags=["operations"])
    async def version() -> Version:
        return Version(version=package_version())

    return router
