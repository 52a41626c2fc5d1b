"""POST /v1/chat/completions."""

import json
import time
import uuid
from typing import Any

from fastapi import APIRouter, Request, Response

from engine import InferenceEngine, PositionLogprobs, RequestOutput, TokenLogprob
from serving.api.generation import CollectedChoice, Job, Presenter, check_context, common_fields, respond
from serving.chat_schemas import (
    AssistantMessage,
    ChatChoice,
    ChatCompletion,
    ChatCompletionRequest,
    ChatLogprob,
    ChatLogprobs,
    TopLogprob,
)
from serving.errors import ApiError
from serving.schemas import Usage
from serving.state import ReplicaState, package_version
from serving.streaming import DONE, error_event, event
from serving.strict_json import StrictJsonRoute


def chat_router(state: ReplicaState, responses: dict[int | str, dict[str, Any]]) -> APIRouter:
    router = APIRouter(tags=["chat"], route_class=StrictJsonRoute)

    @router.post("/v1/chat/completions", response_model=ChatCompletion, responses=responses)
    async def create_chat_completion(request: Request, body: ChatCompletionRequest) -> Response:
        """Answer a conversation, whole or as a stream of server-sent events (`stream`)."""
        state.check_model(body.model)

        async def prepare(engine: InferenceEngine) -> tuple[Job, Presenter]:
            params = body.sampling_params()
            prompt = await engine.tokenize_chat([m.as_template_input() for m in body.messages])
            check_context([prompt], body.max_new_tokens, engine.model.max_model_len)
            job = Job(
                request_id=f"chatcmpl-{uuid.uuid4().hex}",
                prompts=[prompt],
                params=params,
                model=engine.model.name,
                created=int(time.time()),
                fingerprint=f"peregrine-{package_version()}-{engine.model.weight_format}",
                include_usage=bool(body.stream_options and body.stream_options.include_usage),
            )
            return job, _ChatPresenter(job)

        return await respond(
            request,
            state,
            is_stream=bool(body.stream),
            operation="chat",
            model=body.model,
            prompt=[m.as_template_input() for m in body.messages] if state.keeps_prompts else None,
            service_tier=body.service_tier,
            prepare=prepare,
        )

    return router


class _ChatPresenter:
    def __init__(self, job: Job) -> None:
        self._job = job
        self._has_begun: set[int] = set()
        head = json.dumps(common_fields(job, "chat.completion.chunk"), separators=(",", ":"))[:-1]
        if job.include_usage:
            head += ',"usage":null'
        # The constant part of every event, serialized once.
        self._head = f"data: {head},"

    def complete(self, choices: dict[tuple[int, int], CollectedChoice], usage: Usage) -> ChatCompletion:
        return ChatCompletion(
            **common_fields(self._job, "chat.completion"),
            choices=[
                ChatChoice(
                    index=index,
                    message=AssistantMessage(content=c.text),
                    logprobs=None if self._job.params.logprobs is None else chat_logprobs(c.logprobs),
                    finish_reason=c.finish_reason,
                    stop_reason=c.stop_reason,
                )
                for (_, index), c in sorted(choices.items())
            ],
            usage=usage,
        )

    def chunks(self, number: int, output: RequestOutput) -> bytes:
        chunk = b""
        if output.index not in self._has_begun:
            self._has_begun.add(output.index)
            chunk = self._chunk(output.index, '{"role":"assistant","content":""}')
        if output.text or output.logprobs:
            logprobs = "null"
            if output.logprobs is not None:
                logprobs = chat_logprobs(output.logprobs).model_dump_json()
            chunk += self._chunk(output.index, f'{{"content":{json.dumps(output.text)}}}', logprobs)
        if output.finish_reason is not None:
            stop_reason = f',"stop_reason":{json.dumps(output.stop_reason)}'
            chunk += self._chunk(output.index, "{}", "null", f'"{output.finish_reason}"{stop_reason}')
        return chunk

    def end(self, usage: Usage) -> bytes:
        if not self._job.include_usage:
            return DONE
        fields = common_fields(self._job, "chat.completion.chunk")
        return event({**fields, "choices": [], "usage": usage.model_dump()}) + DONE

    def failure(self, error: ApiError) -> bytes:
        return error_event(error) + DONE

    def _chunk(self, index: int, delta: str, logprobs: str = "null", finish: str = "null") -> bytes:
        return (
            f'{self._head}"choices":[{{"index":{index},"delta":{delta},"logprobs":{logprobs},'
            f'"finish_reason":{finish}}}]}}\n\n'
        ).encode()


def chat_logprobs(positions: list[PositionLogprobs] | tuple[PositionLogprobs, ...]) -> ChatLogprobs:
    return ChatLogprobs(
        content=[
            ChatLogprob(**_token(p.token), top_logprobs=[TopLogprob(**_token(t)) for t in p.top])
            for p in positions
        ]
    )


def _token(token: TokenLogprob) -> dict[str, Any]:
    return {"token": token.text, "logprob": token.logprob, "bytes": list(token.raw)}
