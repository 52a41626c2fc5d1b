"""What chat and completions have in common: admission, the deadline, collecting and streaming."""

import asyncio
import functools
import math
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, cast

from fastapi import Request, Response
from pydantic import BaseModel

from engine import (
    EngineDeadError,
    InferenceEngine,
    PoolingParams,
    PositionLogprobs,
    RequestOutput,
    SamplingParams,
)
from serving.dispatch.reporter import Flight, refusal_wait_s
from serving.errors import ApiError, from_engine, overloaded
from serving.flushing import Flush, flushed
from serving.schemas import PromptTokensDetails, Usage
from serving.state import ReplicaState, generate_all
from serving.stream_guard import Watch, chunked
from serving.streaming import ClientGone, SseResponse, unless_client_leaves
from serving.telemetry.exchange import CLIENT_GONE, Exchange, Generation, Operation
from serving.tenants.visit import Visit
from serving.tiers import choose_service

Outputs = AsyncGenerator[tuple[int, RequestOutput], None]

# By then the engine computes, which a first byte waits for and this need not.
_WATCH_AFTER_S = 0.002
_KILLED = from_engine(EngineDeadError("the replica's process ended"))


@dataclass(frozen=True, slots=True)
class Job:
    """A validated request on its way through the engine; with `pooling` its prompts are embedded."""

    request_id: str
    prompts: Sequence[Sequence[int]]
    params: SamplingParams
    model: str
    created: int
    fingerprint: str
    include_usage: bool
    pooling: PoolingParams | None = None
    flush: Flush = "token"
    """Where a stream's chunks end."""

    @property
    def max_output_tokens(self) -> int | None:
        """Over all choices; None: as many as the model's context holds."""
        if self.pooling is not None:
            return 0
        limit = self.params.max_tokens
        return None if limit is None else limit * self.params.n * len(self.prompts)


@dataclass(slots=True)
class CollectedChoice:
    """One choice, summed up."""

    text: str = ""
    logprobs: list[PositionLogprobs] = field(default_factory=list)
    prompt_logprobs: tuple[PositionLogprobs | None, ...] | None = None
    finish_reason: Literal["stop", "length"] = "length"
    stop_reason: str | int | None = None
    embedding: tuple[float, ...] = ()


@dataclass(slots=True)
class UsageCounter:
    """Token counts over all prompts and choices."""

    _prompt: dict[int, tuple[int, int]] = field(default_factory=dict)
    _output: dict[tuple[int, int], int] = field(default_factory=dict)

    def add(self, number: int, output: RequestOutput) -> None:
        self._output[number, output.index] = output.num_output_tokens
        if output.index == 0:
            self._prompt[number] = (output.num_prompt_tokens, output.num_cached_tokens)

    def tell(self, made: Generation) -> None:
        """No more outputs come."""
        usage = self.usage()
        cached = usage.prompt_tokens_details.cached_tokens
        made.stopped(usage.prompt_tokens, cached, usage.completion_tokens)

    def usage(self) -> Usage:
        prompt = sum(n for n, _ in self._prompt.values())
        completion = sum(self._output.values())
        return Usage(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(c for _, c in self._prompt.values())),
        )


class WholePresenter(Protocol):
    """How an endpoint shows a job's outputs, once all are there."""

    def complete(self, choices: dict[tuple[int, int], CollectedChoice], usage: Usage) -> BaseModel: ...


class Presenter(WholePresenter, Protocol):
    """The same, and as they come."""

    def chunks(self, number: int, output: RequestOutput) -> bytes:
        """The events of one output; empty when there is nothing to show yet."""
        ...

    def end(self, usage: Usage) -> bytes:
        """The last events of a stream that is whole."""
        ...

    def failure(self, error: ApiError) -> bytes:
        """The last events of a stream that broke off."""
        ...


