"""What AsyncEngine and EngineCore say to each other: small, frozen, picklable."""

from dataclasses import dataclass

from engine.outputs import EngineStats, FinishReason, ModelInfo, StepKind
from engine.pooling_params import PoolingParams
from engine.sampling_params import SamplingParams
from engine.urgency import NOT_URGENT, Urgency

RawLogprobs = tuple[tuple[int, float], ...]
"""(token id, logprob) pairs of one position: the token itself first, then the alternatives, best first."""


@dataclass(frozen=True, slots=True)
class AddRequest:
    """One sequence to generate (one choice of a request), or with `pooling` one prompt to embed."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    arrival_time: float
    urgency: Urgency = NOT_URGENT
    pooling: PoolingParams | None = None


@dataclass(frozen=True, slots=True)
class AbortRequests:
    request_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Ping:
    number: int


@dataclass(frozen=True, slots=True)
class Shutdown:
    pass


ToCore = AddRequest | AbortRequests | Ping | Shutdown


@dataclass(frozen=True, slots=True)
class TokenOutput:
    """One sequence's new token, or its end (an aborted sequence ends without one).

    stop_reason: the token of `stop_token_ids` that ended it, or why the engine had to abort it.
    """

    request_id: str
    token_id: int | None
    num_cached_tokens: int
    first_scheduled_time: float | None
    logprobs: RawLogprobs | None = None
    prompt_logprobs: tuple[RawLogprobs, ...] | None = None
    embedding: tuple[float, ...] | None = None
    """In place of a token."""
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


@dataclass(frozen=True, slots=True)
class StepOutputs:
    """Everything one step brought: a sequence's tokens in order, several where drafts were accepted.

    `time` is time.monotonic() when the step's tokens were known. `kind` is None where no step was made.
    """

    time: float
    outputs: tuple[TokenOutput, ...]
    stats: EngineStats
    kind: StepKind | None = None


@dataclass(frozen=True, slots=True)
class Pong:
    number: int


@dataclass(frozen=True, slots=True)
class CoreReady:
    """The core loaded its model and is warm."""

    model: ModelInfo
    stats: EngineStats


@dataclass(frozen=True, slots=True)
class CoreFailed:
    """The core stopped. `error` is what to raise in those who wait for it."""

    error: Exception


FromCore = StepOutputs | Pong | CoreReady | CoreFailed
