"""Which format each tensor gets: an exact multiple-choice knapsack over bytes.

Minimise the sum of the tensors' estimated KL divergences subject to a byte budget, one candidate a tensor
(the multiple-choice knapsack problem, Sinha and Zoltners 1979), solved to optimality by HiGHS through SciPy.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from engine.errors import ParameterError
from engine.quantization.sensitivity import Candidate, TensorSensitivity

Allocation = dict[str, str]
"""Format name by tensor name."""

_SOLVER_SECONDS = 60.0
_RELATIVE_GAP = 1e-5


def allocate(tensors: Sequence[TensorSensitivity], max_bytes: int) -> Allocation:
    """Formats of least total KL whose bytes are at most `max_bytes`.

    Raises:
        ParameterError: even the smallest candidates do not fit; the message says what would.
    """
    smallest = sum(min(c.nbytes for c in t.candidates) for t in tensors)
    if smallest > max_bytes:
        raise ParameterError(
            "bits", f"the budget leaves {max_bytes} bytes for matrices, the smallest formats take {smallest}"
        )
    nbytes, cost = _columns(tensors)
    # In units of the budget: the solver's tolerances are relative to 1.
    chosen = _solve(tensors, cost / cost.max(), nbytes / max_bytes)
    return _fit(tensors, chosen, max_bytes)


def allocate_for_kl(tensors: Sequence[TensorSensitivity], max_kl: float) -> Allocation:
    """Formats of fewest bytes whose total estimated KL is at most `max_kl`.

    Raises:
        ParameterError: even the widest candidates lose more.
    """
    least = sum(min(c.kl for c in t.candidates) for t in tensors)
    if least > max_kl:
        raise ParameterError("max-kl", f"must be at least {least:.3g}, what the widest formats lose")
    nbytes, cost = _columns(tensors)
    return _solve(tensors, nbytes / nbytes.max(), cost / max_kl)


def _columns(tensors: Sequence[TensorSensitivity]) -> tuple[np.ndarray, np.ndarray]:
    """Bytes and KL of all candidates, one after the other."""
    candidates = [c for t in tensors for c in t.candidates]
    return np.array([float(c.nbytes) for c in candidates]), np.array([c.kl for c in candidates])


def _solve(tensors: Sequence[TensorSensitivity], cost: np.ndarray, weight: np.ndarray) -> Allocation:
    """One candidate a tensor, least total cost with total weight at most 1."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    owner = [i for i, t in enumerate(tensors) for _ in t.candidates]
    one_each = np.zeros((len(tensors), len(owner)))
    one_each[owner, np.arange(len(owner))] = 1
    result = milp(
        cost,
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(weight[None], -np.inf, 1.0)],
        integrality=np.ones(len(owner)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": _RELATIVE_GAP, "time_limit": _SOLVER_SECONDS},
    )
    if result.x is None:
        raise RuntimeError(f"the knapsack was not solved: {result.message}")
    formats = [c.format for t in tensors for c in t.candidates]
    return {tensors[i].name: formats[j] for j, i in enumerate(owner) if result.x[j] > 0.5}


def total_bytes(tensors: Sequence[TensorSensitivity], allocation: Mapping[str, str]) -> int:
    return sum(_choice(t, allocation).nbytes for t in tensors)


def total_kl(tensors: Sequence[TensorSensitivity], allocation: Mapping[str, str]) -> float:
    """The sum that `allocate` minimises."""
    return sum(_choice(t, allocation).kl for t in tensors)


def uniform(tensors: Sequence[TensorSensitivity], name: str) -> Allocation:
    return {t.name: name for t in tensors}


def _choice(tensor: TensorSensitivity, allocation: Mapping[str, str]) -> Candidate:
    return next(c for c in tensor.candidates if c.format == allocation[tensor.name])


def _fit(tensors: Sequence[TensorSensitivity], allocation: Allocation, max_bytes: int) -> Allocation:
    """The solver's tolerance may overstep the budget by a few bytes: give back the cheapest step."""
    while (excess := total_bytes(tensors, allocation) - max_bytes) > 0:
        steps = []
        for t in tensors:
            now = _choice(t, allocation)
            for c in t.candidates:
                if c.nbytes < now.nbytes:
                    saved = min(now.nbytes - c.nbytes, excess)
                    steps.append(((c.kl - now.kl) / saved, t.name, c.format))
        _, name, chosen = min(steps)
        allocation[name] = chosen
    return allocation
