"""Which format each tensor gets: an exact multiple-choice knapsack over bytes.

Minimise the sum of the tensors' estimated KL divergences subject to a byte budget, one candidate a tensor
(the multiple-choice knapsack problem), by dynamic programming over budgets (Dudzinski and Walukiewicz 1987):
one pass over the tensors gives the least KL of every budget at once.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from engine.errors import ParameterError
from engine.quantization.sensitivity import Candidate, TensorSensitivity

Allocation = dict[str, str]
"""Format name by tensor name."""

_MAX_STATES = 200_000  # beyond, sizes are rounded up by at most 1 / 200,000 of the budget in all


def allocate(tensors: Sequence[TensorSensitivity], max_bytes: int) -> Allocation:
    """Formats of least total KL whose bytes are at most `max_bytes`.

    Raises:
        ParameterError: even the smallest candidates do not fit; the message says what would.
    """
    smallest = sum(min(c.nbytes for c in t.candidates) for t in tensors)
    if smallest > max_bytes:
        raise ParameterError(
            "budget", f"leaves {max_bytes} bytes for matrices, the smallest formats take {smallest}"
        )
    table = _solve(tensors, max_bytes)
    return table.allocation(len(table.least) - 1)


def allocate_for_kl(tensors: Sequence[TensorSensitivity], max_kl: float) -> Allocation:
    """Formats of fewest bytes whose total estimated KL is at most `max_kl`.

    Raises:
        ParameterError: even the widest candidates lose more.
    """
    table = _solve(tensors, sum(max(c.nbytes for c in t.candidates) for t in tensors))
    enough = np.flatnonzero(table.least <= max_kl)
    if not len(enough):
        raise ParameterError(
            "max-kl", f"must be at least {table.least[-1]:.3g}, what the widest formats lose"
        )
    return table.allocation(int(enough[0]))


def total_bytes(tensors: Sequence[TensorSensitivity], allocation: Mapping[str, str]) -> int:
    return sum(candidate(t, allocation).nbytes for t in tensors)


def total_kl(tensors: Sequence[TensorSensitivity], allocation: Mapping[str, str]) -> float:
    """The sum that `allocate` minimises."""
    return sum(candidate(t, allocation).kl for t in tensors)


def candidate(tensor: TensorSensitivity, allocation: Mapping[str, str]) -> Candidate:
    """The one that the allocation gives the tensor."""
    return next(c for c in tensor.candidates if c.format == allocation[tensor.name])


@dataclass(frozen=True, slots=True)
class _Table:
    """least[c]: least KL with c units beyond the smallest formats; chosen[t, c]: which candidate has it."""

    tensors: Sequence[TensorSensitivity]
    extra: list[list[int]]  # units of each candidate beyond its tensor's smallest
    least: np.ndarray
    chosen: np.ndarray

    def allocation(self, units: int) -> Allocation:
        result = {}
        for i in reversed(range(len(self.tensors))):
            choice = int(self.chosen[i, units])
            result[self.tensors[i].name] = self.tensors[i].candidates[choice].format
            units -= self.extra[i][choice]
        return dict(reversed(result.items()))


def _solve(tensors: Sequence[TensorSensitivity], max_bytes: int) -> _Table:
    bases = [min(c.nbytes for c in t.candidates) for t in tensors]
    steps = [[c.nbytes - base for c in t.candidates] for t, base in zip(tensors, bases, strict=True)]
    room = max_bytes - sum(bases)
    unit = max(math.gcd(*(s for own in steps for s in own)), room // _MAX_STATES, 1)
    extra = [[-(-s // unit) for s in own] for own in steps]
    states = room // unit + 1
    least = np.zeros(states)
    chosen = np.zeros((len(tensors), states), dtype=np.uint8)
    for i, tensor in enumerate(tensors):
        best = np.full(states, np.inf)
        for j, candidate in enumerate(tensor.candidates):
            shift = extra[i][j]
            if shift >= states:
                continue
            reached = least[: states - shift] + candidate.kl
            is_better = reached < best[shift:]
            best[shift:][is_better] = reached[is_better]
            chosen[i, shift:][is_better] = j
        least = best
    return _Table(tensors, extra, least, chosen)
