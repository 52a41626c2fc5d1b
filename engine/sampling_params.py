"""How one request samples: every parameter, its range, and the error that names it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from engine.constraint import Constraint
from engine.errors import ParameterError

MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_N = 64
MAX_LOGIT_BIAS = 300  # OpenAI's own limit, and the room of a row on the GPU


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling parameters of one request; validated at birth.

    Args:
        temperature: 0 is greedy; at most 2.
        top_p: nucleus mass in (0, 1].
        top_k: number of most likely tokens kept; 0 keeps all.
        min_p: tokens less likely than `min_p` times the most likely one are dropped; in [0, 1].
        repetition_penalty: CTRL-style divisor over prompt and output tokens, in (0, 10]; 1 is off.
        presence_penalty: subtracted once from the logit of every output token seen; in [-2, 2].
        frequency_penalty: subtracted per occurrence in the output; in [-2, 2].
        seed: makes the request's sampling reproducible, whatever runs beside it.
        stop: strings that end the output; they are not part of it.
        stop_token_ids: tokens that end the output; they are not part of the text.
        max_tokens: upper limit of output tokens; None means up to the model's context.
        ignore_eos: go on past the end-of-sequence token (benchmarks).
        n: number of independent outputs of one prompt.
        logprobs: number of most likely alternatives reported with each output token; 0 reports the
            sampled token alone, None nothing.
        prompt_logprobs: the same for the prompt's tokens (turns prefix hits off for this request).
        logit_bias: token id -> value in [-100, 100] added to its logit before sampling.
        visible_tokens: special tokens that stay in the text, as the vocabulary spells them; those that the
            vocabulary does not have are ignored.
        constraint: the language that the output belongs to; tokens that leave it are never sampled.

    Raises:
        ParameterError: naming the field and the allowed values.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    max_tokens: int | None = None
    ignore_eos: bool = False
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    visible_tokens: tuple[str, ...] = ()
    constraint: Constraint | None = None

    def __post_init__(self) -> None:
        _in_range("temperature", self.temperature, 0.0, 2.0)
        _in_range("top_p", self.top_p, 0.0, 1.0, low_open=True)
        _int_in_range("top_k", self.top_k, 0, None)
        _in_range("min_p", self.min_p, 0.0, 1.0)
        _in_range("repetition_penalty", self.repetition_penalty, 0.0, 10.0, low_open=True)
        _in_range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _in_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _int_in_range("n", self.n, 1, MAX_N)
        if self.seed is not None:
            _int_in_range("seed", self.seed, -(2**63), 2**63 - 1)
        if self.max_tokens is not None:
            _int_in_range("max_tokens", self.max_tokens, 1, None)
        for name in ("logprobs", "prompt_logprobs"):
            if (value := getattr(self, name)) is not None:
                _int_in_range(name, value, 0, MAX_LOGPROBS)
        if len(self.stop) > MAX_STOP_STRINGS:
            raise ParameterError("stop", f"at most {MAX_STOP_STRINGS} stop strings, got {len(self.stop)}")
        if not all(isinstance(s, str) and s for s in self.stop):
            raise ParameterError("stop", "stop strings must be non-empty strings")
        for token_id in self.stop_token_ids:
            _int_in_range("stop_token_ids", token_id, 0, None)
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise ParameterError("logit_bias", f"at most {MAX_LOGIT_BIAS} tokens, got {len(self.logit_bias)}")
        for token_id, bias in self.logit_bias.items():
            _int_in_range("logit_bias", token_id, 0, None)
            _in_range("logit_bias", bias, -100.0, 100.0)
        if self.constraint is not None and not isinstance(self.constraint, Constraint):
            raise ParameterError(
                "constraint", f"must be a Constraint or None, got {type(self.constraint).__name__}"
            )
        if self.constraint is not None and self.ignore_eos:
            reason = f"must be false with {self.constraint.name}, which says where the output ends"
            raise ParameterError("ignore_eos", reason)

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def has_penalties(self) -> bool:
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


def _in_range(name: str, value: float, low: float, high: float, *, low_open: bool = False) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if (
        not is_number
        or not math.isfinite(value)
        or value > high
        or value < low
        or (low_open and value == low)
    ):
        bracket = "(" if low_open else "["
        raise ParameterError(name, f"must be a number in {bracket}{low:g}, {high:g}], got {value!r}")


def _int_in_range(name: str, value: int, low: int, high: int | None) -> None:
    is_int = isinstance(value, int) and not isinstance(value, bool)
    if not is_int or value < low or (high is not None and value > high):
        allowed = f"at least {low}" if high is None else f"in [{low}, {high}]"
        raise ParameterError(name, f"must be an integer {allowed}, got {value!r}")
