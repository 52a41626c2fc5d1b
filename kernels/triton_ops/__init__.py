"""The ops of `kernels.reference` in Triton, for any GPU: same signatures, no host synchronization.

Importing this package imports triton. Norms, scores and sums are float32; packed weights are dequantized in
the kernels. Products with dense weights are torch's.
"""

from torch import Tensor

from kernels.triton_ops.attention import paged_attention, rope_and_append
from kernels.triton_ops.elementwise import add_projection, gated_activation, rms_norm
from kernels.triton_ops.matmul import embed, linear
from kernels.types import AttentionMetadata, AttentionWeights, FFNWeights, Weight

__all__ = ["attention_block", "embed", "ffn_block", "linear", "logits", "paged_attention", "rms_norm"]


def attention_block(
    x: Tensor, weights: AttentionWeights, k_cache: Tensor, v_cache: Tensor, metadata: AttentionMetadata
) -> None:
    """See `reference.attention_block`."""
    w = weights
    if w.softcap is not None:
        raise NotImplementedError("softcap is not implemented in the Triton ops")
    qkv = linear(rms_norm(x, w.norm, w.eps), w.qkv, w.qkv_bias)
    query = rope_and_append(qkv, w, k_cache, v_cache, metadata)
    out = paged_attention(query, k_cache, v_cache, metadata, w.scale, w.window)
    add_projection(x, linear(out.flatten(1), w.o, w.o_bias), w.post_norm, w.eps)


def ffn_block(x: Tensor, weights: FFNWeights) -> None:
    """See `reference.ffn_block`."""
    w = weights
    gate_up = linear(rms_norm(x, w.norm, w.eps), w.gate_up, w.gate_up_bias)
    out = linear(gated_activation(gate_up, w.activation), w.down, w.down_bias)
    add_projection(x, out, w.post_norm, w.eps)


def logits(x: Tensor, norm: Tensor, eps: float, head: Weight) -> Tensor:
    """See `reference.logits`."""
    return linear(rms_norm(x, norm, eps), head)