async def respond(
    request: Request,
    state: ReplicaState,
    *,
    is_stream: bool,
    operation: Operation,
    model: str,
    prompt: object,
    service_tier: str | None,
    prepare: Callable[[InferenceEngine], Awaitable[tuple[Job, WholePresenter]]],
) -> Response:
    """Run one request to its response.

    The first output is awaited before anything is sent, so that a request that cannot run fails with a
    status code. From then on a failure ends the stream with an error event.

    prompt: as the client sent it, for a log that was asked to show it.
    """
    stamped = request.scope["state"]  # by `FrontDoor`
    arrival: float = stamped["arrival_time"]
    deadline = asyncio.get_running_loop().time() + state.settings.request_timeout_s
    flight: Flight | None = stamped["flight"]
    exchange: Exchange = stamped["exchange"]
    visit: Visit = stamped["visit"]
    visit.check_model(model)
    if state.links is not None and (wait_s := refusal_wait_s(request.headers)) is not None:
        state.recorder.record_refusal("router")
        message = "Every replica is full, failing or leaving; retry later."
        raise overloaded(message, max(state.settings.retry_after_s, math.ceil(wait_s)))
    service = choose_service(state.settings.tiers, visit.tier(service_tier), request.headers, arrival)
    visit.check_tier(service.tier)
    made = exchange.generation = Generation(operation, model, service.tier, service.ttft_s, is_stream)
    if state.keeps_prompts:
        made.prompt = prompt
    with state.admit(service) as engine:
        job, presenter = await prepare(engine)
        num_tokens = sum(map(len, job.prompts))
        made.response_id, made.num_prompt_tokens = job.request_id, num_tokens
        made.params = None if job.pooling is not None else job.params
        state.admission.check_deadline(service, num_tokens)
        await visit.admit(num_tokens, job.max_output_tokens)
        made.queued_s = time.monotonic()
        outputs = state.admission.watch(
            generate_all(
                engine, job.prompts, job.pooling or job.params, job.request_id, arrival, service.urgency
            ),
            service,
            num_tokens,
        )
        if not is_stream:
            try:
                work = asyncio.create_task(_collect(outputs, presenter, flight, made))
                body = await unless_client_leaves(request.receive, work, deadline)
            except ClientGone:
                return Response(status_code=CLIENT_GONE)  # nobody reads it; the log and the metrics do
            return Response(body.model_dump_json(), media_type="application/json")
        presenter = cast(Presenter, presenter)  # of an operation that is streamed
        if job.flush != "token":
            outputs = flushed(outputs, job.flush, functools.partial(_began, made, flight))
        watch = Watch(state.guard, request.scope, lambda: chunked(presenter.failure(_KILLED)))
        asyncio.get_running_loop().call_later(_WATCH_AFTER_S, watch.begin)
        try:
            first = await unless_client_leaves(request.receive, anext(outputs), deadline)
        except BaseException as error:
            watch.end()
            if isinstance(error, ClientGone):
                return Response(status_code=CLIENT_GONE)
            raise
        if flight is not None:
            flight.first_token(time.monotonic())
    # The stream outlives this function: it holds its own place among the requests in flight.
    chunks = _stream(state, outputs, first, presenter, deadline, flight, exchange)
    return SseResponse(chunks, watch)


def _began(made: Generation, flight: Flight | None, output: RequestOutput) -> None:
    """Times are those of the engine's outputs, also where a client gets them later."""
    made.began(output)
    if flight is not None:
        flight.first_token(time.monotonic())


async def _collect(
    outputs: Outputs, presenter: WholePresenter, flight: Flight | None, made: Generation
) -> BaseModel:
    choices: dict[tuple[int, int], CollectedChoice] = {}
    usage = UsageCounter()
    try:
        async for number, output in outputs:
            made.note(output)
            if flight is not None:
                flight.first_token(time.monotonic())
            usage.add(number, output)
            choice = choices.setdefault((number, output.index), CollectedChoice())
            choice.text += output.text
            choice.logprobs.extend(output.logprobs or ())
            choice.prompt_logprobs = choice.prompt_logprobs or output.prompt_logprobs
            if output.finish_reason == "abort":
                raise _aborted(output)
            if output.finish_reason is not None:
                choice.finish_reason = output.finish_reason
            choice.stop_reason = output.stop_reason
            choice.embedding = output.embedding or ()
    finally:
        usage.tell(made)
    made.is_complete = True
    if flight is not None:
        flight.ended("finished", usage.usage().completion_tokens)
    return presenter.complete(choices, usage.usage())


async def _stream(
    state: ReplicaState,
    outputs: Outputs,
    first: tuple[int, RequestOutput],
    presenter: Presenter,
    deadline: float,
    flight: Flight | None,
    exchange: Exchange,
) -> AsyncGenerator[bytes, None]:
    usage, made = UsageCounter(), exchange.generation
    assert made is not None
    state.admission.num_inflight += 1
    try:
        number, output = first
        made.note(output)
        async with asyncio.timeout_at(deadline):
            while True:
                usage.add(number, output)
                if output.finish_reason == "abort":
                    raise _aborted(output)
                if chunk := presenter.chunks(number, output):
                    yield chunk
                try:
                    number, output = await anext(outputs)
                    made.note(output)
                except StopAsyncIteration:
                    break
        if flight is not None:
            flight.ended("finished", usage.usage().completion_tokens)
        last = presenter.end(usage.usage())
        made.is_complete = True
        yield last
    except Exception as error:
        if flight is not None:
            flight.ended("failed")
        told = from_engine(error)
        exchange.error = told.code
        yield presenter.failure(told)
    finally:
        state.admission.num_inflight -= 1
        usage.tell(made)
        await outputs.aclose()


def _aborted(output: RequestOutput) -> Exception:
    if output.stop_reason is None:
        return EngineDeadError("aborted")
    message = f"The output could not be held to what the request asks for: {output.stop_reason}"
    return ApiError(400, message, code="constraint_failed")


def check_context(prompts: Sequence[Sequence[int]], max_new_tokens: int | None, max_model_len: int) -> None:
    """Refuse an answer length that cannot be had (the prompt's own length is the engine's to check)."""
    longest = max(len(p) for p in prompts)
    if max_new_tokens is None or longest >= max_model_len or longest + max_new_tokens <= max_model_len:
        return
    raise ApiError(
        400,
        f"This model's maximum context length is {max_model_len} tokens; {longest} tokens of prompt and "
        f"max_tokens {max_new_tokens} exceed it.",
        param="max_tokens",
        code="context_length_exceeded",
    )


def common_fields(job: Job, object_name: str) -> dict[str, Any]:
    return {
        "id": job.request_id,
        "object": object_name,
        "created": job.created,
        "model": job.model,
        "system_fingerprint": job.fingerprint,
    }
