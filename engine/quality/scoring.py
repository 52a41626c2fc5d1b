"""Log-likelihoods of continuations, and figures with confidence intervals."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from engine.checkpoint.loading import Checkpoint
from engine.models.layerwise import DecoderLayers, Tree
from engine.quality.divergence import head_table
from kernels.reference import rms_norm

Progress = Callable[[], None]
Pair = tuple[list[int], list[int]]
"""Token ids of a prompt and of a continuation."""

_HEAD_ROWS = 256
_RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Row:
    """A figure of the model beside the reference's.

    The interval (95%, bootstrap) is that of the difference where there is a reference, else of the value.
    """

    suite: str
    metric: str
    value: float
    reference: float | None
    difference: float | None
    ci_low: float
    ci_high: float
    n: int

    def as_dict(self) -> dict[str, Any]:
        return {k: round(v, 5) if isinstance(v, float) else v for k, v in asdict(self).items()}


@torch.inference_mode()
def continuation_logprobs(
    checkpoint: Checkpoint, pairs: Sequence[Pair], progress: Progress = lambda: None
) -> list[float]:
    """Sum of log p(continuation | prompt) of each pair, nats; float32 throughout, all layers streamed once.

    Pairs that follow each other and share a prompt are one sequence, so that the prompt is computed once.
    """
    groups = _by_prompt(pairs)
    trees = [Tree.of(len(pairs[g[0]][0]), [len(pairs[i][1]) for i in g]) for g in groups]
    layers = DecoderLayers(checkpoint, max(len(p) + len(c) for p, c in pairs))
    table = layers.embedding()
    streams = []
    for group in groups:
        tokens = [*pairs[group[0]][0], *itertools.chain.from_iterable(pairs[i][1] for i in group)]
        streams.append(layers.embed(torch.tensor([tokens]), table))
    for layer in range(layers.config.num_layers):
        weights = layers.load(layer)
        streams = [
            layers.forward(layer, weights, x, tree=tree) for x, tree in zip(streams, trees, strict=True)
        ]
        progress()
    head, norm = head_table(checkpoint), layers.final_norm()
    scores = []
    for group, x in zip(groups, streams, strict=True):
        prompt = pairs[group[0]][0]
        at = len(prompt)
        for index in group:
            continuation = pairs[index][1]
            # The prompt's last token gives a continuation's first, each of its own the next.
            wanted = torch.cat([x[0, len(prompt) - 1 : len(prompt)], x[0, at : at + len(continuation) - 1]])
            normed = rms_norm(wanted, norm, layers.config.rms_norm_eps)
            scores.append(_total(layers, normed, head, torch.tensor(continuation)))
            at += len(continuation)
    return scores


def _total(layers: DecoderLayers, states: Tensor, head: Tensor, targets: Tensor) -> float:
    total = 0.0
    for x, y in zip(states.split(_HEAD_ROWS), targets.split(_HEAD_ROWS), strict=True):
        logits = layers.logits(x, head)
        total -= float(functional.cross_entropy(logits, y, reduction="sum"))
    return total


def _by_prompt(pairs: Sequence[Pair]) -> list[list[int]]:
    """Indices of neighbours that share a prompt."""
    return [list(group) for _, group in itertools.groupby(range(len(pairs)), key=lambda i: pairs[i][0])]


def row(suite: str, metric: str, values: Sequence[float], reference: Sequence[float] | None) -> Row:
    """Mean of per-item values, with the interval of the paired difference."""
    ours = np.asarray(values, dtype=np.float64)
    theirs = None if reference is None else np.asarray(reference, dtype=np.float64)
    low, high = bootstrap(ours if theirs is None else ours - theirs)
    return Row(
        suite,
        metric,
        float(ours.mean()),
        None if theirs is None else float(theirs.mean()),
        None if theirs is None else float((ours - theirs).mean()),
        low,
        high,
        len(ours),
    )


def bootstrap(values: np.ndarray) -> tuple[float, float]:
    """95% percentile interval of the mean (Efron 1979), from a fixed seed."""
    rng = np.random.default_rng(0)
    picks = rng.integers(0, len(values), (_RESAMPLES, len(values)))
    low, high = np.quantile(values[picks].mean(axis=1), [0.025, 0.975])
    return float(low), float(high)


def encode(tokenizer: Any, prompt: str, continuation: str) -> Pair:
    """Prompt with the tokenizer's own special tokens; what follows without."""
    whole = tokenizer(prompt + continuation)["input_ids"]
    start = tokenizer(prompt)["input_ids"]
    if whole[: len(start)] == start and len(whole) > len(start):
        return start, whole[len(start) :]
    return start, tokenizer(continuation, add_special_tokens=False)["input_ids"]
