"""POST /v1/messages and /v1/messages/count_tokens."""

import uuid
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Depends, Request, Response

from engine import InferenceEngine, SamplingParams
from serving.api.anthropic.conversation import Conversation, conversation_of
from serving.api.anthropic.errors import AnthropicErrorResponse
from serving.api.anthropic.presenter import MessagePresenter
from serving.api.anthropic.requests import CountTokensRequest, MessagesRequest
from serving.api.anthropic.responses import MessageResponse, ServiceTier, TokenCount
from serving.api.anthropic.version import check_version
from serving.api.chat_job import chat_job
from serving.api.generation import Job, Presenter, respond
from serving.state import ReplicaState
from serving.strict_json import StrictJsonRoute
from serving.telemetry.exchange import Exchange
from serving.tenants.visit import Visit
from serving.tiers import Tier
from serving.tools import ChatPlan

_RESPONSES: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": AnthropicErrorResponse, "description": "The request cannot be served as it is."},
    "5XX": {"model": AnthropicErrorResponse, "description": "The server cannot serve it now."},
    # FastAPI would document its own validation error here; ours are 400s in Anthropic's form.
    422: {"model": AnthropicErrorResponse, "description": "Not used."},
}


def messages_router(state: ReplicaState) -> APIRouter:
    router = APIRouter(
        tags=["messages"],
        route_class=StrictJsonRoute,
        dependencies=[Depends(check_version)],
        responses=_RESPONSES,
    )

    @router.post("/v1/messages", response_model=MessageResponse)
    async def create_message(request: Request, body: MessagesRequest) -> Response:
        """Anthropic's form of a conversation's answer, whole or as a stream of named events (`stream`)."""
        state.check_model(body.model)
        conversation = conversation_of(body)
        exchange: Exchange = request.state.exchange

        async def prepare(engine: InferenceEngine) -> tuple[Job, Presenter]:
            job, plan = await _job(engine, body, conversation, body.sampling_params())
            assert exchange.generation is not None  # `respond` has it begun
            tier = _tier_shown(exchange.generation.tier, state.settings.tiers)
            return job, MessagePresenter(job, plan.parser(_new_call_id), tier, exchange.request_id)

        return await respond(
            request,
            state,
            is_stream=bool(body.stream),
            operation="chat",
            model=body.model,
            prompt=[asdict(m) for m in conversation.messages] if state.keeps_prompts else None,
            service_tier=body.service_tier,
            prepare=prepare,
        )

    @router.post("/v1/messages/count_tokens")
    async def count_tokens(request: Request, body: CountTokensRequest) -> TokenCount:
        """The tokens that a request with this conversation has to read."""
        state.check_model(body.model)
        visit: Visit = request.state.visit
        visit.check_model(body.model)
        job, _ = await _job(state.engine, body, conversation_of(body), SamplingParams())
        return TokenCount(input_tokens=len(job.prompts[0]))

    return router


async def _job(
    engine: InferenceEngine, body: CountTokensRequest, conversation: Conversation, params: SamplingParams
) -> tuple[Job, ChatPlan]:
    return await chat_job(
        engine,
        conversation.messages,
        params,
        body.definitions(),
        body.choice,
        id_prefix="msg_",
        include_usage=True,
        answer_beginning=conversation.prefill,
        may_exceed_context=True,
    )


def _new_call_id() -> str:
    return f"toolu_{uuid.uuid4().hex[:24]}"


def _tier_shown(name: str, tiers: Mapping[str, Tier]) -> ServiceTier:
    """By Anthropic's names: more urgent than the default is its priority, less urgent its batch."""
    more = tiers["default"].priority - tiers[name].priority
    return "standard" if more == 0 else "priority" if more > 0 else "batch"
