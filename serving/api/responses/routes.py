"""POST /v1/responses, and GET and DELETE of those that are kept."""

from typing import Any

from fastapi import APIRouter, Request
from fastapi import Response as HttpResponse

from engine import InferenceEngine, ParameterError
from serving.api.chat_job import chat_job
from serving.api.generation import Job, Presenter, respond
from serving.api.responses.items import with_instructions
from serving.api.responses.kept import AskPeers, KeptResponses
from serving.api.responses.objects import DeletedResponse, InputTokens, Response
from serving.api.responses.presenter import ResponsePresenter
from serving.api.responses.requests import ResponseRequest
from serving.api.responses.store import StoredResponse
from serving.errors import ApiError
from serving.state import ReplicaState
from serving.strict_json import StrictJsonRoute
from serving.tools import ChatPlan, Message


def responses_router(
    state: ReplicaState, documented: dict[int | str, dict[str, Any]], peers: AskPeers | None = None
) -> APIRouter:
    router = APIRouter(tags=["responses"], route_class=StrictJsonRoute)
    kept = KeptResponses(state.responses, state.replica, peers)

    @router.post("/v1/responses", response_model=Response, responses=documented)
    async def create_response(request: Request, body: ResponseRequest) -> HttpResponse:
        """Answer a conversation of items, whole or as a stream of server-sent events (`stream`)."""
        state.check_model(body.model)
        if body.store and not kept.store.settings.max_count:
            raise ParameterError("store", "must be false: this server keeps no responses")
        owner: str | None = request.state.visit.tenant
        is_kept = body.store is not False and kept.store.settings.max_count > 0

        async def prepare(engine: InferenceEngine) -> tuple[Job, Presenter]:
            said = await kept.conversation(body, owner)
            job, plan = await _job(engine, body, said, kept.id_prefix)
            _check_room(job, engine.model.max_model_len)

            def keep(response: Response, answer: Message) -> None:
                if is_kept:
                    text = response.model_dump_json().encode()
                    kept.store.put(StoredResponse(response.id, owner, text, (*said, answer)))

            return job, ResponsePresenter(_begun(body, job, is_kept=is_kept), plan, keep)

        return await respond(
            request,
            state,
            is_stream=bool(body.stream),
            operation="chat",
            model=body.model,
            prompt=[body.instructions, body.model_dump()["input"]] if state.keeps_prompts else None,
            service_tier=body.service_tier,
            prepare=prepare,
        )

    @router.post("/v1/responses/input_tokens", responses=documented)
    async def count_input_tokens(request: Request, body: ResponseRequest) -> InputTokens:
        """How many tokens the same request to /v1/responses would read."""
        state.check_model(body.model)
        request.state.visit.check_model(body.model)
        said = await kept.conversation(body, request.state.visit.tenant)
        job, _ = await _job(state.engine, body, said, kept.id_prefix)
        return InputTokens(input_tokens=len(job.prompts[0]))

    @router.get("/v1/responses/{response_id}", response_model=Response, responses=documented)
    async def retrieve_response(request: Request, response_id: str) -> HttpResponse:
        """A response that is kept."""
        _refuse_parameters(request)
        stored = await kept.get(response_id, request.state.visit.tenant)
        if stored is None:
            raise _not_found(response_id)
        return HttpResponse(stored.response, media_type="application/json")

    @router.delete("/v1/responses/{response_id}", responses=documented)
    async def delete_response(request: Request, response_id: str) -> DeletedResponse:
        """Forget a response; those that went on from it stay."""
        if await kept.pop(response_id, request.state.visit.tenant) is None:
            raise _not_found(response_id)
        return DeletedResponse(id=response_id)

    return router


async def _job(
    engine: InferenceEngine, body: ResponseRequest, said: tuple[Message, ...], id_prefix: str
) -> tuple[Job, ChatPlan]:
    """said: the conversation without instructions."""
    try:
        return await chat_job(
            engine,
            with_instructions(body.instructions, said),
            body.sampling_params(),
            body.definitions,
            body.choice,
            id_prefix=id_prefix,
            include_usage=True,
            may_exceed_context=True,  # max_output_tokens is an upper bound: the answer is then incomplete
        )
    except ParameterError as error:
        if error.field.startswith("messages"):
            raise ParameterError("input", error.message) from None
        raise


def _check_room(job: Job, limit: int) -> None:
    num_tokens = len(job.prompts[0])
    if num_tokens >= limit:
        raise ApiError(
            400,
            f"This model's maximum context length is {limit} tokens, and the input alone has {num_tokens}.",
            param="input",
            code="context_length_exceeded",
        )


def _begun(body: ResponseRequest, job: Job, *, is_kept: bool) -> Response:
    """The response before its first token."""
    given = body.model_dump(by_alias=True, exclude_none=True)
    params = job.params
    return Response(
        id=job.request_id,
        created_at=job.created,
        model=job.model,
        instructions=body.instructions,
        previous_response_id=body.previous_response_id,
        store=is_kept,
        tools=[{"strict": False, "parameters": {}, **tool} for tool in given.get("tools", [])],
        tool_choice=given.get("tool_choice", "auto"),
        parallel_tool_calls=body.parallel_tool_calls is not False,
        max_tool_calls=body.max_tool_calls,
        text={"format": {"type": "text"}, **given.get("text", {})},
        max_output_tokens=body.max_output_tokens,
        temperature=params.temperature,
        top_p=params.top_p,
        top_logprobs=body.top_logprobs or 0,
        metadata=body.metadata or {},
        service_tier=body.service_tier,
        user=body.user,
        safety_identifier=body.safety_identifier,
        prompt_cache_key=body.prompt_cache_key,
    )


def _refuse_parameters(request: Request) -> None:
    for name in request.query_params:
        raise ParameterError(name, "is not supported: a kept response comes whole, as it was")


def _not_found(response_id: str) -> ApiError:
    return ApiError(404, f"Response with id '{response_id}' not found.", code="response_not_found")
