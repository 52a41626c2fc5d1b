"""POST /v1/embeddings."""

import base64
import sys
import time
import uuid
from array import array
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request, Response

from engine import InferenceEngine, ParameterError, SamplingParams
from serving.api.generation import CollectedChoice, Job, WholePresenter, respond
from serving.embedding_schemas import Embedding, EmbeddingList, EmbeddingRequest, EmbeddingUsage
from serving.errors import ApiError
from serving.schemas import Usage
from serving.state import ReplicaState, package_version
from serving.strict_json import StrictJsonRoute

MAX_INPUTS = 2048
"""OpenAI's own limit."""


def embeddings_router(state: ReplicaState, responses: dict[int | str, dict[str, Any]]) -> APIRouter:
    router = APIRouter(tags=["embeddings"], route_class=StrictJsonRoute)

    @router.post("/v1/embeddings", response_model=EmbeddingList, responses=responses)
    async def create_embeddings(request: Request, body: EmbeddingRequest) -> Response:
        """A vector of length 1 for each input, from the model's last hidden states."""
        state.check_model(body.model)

        async def prepare(engine: InferenceEngine) -> tuple[Job, WholePresenter]:
            _check_dimensions(body.dimensions, engine.model.hidden_size)
            job = Job(
                request_id=f"embd-{uuid.uuid4().hex}",
                prompts=await _tokenize(engine, body.inputs),
                params=SamplingParams(),
                pooling=body.pooling_params(),
                model=engine.model.name,
                created=int(time.time()),
                fingerprint=f"peregrine-{package_version()}-{engine.model.weight_format}",
                include_usage=False,
            )
            return job, _EmbeddingPresenter(job, is_base64=body.encoding_format == "base64")

        return await respond(
            request,
            state,
            is_stream=False,
            operation="embeddings",
            model=body.model,
            prompt=body.input,
            service_tier=body.service_tier,
            prepare=prepare,
        )

    return router


def _check_dimensions(asked: int | None, hidden_size: int) -> None:
    """A vector cut short means something only where the model was trained for it (Kusupati et al. 2022)."""
    if asked is not None and asked != hidden_size:
        raise ParameterError("dimensions", f"must be {hidden_size}, the size of this model's embeddings")


async def _tokenize(engine: InferenceEngine, inputs: Sequence[str | list[int]]) -> list[list[int]]:
    if len(inputs) > MAX_INPUTS:
        raise ParameterError("input", f"at most {MAX_INPUTS} inputs, got {len(inputs)}")
    prompts = [await engine.tokenize(i) if isinstance(i, str) else i for i in inputs]
    limit, vocab_size = engine.model.max_model_len, engine.model.vocab_size
    for number, prompt in enumerate(prompts):
        field = "input" if len(prompts) == 1 else f"input[{number}]"
        if not prompt:
            raise ParameterError(field, "must have at least one token")
        if max(prompt) >= vocab_size:
            raise ParameterError(field, f"token ids must be in [0, {vocab_size - 1}]")
        if len(prompt) > limit:
            raise ApiError(
                400,
                f"This model's maximum context length is {limit} tokens; {field} has {len(prompt)}.",
                param=field,
                code="context_length_exceeded",
            )
    return prompts


class _EmbeddingPresenter:
    def __init__(self, job: Job, *, is_base64: bool) -> None:
        self._job = job
        self._is_base64 = is_base64

    def complete(self, choices: dict[tuple[int, int], CollectedChoice], usage: Usage) -> EmbeddingList:
        return EmbeddingList(
            data=[
                Embedding(index=number, embedding=self._shown(choice.embedding))
                for (number, _), choice in sorted(choices.items())
            ],
            model=self._job.model,
            usage=EmbeddingUsage(prompt_tokens=usage.prompt_tokens, total_tokens=usage.total_tokens),
        )

    def _shown(self, embedding: tuple[float, ...]) -> list[float] | str:
        if not self._is_base64:
            return list(embedding)
        numbers = array("f", embedding)
        if sys.byteorder == "big":
            numbers.byteswap()
        return base64.b64encode(numbers.tobytes()).decode()
