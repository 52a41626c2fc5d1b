"""What lies between the products of a prompt chunk, in plain torch: the specification of triton_ops.prefill.

A product of e4m3 operands comes without their scales; whoever reads it multiplies by them:
value[t, n] * token_scale[t] * row_scale[n].
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from kernels import kv_cache
from kernels.cuda.packing import UNIT_COLUMNS
from kernels.cuda.program import BLOCK_TOKENS
from kernels.reference import activate, add_projection, apply_rope, rms_norm
from kernels.types import AttentionWeights

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
LINE_BYTES = 128  # of a token, in the tiled forms
TILED_MAX = 1024.0  # far from float16's limits on both sides
_BOUND_MAX = 32768.0
LOG2_E = math.log2(math.e)  # attention's scores are in base 2

Form = Literal["bf16", "fp8", "tiled", "tiled_fp8"]
"""Of a matrix's input: "fp8" is e4m3 [T, K], "tiled" float16 and "tiled_fp8" e4m3 in the order of `tiled`."""


@dataclass(frozen=True, slots=True, eq=False)
class Activations:
    """A matrix's input [T, K]: bfloat16, or (with scale float32 [T]) e4m3, or `tiled` float16 or e4m3."""

    values: Tensor
    scale: Tensor | None = None

    @property
    def padded_tokens(self) -> int:
        """Of a tiled form."""
        return self.values.shape[-2]


@dataclass(frozen=True, slots=True, eq=False)
class Bound:
    """A scale of the tiled form that all rows share, for it is known before they are.

    So a row may be written by many programs, each when it has its part. float16 has 29 binades, which leaves
    typical values, some 2^12 below a bound, all their bits.

    scale: float32 [T], T the most rows there may be, all 1 / inverse, a power of two.
    """

    scale: Tensor
    inverse: float

    @classmethod
    def of(cls, limit: float, num_rows: int, device: torch.device) -> "Bound":
        """limit: no absolute value is larger."""
        scale = 2.0 ** math.ceil(math.log2(max(limit, 1e-20) / _BOUND_MAX))
        return cls(torch.full((num_rows,), scale, device=device), 1 / scale)


@dataclass(frozen=True, slots=True, eq=False)
class Product:
    """A matrix's output: bfloat16 [T, N], or float32 [splits, T, N], whose sum it is.

    Also the operands' scales, float32 [T] and [N], if it lacks them.
    """

    values: Tensor
    token_scale: Tensor | None = None
    row_scale: Tensor | None = None

    @property
    def num_splits(self) -> int:
        return 1 if self.values.dim() == 2 else len(self.values)

    def float(self) -> Tensor:
        """float32 [T, N], scaled."""
        values = self.values.float() if self.values.dim() == 2 else self.values.sum(0)
        if self.token_scale is None or self.row_scale is None:
            return values
        return values * self.token_scale.unsqueeze(1) * self.row_scale


@dataclass(frozen=True, slots=True, eq=False)
class Tokens:
    """Where a chunk's tokens are, all int32.

    positions [T]; rows [T]: of the block table, -1 for padding; block_table [rows, max blocks]; tiles [N, 4]:
    first token, number of tokens (0: none, at most `tile`), row and first position of queries that follow
    each other in one sequence.
    """

    positions: Tensor
    rows: Tensor
    block_table: Tensor
    tiles: Tensor
    tile: int


def quantize(x: Tensor, form: Form = "fp8", bound: Bound | None = None) -> Activations:
    """x [T, K] in that form; the largest value of a row becomes FP8_MAX or TILED_MAX, without a bound."""
    if bound is not None:
        return Activations(tiled((x.float() * bound.inverse).half()), bound.scale[: len(x)])
    if form == "bf16":
        return Activations(x.bfloat16())
    scale = x.float().abs().amax(dim=1).clamp_min(1e-20) / (TILED_MAX if form == "tiled" else FP8_MAX)
    values = (x.float() / scale.unsqueeze(1)).to(torch.float16 if form == "tiled" else FP8)
    return Activations(values if form == "fp8" else tiled(values), scale)


