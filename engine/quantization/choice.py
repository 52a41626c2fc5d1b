"""Formats and rotations together: what a trial carries out."""

from collections.abc import Callable
from dataclasses import dataclass

from engine.quantization.allocation import Allocation, candidate
from engine.quantization.sensitivity import Sensitivities, TensorSensitivity

_MAX_ROUNDS = 8  # two or three are enough


@dataclass(frozen=True, slots=True)
class Choice:
    """formats: by tensor. rotated_layers: those whose values are rotated."""

    formats: Allocation
    rotated_layers: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Rotation:
    """What a layer's rotation would do at the formats it got: estimated KL per token (nats) of v_proj and
    o_proj together, without and with it."""

    layer: int
    plain_kl: float
    rotated_kl: float
    is_rotated: bool


def choose(
    found: Sensitivities, allocate: Callable[[list[TensorSensitivity]], Allocation], may_rotate: bool = True
) -> Choice:
    """Allocate, rotate the layers that lose less at the formats they got, and again until nothing changes.

    Both steps only ever lower the estimate. The last step is an allocation, so that the budget is kept.
    """
    choice = Choice(allocate(found.plain))
    for _ in range(_MAX_ROUNDS if may_rotate else 0):
        better = frozenset(r.layer for r in rotations(found, choice) if r.rotated_kl < r.plain_kl)
        if better == choice.rotated_layers:
            break
        choice = Choice(allocate(found.tensors(better)), better)
    return choice


def rotations(found: Sensitivities, choice: Choice) -> list[Rotation]:
    """Of every layer that could be rotated."""
    plain = {t.name: t for t in found.plain}
    result = []
    for layer, tensors in found.rotated.items():
        kl = [
            sum(candidate(t, choice.formats).kl for t in own)
            for own in ([plain[t.name] for t in tensors], tensors)
        ]
        result.append(Rotation(layer, kl[0], kl[1], layer in choice.rotated_layers))
    return result
