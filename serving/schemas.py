"""OpenAI's requests and responses, but for chat's. What is not served yet is refused, never ignored."""

from dataclasses import replace
from typing import Annotated, Literal

from pydantic import BaseModel, Field, StringConstraints, model_validator

from engine import ParameterError, SamplingParams
from engine.sampling_params import MAX_N
from serving.flushing import Flush
from serving.schema_types import MAX_STOP, Strict, StrictBool, StrictFloat, StrictInt, one_of
from serving.structured import StructuredFields

TokenId = Annotated[int, Field(strict=True, ge=0, le=2**31 - 1)]
Seed = Annotated[StrictInt, Field(ge=-(2**63), le=2**63 - 1)]
Stop = Annotated[
    str | list[str] | None,
    one_of("a non-empty string", f"an array of 1 to {MAX_STOP} non-empty strings", "null"),
]
Prompt = Annotated[
    str | list[str] | list[TokenId] | list[list[TokenId]],
    one_of(
        "a string",
        "a non-empty array of strings",
        "a non-empty array of token ids",
        "a non-empty array of arrays of token ids",
    ),
]


class StreamOptions(Strict):
    """`flush`, an extension: where chunks end."""

    include_usage: StrictBool = False
    include_obfuscation: StrictBool = False
    flush: Flush = "token"


class SamplingFields(StructuredFields):
    """Parameters of both endpoints. The last block is an extension, named as other servers name it."""

    model: Annotated[str, StringConstraints(min_length=1)]
    temperature: Annotated[StrictFloat, Field(ge=0, le=2)] | None = None
    top_p: Annotated[StrictFloat, Field(gt=0, le=1)] | None = None
    n: Annotated[StrictInt, Field(ge=1, le=MAX_N)] | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    stop: Stop = None
    presence_penalty: Annotated[StrictFloat, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[StrictFloat, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, Annotated[StrictFloat, Field(ge=-100, le=100)]] | None = None
    seed: Seed | None = None
    user: str | None = None
    service_tier: Annotated[str, StringConstraints(min_length=1, max_length=64)] | None = None

    top_k: Annotated[StrictInt, Field(ge=0, le=2**31 - 1)] | None = None
    min_p: Annotated[StrictFloat, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[StrictFloat, Field(gt=0, le=10)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64)] | None = None
    ignore_eos: StrictBool | None = None

    @property
    def flush(self) -> Flush:
        return "token" if self.stream_options is None else self.stream_options.flush

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> "SamplingFields":
        if self.stream_options is not None and not self.stream:
            raise ParameterError("stream_options", "is only allowed when stream is true")
        return self

    def _sampling(
        self, max_tokens: int | None, logprobs: int | None, prompt_logprobs: int | None
    ) -> SamplingParams:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return SamplingParams(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=self.top_k or 0,
            min_p=self.min_p or 0.0,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            seed=self.seed,
            stop=stop,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            max_tokens=max_tokens,
            ignore_eos=bool(self.ignore_eos),
            n=self.n or 1,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            logit_bias=_token_bias(self.logit_bias or {}),
            constraint=self.constraint,
        )


def _token_bias(raw: dict[str, float]) -> dict[int, float]:
    if bad := [key for key in raw if not (key.isascii() and key.isdigit() and len(key) < 10)]:
        raise ParameterError("logit_bias", f"keys must be token ids, got {bad[0]!r}")
    return {int(key): value for key, value in raw.items()}


class CompletionRequest(SamplingFields):
    prompt: Prompt
    max_tokens: Annotated[StrictInt, Field(ge=0, le=2**31 - 1)] | None = 16
    logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None
    echo: StrictBool | None = None
    best_of: Annotated[StrictInt, Field(ge=1, le=MAX_N)] | None = None
    suffix: str | None = None

    @model_validator(mode="after")
    def _combinations(self) -> "CompletionRequest":
        n = self.n or 1
        if self.best_of is not None and self.best_of < n:
            raise ParameterError("best_of", f"must be at least n, which is {n}")
        if self.stream and self.best_of is not None and self.best_of > n:
            raise ParameterError("best_of", "must equal n when stream is true: the best is known at the end")
        if self.max_tokens == 0 and not self.echo:
            raise ParameterError("max_tokens", "must be at least 1 unless echo is true")
        if self.suffix is not None and self.echo:
            raise ParameterError("echo", "must be false with suffix: the answer stands between the two")
        return self

    @property
    def max_new_tokens(self) -> int | None:
        return self.max_tokens

    @property
    def num_candidates(self) -> int:
        """Of which the n best are the answer."""
        return self.best_of or self.n or 1

    def sampling_params(self) -> SamplingParams:
        prompt_logprobs = self.logprobs if self.echo else None
        if self.max_tokens == 0:
            # Without a new token there is nothing to run: one is computed and dropped, whichever it is.
            one = self._sampling(1, None, prompt_logprobs)
            return replace(one, ignore_eos=True, stop=(), stop_token_ids=(), constraint=None)
        ranks = self.num_candidates > (self.n or 1)
        logprobs = 0 if ranks and self.logprobs is None else self.logprobs
        params = self._sampling(self.max_tokens, logprobs, prompt_logprobs)
        return params if params.n == self.num_candidates else replace(params, n=self.num_candidates)


class PromptTokensDetails(BaseModel):
    cached_tokens: int = 0


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Literal["stop", "length"]
    stop_reason: str | int | None = None


class Completion(BaseModel):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["peregrine"] = "peregrine"
    max_model_len: int


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(BaseModel):
    status: Literal["ok"] = "ok"


class Version(BaseModel):
    version: str


class Stats(BaseModel):
    """A replica's load, straight from its engine."""

    replica: str
    num_inflight: int
    num_running: int
    num_waiting: int
    num_blocks: int
    num_free_blocks: int
    num_cached_blocks: int
    num_waiting_tokens: int
    num_preempted: int
    total_steps: int
    total_prompt_tokens: int
    total_cached_tokens: int
    total_output_tokens: int
    total_preemptions: int
    total_drafts: int
    total_draft_tokens: int
    total_accepted_tokens: int
    last_step_s: float
    prompt_tokens_per_s: float