def padded_tokens(num_tokens: int) -> int:
    """Tokens of the tiled forms: eight are swizzled together."""
    return -(-num_tokens // 8) * 8


def empty_tiled(
    num_tokens: int, width: int, device: torch.device, dtype: torch.dtype = torch.float16
) -> Tensor:
    """Room for a tiled form: zeros behind the last column, the rest is undefined."""
    columns = LINE_BYTES // dtype.itemsize
    lines = -(-width // UNIT_COLUMNS) * (UNIT_COLUMNS // columns)
    make = torch.empty if width % UNIT_COLUMNS == 0 else torch.zeros
    return make(lines, padded_tokens(num_tokens), columns, dtype=dtype, device=device)


def tiled(values: Tensor) -> Tensor:
    """float16 [T, K] as [lines, padded tokens, 64], or e4m3 as [lines, padded tokens, 128].

    That is how the tensor cores read it from shared memory. A line is 128 bytes a token, zeros behind the
    last column up to a multiple of 256. Of every 32 columns, column 8 q + 4 h + 2 i + j lies at
    16 h + 8 j + 2 q + i, of e4m3 at 16 h + 4 q + 2 j + i: what a lane unpacks of the weights is its part of
    the fragment (src/prompt.cu, src/prompt_fp8.cu). 16-byte piece c of token t lies at place c ^ (t % 8), so
    that eight tokens' pieces are in different banks.
    """
    (num_tokens, k), padded = values.shape, padded_tokens(len(values))
    width = -(-k // UNIT_COLUMNS) * UNIT_COLUMNS
    given = torch.zeros(padded, width, dtype=values.dtype, device=values.device)
    given[:num_tokens, :k] = values
    order = (0, 1, 3, 5, 2, 4) if values.itemsize == 2 else (0, 1, 3, 2, 5, 4)
    ordered = given.view(torch.uint8).view(padded, -1, 4, 2, 2, 2, values.itemsize).permute(*order, 6)
    pieces = ordered.reshape(padded, -1, 8, 16)
    token, piece = torch.arange(padded).unsqueeze(1), torch.arange(8)
    swizzled = pieces[token, :, piece ^ (token % 8)]  # [tokens, pieces, lines, 16]: xor is its own inverse
    return swizzled.permute(2, 0, 1, 3).reshape(-1, padded, LINE_BYTES).view(values.dtype)


def add(x: Tensor, out: Product, bias: Tensor | None, post_norm: Tensor | None, eps: float) -> None:
    """x float32 [T, hidden] += out + bias, through RMSNorm where the block has a norm behind it, in place."""
    add_projection(x, out.float() if bias is None else out.float() + bias, post_norm, eps)


def normalize(
    x: Tensor,
    norm: Tensor,
    eps: float,
    form: Form,
    out: Product | None = None,
    bias: Tensor | None = None,
    post_norm: Tensor | None = None,
) -> Activations:
    """RMSNorm of x float32 [T, hidden], after `add` of the product before, if any."""
    if out is not None:
        add(x, out, bias, post_norm, eps)
    return quantize(rms_norm(x, norm, eps), form)


def gate(gate_up: Product, bias: Tensor | None, activation: str, form: Form) -> Activations:
    """act(gate) * up of gate_up + bias [T, 2 ffn]."""
    both = gate_up.float() if bias is None else gate_up.float() + bias
    first, second = both.chunk(2, dim=1)
    return quantize(activate(first, activation) * second, form)


def rope_and_append(
    qkv: Product, w: AttentionWeights, caches: tuple[Tensor, Tensor], tokens: Tokens
) -> Tensor:
    """The rotated queries, bfloat16 [T, heads, head_dim]; keys and values go into the cache.

    caches: keys and values in a form of `kernels.kv_cache`. A token of a negative row or position is padding.
    """
    both = qkv.float() if w.qkv_bias is None else qkv.float() + w.qkv_bias
    heads = both.view(len(both), -1, w.head_dim)
    query, keys, values = heads.split([w.num_heads, w.num_kv_heads, w.num_kv_heads], dim=1)
    if w.q_norm is not None:
        query = rms_norm(query, w.q_norm, w.eps)
    if w.k_norm is not None:
        keys = rms_norm(keys, w.k_norm, w.eps)
    position = tokens.positions.long()
    cos, sin = (t[position.clamp(min=0)] for t in (w.cos, w.sin))
    is_there = (tokens.rows >= 0) & (position >= 0)
    position = position[is_there]
    block = tokens.block_table[tokens.rows[is_there].long(), position // BLOCK_TOKENS].long()
    for cache, new in zip(caches, (apply_rope(keys, cos, sin), values), strict=True):
        kv_cache.write(cache, block, position % BLOCK_TOKENS, new[is_there])
    return apply_rope(query, cos, sin).bfloat16()


def attend(query: Tensor, w: AttentionWeights, caches: tuple[Tensor, Tensor], tokens: Tokens) -> Tensor:
    """Causal attention over the cache, bfloat16 [T, heads * head_dim]; rows of no tile are undefined."""
    out = torch.zeros_like(query)
    group = w.num_heads // w.num_kv_heads
    for first, count, row, start in tokens.tiles.tolist():
        if count == 0:
            continue
        end = start + count
        blocks = tokens.block_table[row, : -(-end // BLOCK_TOKENS)].long()
        keys, values = (kv_cache.read(c, blocks).transpose(0, 1).flatten(1, 2)[:, :end] for c in caches)
        keys, values = (t.repeat_interleave(group, dim=0) for t in (keys, values))
        queries = query[first : first + count].transpose(0, 1).float()
        distance = torch.arange(start, end, device=query.device).unsqueeze(1) - torch.arange(
            end, device=query.device
        )
        visible = distance >= 0 if w.window is None else (distance >= 0) & (distance < w.window)
        scores = (queries @ keys.transpose(1, 2) * w.scale).masked_fill(~visible, float("-inf"))
        out[first : first + count] = (scores.softmax(dim=-1) @ values).transpose(0, 1).to(out.dtype)
    return out.flatten(1)


def attend_next(
    qkv: Product,
    w: AttentionWeights,
    caches: tuple[Tensor, Tensor],
    tokens: Tokens,
    form: Form,
    bound: Bound | None = None,
    *,
    is_shared: bool = False,
) -> Activations:
    """Attention of one new token for each sequence, its key and value appended: the next matrix's input.

    bound: of the values, for the tiled form. A token of a negative position is padding, and becomes zeros.
    `tokens.tiles` are not read. is_shared: several tokens may be of one sequence, each seeing those before it
    (drafts), at the cost of a launch.
    """
    is_there = tokens.positions >= 0
    numbers = torch.arange(len(is_there), device=is_there.device)[is_there]
    ones = torch.ones_like(numbers)
    tiles = torch.stack([numbers, ones, tokens.rows[is_there], tokens.positions[is_there]], dim=1)
    rows = torch.where(is_there, tokens.rows, -1)
    there = replace(tokens, rows=rows, tiles=tiles, tile=1)
    return quantize(attend(rope_and_append(qkv, w, caches, there), w, caches, there), form, bound)
