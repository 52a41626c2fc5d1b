"""Allocations to try, each chosen with what the trials before it measured."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from engine.errors import ParameterError
from engine.quantization.allocation import Allocation, allocate, allocate_for_kl, total_kl
from engine.quantization.choice import Choice, choose
from engine.quantization.sensitivity import Sensitivities, TensorSensitivity
from engine.quantization.trial import Quality

_TABLES = ("model.embed_tokens.weight", "lm_head.weight")
# Factors on the estimates of embedding and head, the two whose errors every token meets twice.
_TABLE_FACTORS = (1.0, 1.5, 0.67)
MAX_TRIALS = len(_TABLE_FACTORS)
_MAX_KL_TRIALS = 4


@dataclass(frozen=True, slots=True)
class Budget:
    """Exactly one is set. bits: per weight, all told. memory_bytes: all files. max_kl: nats per token."""

    bits: float | None = None
    memory_bytes: int | None = None
    max_kl: float | None = None

    def __post_init__(self) -> None:
        given = [v for v in (self.bits, self.memory_bytes, self.max_kl) if v is not None]
        if len(given) != 1:
            raise ParameterError("budget", "give exactly one of bits, memory-gb and max-kl")
        if not given[0] > 0:
            raise ParameterError("budget", f"must be positive, got {given[0]}")


class Search:
    """Under a size: the trial of least true KL. Under a KL: the smallest allocation that keeps it."""

    def __init__(
        self,
        budget: Budget,
        found: Sensitivities,
        num_parameters: int,
        vector_bytes: int,
        header_bytes: int,
        num_trials: int,
    ) -> None:
        self.budget, self.found, self.num_trials = budget, found, num_trials
        self.max_bytes: int | None = None
        if budget.bits is not None:
            self.max_bytes = int(budget.bits * num_parameters / 8) - vector_bytes
        elif budget.memory_bytes is not None:
            self.max_bytes = budget.memory_bytes - vector_bytes - header_bytes

    def next(self, done: Sequence[tuple[Choice, Quality]]) -> Choice | None:
        """The next choice, None when enough was tried.

        Raises ParameterError when the budget cannot be met at all.
        """
        max_bytes = self.max_bytes
        if max_bytes is None:
            return self._next_for_kl(done)
        tried = [choice for choice, _ in done]
        for factor in _TABLE_FACTORS[len(done) : self.num_trials]:
            choice = choose(self.found, partial(_allocate_weighted, factor=factor, max_bytes=max_bytes))
            if choice not in tried:
                return choice
        return None

    def best(self, qualities: Sequence[Quality]) -> int:
        """Index of the trial to keep. Raises ParameterError when none keeps the KL asked for."""
        if self.budget.max_kl is None:
            return min(range(len(qualities)), key=lambda i: qualities[i]["kl"])
        if qualities[-1]["kl"] > self.budget.max_kl:
            reached = min(q["kl"] for q in qualities)
            raise ParameterError("max-kl", f"{self.budget.max_kl} was not reached; best: {reached:.4g}")
        return len(qualities) - 1

    def _next_for_kl(self, done: Sequence[tuple[Choice, Quality]]) -> Choice | None:
        limit = self.budget.max_kl
        assert limit is not None
        target = limit
        if done:
            choice, quality = done[-1]
            if quality["kl"] <= limit or len(done) == _MAX_KL_TRIALS:
                return None
            # The estimate is off by this much; a little more, so that the next one holds.
            estimate = total_kl(self.found.tensors(choice.rotated_layers), choice.formats)
            target = 0.98 * limit * estimate / quality["kl"]
        return choose(self.found, lambda tensors: allocate_for_kl(tensors, target))


def _allocate_weighted(tensors: Sequence[TensorSensitivity], factor: float, max_bytes: int) -> Allocation:
    """With the estimates of embedding and head multiplied by `factor`."""
    weighted = [
        replace(t, candidates=tuple(replace(c, kl=c.kl * factor) for c in t.candidates))
        if t.name in _TABLES
        else t
        for t in tensors
    ]
    return allocate(weighted, max_bytes)
