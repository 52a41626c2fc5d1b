"""POST /v1/chat/completions."""

from dataclasses import asdict, replace
from typing import Any

from fastapi import APIRouter, Request, Response

from engine import InferenceEngine
from serving.api.chat_job import chat_job
from serving.api.chat_presenter import ChatPresenter
from serving.api.generation import Job, Presenter, respond
from serving.chat_schemas import ChatCompletion, ChatCompletionRequest
from serving.state import ReplicaState
from serving.strict_json import StrictJsonRoute
from serving.telemetry.exchange import Exchange


def chat_router(state: ReplicaState, responses: dict[int | str, dict[str, Any]]) -> APIRouter:
    router = APIRouter(tags=["chat"], route_class=StrictJsonRoute)

    @router.post("/v1/chat/completions", response_model=ChatCompletion, responses=responses)
    async def create_chat_completion(request: Request, body: ChatCompletionRequest) -> Response:
        """Answer a conversation, whole or as a stream of server-sent events (`stream`)."""
        state.check_model(body.model)

        async def prepare(engine: InferenceEngine) -> tuple[Job, Presenter]:
            job, plan = await chat_job(
                engine,
                body.conversation,
                body.sampling_params(),
                body.definitions,
                body.choice,
                id_prefix="chatcmpl-",
                include_usage=bool(body.stream_options and body.stream_options.include_usage),
            )
            exchange: Exchange = request.state.exchange
            assert exchange.generation is not None, "`respond` has begun it"
            return replace(job, flush=body.flush), ChatPresenter(job, plan, exchange.generation.tier)

        return await respond(
            request,
            state,
            is_stream=bool(body.stream),
            operation="chat",
            model=body.model,
            prompt=[asdict(m) for m in body.conversation] if state.keeps_prompts else None,
            service_tier=body.service_tier,
            prepare=prepare,
        )

    return router
