"""Which implementation runs an op: by device and weight format, decided in one place."""

import functools
import logging
import os
from collections.abc import Sequence
from types import ModuleType

from torch import Tensor

from kernels import reference
from kernels.types import AttentionMetadata, AttentionWeights, FeedForward, MoEWeights, Weight

logger = logging.getLogger(__name__)


@functools.cache
def _native() -> ModuleType | None:
    """The native CPU ops, built at first use; None where they cannot be had."""
    choice = os.environ.get("KERNELS_BACKEND", "auto")
    if choice not in ("auto", "native", "reference"):
        raise ValueError(f"KERNELS_BACKEND={choice!r} (allowed: auto, native, reference)")
    if choice == "reference":
        return None
    try:
        from kernels import cpu
    except OSError as error:
        if choice == "native":
            raise
        logger.warning("native CPU kernels are not available, the slower torch reference runs: %s", error)
        return None
    return cpu


def backend_name() -> str:
    """`native` or `reference`: what runs on the CPU."""
    return "reference" if _native() is None else "native"


def set_num_threads(num_threads: int) -> None:
    """Threads of the native CPU ops (torch has its own setting)."""
    if native := _native():
        native.set_num_threads(num_threads)


def _native_for(x: Tensor) -> ModuleType | None:
    return _native() if x.device.type == "cpu" else None


def attention_block(
    x: Tensor, weights: AttentionWeights, k_cache: Tensor, v_cache: Tensor, metadata: AttentionMetadata
) -> None:
    """See `reference.attention_block`."""
    (_native_for(x) or reference).attention_block(x, weights, k_cache, v_cache, metadata)


def decoder_layers(
    x: Tensor,
    layers: Sequence[tuple[AttentionWeights, FeedForward]],
    caches: Sequence[tuple[Tensor, Tensor]],
    metadata: AttentionMetadata,
) -> None:
    """`attention_block` and `ffn_block` of every layer in turn; caches: keys and values of each.

    Natively one call: between two calls the processors' caches are the weights', and Python starts cold.
    """
    native = _native_for(x)
    if native is not None and native.run_layers(x, layers, caches, metadata):
        return
    for (attention, ffn), (k_cache, v_cache) in zip(layers, caches, strict=True):
        attention_block(x, attention, k_cache, v_cache, metadata)
        ffn_block(x, ffn)


def ffn_block(x: Tensor, weights: FeedForward) -> None:
    """See `reference.ffn_block` and `reference.moe_block`."""
    if isinstance(weights, MoEWeights):
        reference.moe_block(x, weights, linear)
    else:
        (_native_for(x) or reference).ffn_block(x, weights)


def linear(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """See `reference.linear`."""
    out: Tensor = (_native_for(x) or reference).linear(x, weight, bias)
    return out


def logits(x: Tensor, norm: Tensor, eps: float, head: Weight) -> Tensor:
    """See `reference.logits`."""
    out: Tensor = (_native_for(x) or reference).logits(x, norm, eps, head)
    return out


def embed(token_ids: Tensor, table: Weight) -> Tensor:
    """See `reference.embed`."""
    out: Tensor = (_native_for(token_ids) or reference).embed(token_ids, table)
    return out
