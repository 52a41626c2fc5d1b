"""POST /v1/completions."""

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastapi import APIRouter, Request, Response

from engine import InferenceEngine, ParameterError, PositionLogprobs, RequestOutput
from serving.api.completion_logprobs import LogprobsWriter
from serving.api.generation import CollectedChoice, Job, Presenter, check_context, common_fields, respond
from serving.errors import ApiError
from serving.fim import find_fim
from serving.schemas import Completion, CompletionChoice, CompletionRequest, Usage
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
            params, given = body.sampling_params(), _prompts(body.prompt)
            if body.suffix is None:
                prompts = [await engine.tokenize(p) if isinstance(p, str) else p for p in given]
            else:
                fim = find_fim(engine)
                prompts = [await fim.prompt(engine, p, body.suffix) for p in given]
                params = replace(params, stop_token_ids=(*params.stop_token_ids, *fim.stop_token_ids))
            check_context(prompts, body.max_new_tokens, engine.model.max_model_len)
            job = Job(
                request_id=f"cmpl-{uuid.uuid4().hex}",
                prompts=prompts,
                params=params,
                model=engine.model.name,
                created=int(time.time()),
                fingerprint=f"peregrine-{package_version()}-{engine.model.weight_format}",
                include_usage=bool(body.stream_options and body.stream_options.include_usage),
                flush=body.flush,
            )
            echoed = []
            if body.echo:
                echoed = [_Echo(engine.detokenize(p), engine.token_bytes(p[0])) for p in prompts if p]
            return job, _CompletionPresenter(job, body, echoed)

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


def _prompts(prompt: Any) -> list[str | list[int]]:
    prompts = prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]
    if len(prompts) > MAX_PROMPTS:
        raise ParameterError("prompt", f"at most {MAX_PROMPTS} prompts, got {len(prompts)}")
    return prompts


@dataclass(frozen=True, slots=True)
class _Echo:
    """A prompt as text, and the bytes of its first token, which has no logprob."""

    text: str
    first_token: bytes


class _CompletionPresenter:
    def __init__(self, job: Job, body: CompletionRequest, echoed: list[_Echo]) -> None:
        self._job = job
        self._num_choices = body.n or 1
        self._is_echo_only = body.max_tokens == 0
        self._shows_logprobs = body.logprobs is not None
        self._echoed = echoed
        self._writers: dict[int, LogprobsWriter] = {}
        self._prompt_logprobs: dict[int, tuple[PositionLogprobs | None, ...]] = {}
        head = json.dumps(common_fields(job, "text_completion"), separators=(",", ":"))[:-1]
        if job.include_usage:
            head += ',"usage":null'
        self._head = f"data: {head},"

    def complete(self, choices: dict[tuple[int, int], CollectedChoice], usage: Usage) -> Completion:
        for (number, _), choice in choices.items():
            self._note_prompt(number, choice.prompt_logprobs)
        return Completion(
            **common_fields(self._job, "text_completion"),
            choices=[
                self._choice(number, index, choice)
                for number in range(len(self._job.prompts))
                for index, choice in enumerate(self._best(number, choices))
            ],
            usage=self._counted(usage),
        )

    def chunks(self, number: int, output: RequestOutput) -> bytes:
        index = number * self._job.params.n + output.index
        positions: list[PositionLogprobs | None] = list(output.logprobs or ())
        text = output.text
        if self._is_echo_only:
            text, positions = "", []
        if index not in self._writers:
            self._writers[index] = self._writer(number)
            self._note_prompt(number, output.prompt_logprobs)
            if self._echoed:
                text = self._echoed[number].text + text
                positions = [*self._prompt_logprobs.get(number, ()), *positions]
        logprobs = "null"
        if self._shows_logprobs:
            logprobs = self._writers[index].write(positions).model_dump_json()
        if not (text or positions or output.finish_reason):
            return b""
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
        return event({**fields, "choices": [], "usage": self._counted(usage).model_dump()}) + DONE

    def failure(self, error: ApiError) -> bytes:
        return error_event(error) + DONE

    def _best(
        self, prompt: int, choices: dict[tuple[int, int], CollectedChoice]
    ) -> Sequence[CollectedChoice]:
        """A prompt's choices; of more than asked for those of the highest mean logprob, best first."""
        candidates = [choice for (number, _), choice in sorted(choices.items()) if number == prompt]
        if len(candidates) == self._num_choices:
            return candidates
        return sorted(candidates, key=_mean_logprob, reverse=True)[: self._num_choices]

    def _choice(self, number: int, index: int, choice: CollectedChoice) -> CompletionChoice:
        text = "" if self._is_echo_only else choice.text
        positions: list[PositionLogprobs | None] = [] if self._is_echo_only else list(choice.logprobs)
        if self._echoed:
            text = self._echoed[number].text + text
            positions = [*self._prompt_logprobs.get(number, ()), *positions]
        return CompletionChoice(
            index=number * self._num_choices + index,
            text=text,
            logprobs=self._writer(number).write(positions) if self._shows_logprobs else None,
            finish_reason=choice.finish_reason,
            stop_reason=choice.stop_reason,
        )

    def _note_prompt(self, number: int, logprobs: tuple[PositionLogprobs | None, ...] | None) -> None:
        """Choices of one prompt share its logprobs, which come with the first one's first output."""
        if logprobs is not None:
            self._prompt_logprobs[number] = logprobs

    def _writer(self, number: int) -> LogprobsWriter:
        return LogprobsWriter(self._echoed[number].first_token if self._echoed else b"")

    def _counted(self, usage: Usage) -> Usage:
        if not self._is_echo_only:
            return usage
        return usage.model_copy(update={"completion_tokens": 0, "total_tokens": usage.prompt_tokens})


def _mean_logprob(choice: CollectedChoice) -> float:
    return sum(p.token.logprob for p in choice.logprobs) / max(1, len(choice.logprobs))
