"""POST /tokenize and /detokenize."""

from typing import Any

from fastapi import APIRouter, Request

from engine import ParameterError, SamplingParams
from serving.chat_schemas import checked_conversation
from serving.state import ReplicaState
from serving.strict_json import StrictJsonRoute
from serving.tenants.visit import Visit
from serving.token_schemas import (
    DetokenizeRequest,
    DetokenizeResponse,
    TokenizeRequest,
    TokenizeResponse,
)
from serving.tools import ToolChoice, plan_chat
from serving.tools.schemas import tool_definitions


def tokens_router(state: ReplicaState, responses: dict[int | str, dict[str, Any]]) -> APIRouter:
    router = APIRouter(tags=["tokens"], route_class=StrictJsonRoute)

    @router.post("/tokenize", responses=responses)
    async def tokenize(request: Request, body: TokenizeRequest) -> TokenizeResponse:
        """Token ids of a text or of a conversation, as a request with it would compute them."""
        engine = state.engine
        if body.model is not None:
            state.check_model(body.model)
        visit: Visit = request.state.visit
        visit.check_model(engine.model.name)
        if body.messages is not None:
            messages, tools = checked_conversation(body.messages), tool_definitions(body.tools or ())
            template = engine.chat_template(has_tools=bool(tools))
            plan = plan_chat(messages, tools, ToolChoice(), SamplingParams(), template)
            tokens = await engine.tokenize_chat(
                plan.messages,
                tools=plan.template_tools,
                add_generation_prompt=body.add_generation_prompt is not False,
            )
        else:
            tokens = await engine.tokenize(
                body.prompt or "", add_special_tokens=body.add_special_tokens is not False
            )
        return TokenizeResponse(
            count=len(tokens),
            max_model_len=engine.model.max_model_len,
            tokens=tokens,
            token_strs=[engine.token(t) for t in tokens] if body.return_token_strs else None,
        )

    @router.post("/detokenize", responses=responses)
    async def detokenize(request: Request, body: DetokenizeRequest) -> DetokenizeResponse:
        """The tokens' text, special tokens included."""
        engine = state.engine
        if body.model is not None:
            state.check_model(body.model)
        visit: Visit = request.state.visit
        visit.check_model(engine.model.name)
        if any(token >= engine.model.vocab_size for token in body.tokens):
            raise ParameterError("tokens", f"token ids must be in [0, {engine.model.vocab_size - 1}]")
        return DetokenizeResponse(prompt=engine.detokenize(body.tokens))

    return router
