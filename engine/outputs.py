"""What leaves the engine: plain frozen data, no tensors, picklable."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from engine.step_cost import StepCost

FinishReason = Literal["stop", "length", "abort"]
StepKind = Literal["decode", "mixed", "prefill"]
"""By whether a step computed prompt tokens: none, beside decodes, or alone."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One candidate token and its natural-log probability.

    `raw` holds the token's own bytes, which need not be valid UTF-8 alone.
    """

    token_id: int
    text: str
    raw: bytes
    logprob: float


@dataclass(frozen=True, slots=True)
class PositionLogprobs:
    """The token at one position and the most likely alternatives there, best first."""

    token: TokenLogprob
    top: tuple[TokenLogprob, ...]


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """What one step added to one choice of one request (a delta, never the whole).

    `text` may be empty while bytes of an unfinished character, or a possible stop string, are held
    back. The last output of a choice carries `finish_reason`; `stop_reason` is the stop string or the
    stop token id that ended it (None for the end-of-sequence token and for `length`).
    `prompt_logprobs` comes once, with the first output; its first entry is None (nothing precedes it).
    """

    request_id: str
    index: int
    text: str
    token_ids: tuple[int, ...]
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    logprobs: tuple[PositionLogprobs, ...] | None = None
    prompt_logprobs: tuple[PositionLogprobs | None, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    first_scheduled_s: float | None = None
    """time.monotonic() of the choice's first step; None where the engine does not say."""
    embedding: tuple[float, ...] | None = None
    """Of a prompt that was to be embedded: `ModelInfo.hidden_size` numbers, a vector of length 1."""


@dataclass(frozen=True, slots=True)
class RequestTimings:
    """One finished choice, for the recorder. Seconds; `itl_s` has one entry per output token after the first.

    `queue_wait_s` is arrival to first scheduling, `ttft_s` arrival to first output token.
    """

    request_id: str
    finish_reason: FinishReason
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    queue_wait_s: float
    ttft_s: float | None
    e2e_s: float
    itl_s: tuple[float, ...]
    tier: str = ""
    is_in_time: bool = False
    """The first token came before the request's deadline."""


@dataclass(frozen=True, slots=True)
class StepTimes:
    """What steps took, added up since the last time that somebody asked. Seconds.

    gaps: (tier, time between two neighbouring tokens of a sequence) -> tokens. The sequences of a step share
        their gap, so that there are about as many entries as steps.
    steps: kind and duration of each.
    """

    gaps: Mapping[tuple[str, float], int] = field(default_factory=dict)
    steps: tuple[tuple[StepKind, float], ...] = ()


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot of the engine's load and its counters since start."""

    num_running: int
    num_waiting: int
    num_blocks: int
    num_free_blocks: int
    """Blocks that no request holds (cached but unreferenced ones included)."""
    num_cached_blocks: int
    """Unreferenced blocks whose contents are kept for a prefix hit."""
    num_waiting_tokens: int
    """Prompt tokens not yet computed, over all requests."""
    total_steps: int
    total_prompt_tokens: int
    total_cached_tokens: int
    total_output_tokens: int
    total_preemptions: int
    last_step_s: float
    total_drafts: int = 0
    """Verifications of one sequence's drafts; each brought 1 + accepted / drafts tokens in the mean."""
    total_draft_tokens: int = 0
    total_accepted_tokens: int = 0
    num_preempted: int = 0
    """Of those that wait: gave up their blocks, and compute their tokens again."""
    step_cost: StepCost | None = None
    """Measured while warming up, and by every step since."""
    token_budget: int = 512
    """Most tokens of a step."""

    def prompts_s(self, num_tokens: int) -> float:
        """Seconds in which so many prompt tokens are computed, nothing beside them; 0 while unknown.

        By the steps, for a step of few tokens takes nearly as long as one of many: no mean rate fits both.
        """
        return 0.0 if self.step_cost is None else self.step_cost.prompts_s(num_tokens, self.token_budget)

    @property
    def prompt_tokens_per_s(self) -> float:
        """At which a long prompt is computed; 0 while unknown."""
        seconds = self.prompts_s(self.token_budget)
        return self.token_budget / seconds if seconds > 0 else 0.0


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The loaded model, as the API presents it."""

    name: str
    architecture: str
    num_parameters: int
    max_model_len: int
    vocab_size: int
    weight_bytes: int
    weight_format: str
    hidden_size: int = 0
    """Numbers of an embedding."""
