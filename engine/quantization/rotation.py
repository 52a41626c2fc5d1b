"""Hadamard rotation of a layer's values, folded into its weights.

Attention mixes the values of a head over tokens, never over channels. So an orthonormal H in front of the mix
(the rows of v_proj) and its transpose behind it (the columns of o_proj) cancel out, whatever norms, rotary
embeddings or tied tables the model has, and no kernel changes. The rotation spreads outliers over a head's
channels (QuaRot, Ashkboos et al. 2024); whether that helps is measured, layer by layer (`choice`).
"""

import torch
from torch import Tensor

from engine.models.layerwise import LayerWeights


def can_rotate(head_dim: int) -> bool:
    """Sylvester's Hadamard matrices exist for powers of two."""
    return head_dim & (head_dim - 1) == 0


def hadamard(size: int) -> Tensor:
    """Orthonormal and symmetric, float32 [size, size]; `size` is a power of two."""
    h = torch.ones(1, 1)
    while len(h) < size:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h * size**-0.5


def rotate_heads(x: Tensor, head_dim: int) -> Tensor:
    """H times the channels of every head: [..., heads * head_dim]."""
    heads = x.unflatten(-1, (-1, head_dim))
    return (heads @ hadamard(head_dim)).flatten(-2)  # H is its own transpose


def rotate_values(weights: LayerWeights, head_dim: int) -> LayerWeights:
    """The same layer with its values rotated, and rotated back in the output projection."""
    linears = dict(weights.linears)
    linears["v_proj"] = rotate_heads(linears["v_proj"].T, head_dim).T.contiguous()
    linears["o_proj"] = rotate_heads(linears["o_proj"], head_dim)
    vectors = dict(weights.vectors)
    if "v_proj.bias" in vectors:
        vectors["v_proj.bias"] = rotate_heads(vectors["v_proj.bias"], head_dim)
    return LayerWeights(linears, vectors)
