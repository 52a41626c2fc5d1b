"""Perplexity, KL divergence and top-1 agreement on held-out text, layer by layer in float32.

Both models run in plain float32 on dequantized weights, so that the figures speak of the weights alone, for
any checkpoint that can be read, whatever its format; the layers are streamed, so that large models fit.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from engine.checkpoint.loading import Checkpoint
from engine.errors import ParameterError
from engine.models.layerwise import Cached, DecoderLayers
from kernels.reference import rms_norm, soft_cap

_MICRO_BATCH = 4
_ROWS = 256
Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Divergence:
    """Per token and window [S, T - 1] (float32, nats): KL, negative log-likelihoods; whether top-1 agrees."""

    kl: Tensor
    nll: Tensor
    reference_nll: Tensor
    agrees: Tensor


@torch.inference_mode()
def hidden_states(
    checkpoint: Checkpoint,
    tokens: Tensor,
    progress: Progress = lambda _: None,
    cached: Callable[[int], tuple[Cached, Cached]] | None = None,
) -> Tensor:
    """The normed residual stream in front of the head, float32 [S, T, hidden], for tokens [S, T].

    cached: what a layer's KV cache makes of keys and values, where it rounds them.
    """
    layers = DecoderLayers(checkpoint, tokens.shape[1])
    x = layers.embed(tokens, layers.embedding())
    for layer in range(layers.config.num_layers):
        weights = layers.load(layer)
        own = None if cached is None else cached(layer)
        parts = x.split(_MICRO_BATCH)
        x = torch.cat([layers.forward(layer, weights, part, cached=own) for part in parts])
        progress("layer")
    return rms_norm(x, layers.final_norm(), layers.config.rms_norm_eps)


def head_table(checkpoint: Checkpoint) -> Tensor:
    layers = DecoderLayers(checkpoint, 1)
    return layers.embedding() if layers.is_tied else layers.tensor("lm_head.weight")


@torch.inference_mode()
def divergence(
    model: Checkpoint, reference: Checkpoint, tokens: Tensor, progress: Progress = lambda _: None
) -> Divergence:
    """Compare the next-token distributions of two checkpoints of one vocabulary on tokens [S, T].

    Raises ParameterError when the vocabularies differ in size.
    """
    if model.config.vocab_size != reference.config.vocab_size:
        raise ParameterError(
            "reference",
            f"has {reference.config.vocab_size} tokens, the model has {model.config.vocab_size}",
        )
    states = [hidden_states(c, tokens, progress) for c in (model, reference)]
    tables = [head_table(c) for c in (model, reference)]
    return compare(states[0], tables[0], states[1], tables[1], tokens, model.config.final_softcap)


@torch.inference_mode()
def compare(
    x: Tensor,
    head: Tensor,
    x_ref: Tensor,
    head_ref: Tensor,
    tokens: Tensor,
    softcap: float | None = None,
) -> Divergence:
    """From normed residual streams [S, T, hidden], heads [vocab, hidden] and the soft cap of both logits."""
    columns = list(zip(*_each_row_block(x, head, x_ref, head_ref, tokens, softcap), strict=True))
    shape = (tokens.shape[0], tokens.shape[1] - 1)
    kl, nll, reference_nll, agrees = (torch.cat(c).view(shape) for c in columns)
    return Divergence(kl, nll, reference_nll, agrees)


def _each_row_block(
    x: Tensor, head: Tensor, x_ref: Tensor, head_ref: Tensor, tokens: Tensor, softcap: float | None
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    inputs, wanted = x[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
    references = x_ref[:, :-1].flatten(0, 1)
    parts = (t.split(_ROWS) for t in (inputs, references, wanted))
    for ours, theirs, y in zip(*parts, strict=True):
        log_q = soft_cap(functional.linear(ours, head), softcap).log_softmax(-1)
        log_p = soft_cap(functional.linear(theirs, head_ref), softcap).log_softmax(-1)
        agrees = log_q.argmax(-1) == log_p.argmax(-1)
        index = y[:, None]
        nll, reference_nll = -log_q.gather(1, index)[:, 0], -log_p.gather(1, index)[:, 0]
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)
        yield kl, nll, reference_nll, agrees
