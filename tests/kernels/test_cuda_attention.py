"""Attention of a few sequences' next tokens on a Hopper GPU, against its specification in plain torch."""

from dataclasses import replace

import pytest
import torch

from kernels import AttentionWeights, prefill
from kernels.cuda import attention, tables
from kernels.prefill import Bound, Product, Tokens
from tests.kernels.helpers import random_weight, relative_error, rope

HAS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HAS_HOPPER, reason="needs a Hopper GPU (sm_90)")]
DEVICE = torch.device("cuda")
BF16 = 1.2e-2  # a value that rounds the other way
MAX_BLOCKS = 128  # of a sequence
SHAPES = [(4, 4, 64), (9, 3, 64), (8, 1, 128), (32, 8, 128)]
SHORT = [0, 1, 15, 16, 17, 191, 192, 193, 255, 130, -1, 3, 200, 7, 64, 383]
LONG = [1500, 0, 384, -1, 700, 2000]  # several parts of the context


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def weights(heads: int, kv_heads: int, dim: int, has_bias: bool = False) -> AttentionWeights:
    cos, sin = (t.to(DEVICE) for t in rope(2048, dim))
    bias = randn((heads + 2 * kv_heads) * dim, seed=9) if has_bias else None
    nothing = torch.empty(0)
    return AttentionWeights(
        nothing, nothing, nothing, heads, kv_heads, dim, 1e-5, cos, sin, dim**-0.5, qkv_bias=bias
    )


def product(num_tokens: int, width: int, splits: int, seed: int = 0) -> Product:
    if splits == 1:
        return Product(randn(num_tokens, width, seed=seed).bfloat16())
    return Product(randn(splits, num_tokens, width, seed=seed) / splits**0.5)


def step(positions: list[int]) -> Tokens:
    """Sequences in any order of rows, their blocks scattered over the cache."""
    g, rows = torch.Generator().manual_seed(3), len(positions) + 2
    table = torch.randperm(rows * MAX_BLOCKS, generator=g).int().view(rows, MAX_BLOCKS).to(DEVICE)
    order = torch.randperm(rows, generator=g)[: len(positions)].int().to(DEVICE)
    at = torch.tensor(positions, dtype=torch.int32, device=DEVICE)
    return Tokens(at, order, table, at.new_empty(0, 4), 1)


def caches(tokens: Tokens, kv_heads: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random up to each sequence's position, NaN behind it and in blocks of nobody."""
    both = []
    for seed in range(2):
        cache = torch.full((tokens.block_table.numel(), kv_heads, 16, dim), float("nan"), device=DEVICE)
        for row, position in zip(tokens.rows.tolist(), tokens.positions.tolist(), strict=True):
            used = -(-max(position, 0) // 16)
            values = randn(used, kv_heads, 16, dim, seed=10 * row + seed)
            if position % 16 and used:
                values[-1, :, position % 16 :] = float("nan")
            cache[tokens.block_table[row, :used].long()] = values
        both.append(cache.bfloat16())
    return both[0], both[1]


def values_of(activations: prefill.Activations) -> torch.Tensor:
    assert activations.scale is not None
    return activations.values[:, : len(activations.scale)].float() * activations.scale.unsqueeze(1)


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), SHAPES)
@pytest.mark.parametrize("positions", [SHORT, LONG, [40], [-1, -1]])
@pytest.mark.parametrize(("splits", "has_bias"), [(1, True), (3, False), (8, True)])
@pytest.mark.parametrize("blocks", [None, 1, 7])  # of the grid
def test_attend_next(heads, kv_heads, dim, positions, splits, has_bias, blocks, monkeypatch):
    tokens, w = step(positions), weights(heads, kv_heads, dim, has_bias)
    mine, theirs = (caches(tokens, kv_heads, dim) for _ in range(2))
    assert attention.can_attend(w, mine, len(positions))
    if blocks is not None:
        monkeypatch.setattr(attention, "num_blocks", lambda: blocks)
    qkv, bound = product(len(positions), (heads + 2 * kv_heads) * dim, splits), Bound.of(50.0, 64, DEVICE)
    empty = torch.empty
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))
        got = [values_of(attention.attend_next(qkv, w, mine, tokens, bound)) for _ in range(2)]
    assert torch.equal(*got)  # counters are as they were, and parts are merged in their order
    expected = values_of(prefill.attend_next(qkv, w, theirs, tokens, "tiled", bound))
    for n, position in enumerate(positions):
        if position >= 0:
            assert relative_error(got[0][:, n], expected[:, n]) < 2 * BF16
        else:
            assert not got[0][:, n].any()
    for a, b in zip(mine, theirs, strict=True):
        assert torch.equal(a.isnan(), b.isnan())
        torch.testing.assert_close(a.nan_to_num(), b.nan_to_num(), rtol=BF16, atol=BF16)


def test_positions_that_move_on_in_the_same_stream():
    """The kernel reads them before the kernel before has ended, and once more."""
    heads, kv_heads, dim, steps = 8, 2, 64, 20
    tokens, w = step([14, 100, -1, 190, 383]), weights(heads, kv_heads, dim)
    mine, theirs = (caches(tokens, kv_heads, dim) for _ in range(2))
    bound, table = Bound.of(50.0, 64, DEVICE), random_weight(16, 256, "w4g64")
    products = [product(5, (heads + 2 * kv_heads) * dim, 3, seed) for seed in range(steps)]
    out, ids = torch.empty(5, 256, device=DEVICE), torch.zeros(5, dtype=torch.int32, device=DEVICE)
    tokens.positions[tokens.positions >= 0] -= 1
    there = replace(tokens, positions=tokens.positions.clone())
    got = []
    for qkv in products:
        tables.embed(ids, table, out, 1.0, tokens.positions)
        got.append(attention.attend_next(qkv, w, mine, tokens, bound))
    for qkv, own in zip(products, got, strict=True):
        there.positions[there.positions >= 0] += 1
        expected = values_of(prefill.attend_next(qkv, w, theirs, there, "tiled", bound))
        assert relative_error(values_of(own), expected) < 2 * BF16


def test_a_row_has_the_bits_it_has_alone():
    positions = [*SHORT, *LONG]
    tokens, w = step(positions), weights(32, 8, 128)
    qkv, bound = product(len(positions), 48 * 128, 3), Bound.of(50.0, 64, DEVICE)
    cache = caches(tokens, 8, 128)
    together = values_of(attention.attend_next(qkv, w, cache, tokens, bound))
    for i in (0, 8, 15, len(SHORT)):
        alone = torch.full_like(tokens.positions, -1)
        alone[i] = tokens.positions[i]
        own = attention.attend_next(qkv, w, cache, replace(tokens, positions=alone), bound)
        assert torch.equal(values_of(own)[:, i], together[:, i])


def test_what_the_kernel_does_not_know():
    w, cache = weights(32, 8, 128), (torch.empty(0, dtype=torch.bfloat16, device=DEVICE),) * 2
    assert attention.can_attend(w, cache, 16)
    assert not attention.can_attend(w, cache, 65)
    assert not attention.can_attend(replace(w, num_heads=128), cache, 16)
    assert not attention.can_attend(replace(w, window=100), cache, 16)
    assert not attention.can_attend(replace(w, q_norm=w.norm, k_norm=w.norm), cache, 16)
    assert not attention.can_attend(w, (cache[0].to(torch.uint8),) * 2, 16)
