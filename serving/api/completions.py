"""POST /v1/completions."""

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request, Response

from engine import InferenceEngine, PositionLogprobs, RequestOutput
from serving.api.generation import CollectedChoice, Job, Presenter, check_context, common_fields, respond
from serving.errors import ApiError
from serving.schemas import Completion, CompletionChoice, CompletionLogprobs, CompletionRequest, Usage
from serving.state import ReplicaState, package_version
from serving.streaming import DONE, error_event, event
from serving.strict_json import StrictJsonRoute

MAX_PROMPTS = 64


def completions_router(state: ReplicaState, responses: dict[int | str, dict[str, Any]]) -> APIRouter:
    router = APIRouter(tags=["completions"], route_class=StrictJsonRoute)

    @router.post("/v1/completions", response_model=Completion, responses=responses)
    async def create_completion(request: Request, body: CompletionRequest) -> Response:
        """Continue one or several prompts, whole or as a stream of server-sent events (`stream`)."""
        state.check_model(body.model)

        async def prepare(engine: InferenceEngine) -> tuple[Job, Presenter]:
            params = body.sampling_params()
            prompts = await _tokenize(engine, body.prompt)
            check_context(prompts, body.max_new_tokens, engine.model.max_model_len)
            job = Job(
                request_id=f"cmpl-{uuid.uuid4().hex}",
                prompts=prompts,
                params=params,
                model=engine.model.name,
                created=int(time.time()),
                fingerprint=f"peregrine-{package_version()}-{engine.model.weight_format}",
                include_usage=bool(body.stream_options and body.stream_options.include_usage),
            )
            echoed = (
                [_Echo(engine.detokenize(p), engine.detokenize(p[:1])) for p in prompts] if body.echo else []
            )
            return job, _CompletionPresenter(job, echoed, is_echo_only=body.max_tokens == 0)

        return await respond(
            request,
            state,
            is_stream=bool(body.stream),
            operation="text_completion",
            model=body.model,
            prompt=body.prompt,
            service_tier=body.service_tier,
            prepare=prepare,
        )

    return router


async def _tokenize(engine: InferenceEngine, prompt: Any) -> list[list[int]]:
    prompts = prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]
    if len(prompts) > MAX_PROMPTS:
        raise ApiError(400, f"prompt: at most {MAX_PROMPTS} prompts, got {len(prompts)}", param="prompt")
    return [await engine.tokenize(p) if isinstance(p, str) else list(p) for p in prompts]


@dataclass(frozen=True, slots=True)
class _Echo:
    """A prompt as text, and the text of its first token, which has no logprob."""

    text: str
    first_token: str


class _CompletionPresenter:
    def __init__(self, job: Job, echoed: list[_Echo], *, is_echo_only: bool) -> None:
        self._job = job
        self._echoed = echoed
        self._is_echo_only = is_echo_only
        self._offsets: dict[int, int] = {}
        head = json.dumps(common_fields(job, "text_completion"), separators=(",", ":"))[:-1]
        if job.include_usage:
            head += ',"usage":null'
        self._head = f"data: {head},"

    def complete(self, choices: dict[tuple[int, int], CollectedChoice], usage: Usage) -> Completion:
        # Sibling choices share the prompt, hence the logprobs that the first one computed for it.
        prompt_logprobs = {n: c.prompt_logprobs for (n, _), c in choices.items() if c.prompt_logprobs}
        return Completion(
            **common_fields(self._job, "text_completion"),
            choices=[
                self._choice(number, index, c, prompt_logprobs.get(number))
                for (number, index), c in sorted(choices.items())
            ],
            usage=usage,
        )

    def chunks(self, number: int, output: RequestOutput) -> bytes:
        index = number * self._job.params.n + output.index
        positions: list[PositionLogprobs | None] = list(output.logprobs or ())
        text = output.text
        is_first = index not in self._offsets
        if self._is_echo_only:
            text, positions = "", []
        if is_first:
            self._offsets[index] = 0
            if self._echoed:
                text = self._echoed[number].text + text
                positions = [*(output.prompt_logprobs or ()), *positions]
        logprobs = "null"
        if self._job.params.logprobs is not None:
            shown = completion_logprobs(positions, self._offsets[index], self._first_token(number))
            logprobs = shown.model_dump_json()
        if not (text or positions or output.finish_reason):
            return b""
        self._offsets[index] += len(text)
        finish = json.dumps(output.finish_reason)
        if output.finish_reason is not None:
            finish += f',"stop_reason":{json.dumps(output.stop_reason)}'
        return (
            f'{self._head}"choices":[{{"index":{index},"text":{json.dumps(text)},"logprobs":{logprobs},'
            f'"finish_reason":{finish}}}]}}\n\n'
        ).encode()

    def end(self, usage: Usage) -> bytes:
        if not self._job.include_usage:
            return DONE
        fields = common_fields(self._job, "text_completion")
        return event({**fields, "choices": [], "usage": usage.model_dump()}) + DONE

    def failure(self, error: ApiError) -> bytes:
        return error_event(error) + DONE

    def _choice(
        self,
        number: int,
        index: int,
        choice: CollectedChoice,
        prompt_logprobs: tuple[PositionLogprobs | None, ...] | None,
    ) -> CompletionChoice:
        text = "" if self._is_echo_only else choice.text
        positions: list[PositionLogprobs | None] = [] if self._is_echo_only else list(choice.logprobs)
        if self._echoed:
            text = self._echoed[number].text + text
            positions = [*(prompt_logprobs or ()), *positions]
        return CompletionChoice(
            index=number * self._job.params.n + index,
            text=text,
            logprobs=None
            if self._job.params.logprobs is None
            else completion_logprobs(positions, 0, self._first_token(number)),
            finish_reason=choice.finish_reason,
            stop_reason=choice.stop_reason,
        )

    def _first_token(self, number: int) -> str:
        return self._echoed[number].first_token if self._echoed else ""


def completion_logprobs(
    positions: Sequence[PositionLogprobs | None], offset: int, first_token: str
) -> CompletionLogprobs:
    """The older format, parallel lists. A None position is the prompt's first token: text, no logprob."""
    shown = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
    for position in positions:
        text = first_token if position is None else position.token.text
        shown.tokens.append(text)
        shown.token_logprobs.append(None if position is None else position.token.logprob)
        shown.top_logprobs.append(None if position is None else {t.text: t.logprob for t in position.top})
        shown.text_offset.append(offset)
        offset += len(text)
    return shown
