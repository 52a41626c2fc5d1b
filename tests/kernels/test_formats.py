"""Packing: exact inverses, GGUF's values to the bit."""

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels
from kernels.formats import GROUP_SIZE, take_rows
from tests.kernels.helpers import random_packed


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 50), st.integers(1, 4), st.sampled_from([4, 8]), st.integers(0, 2**31))
def test_unpack_is_the_inverse_of_pack(n, groups, bits, seed):
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (n, groups * GROUP_SIZE), generator=g, dtype=torch.uint8)
    scale, offset = (torch.randn(n, groups, generator=g).half() for _ in range(2))
    packed = kernels.pack(codes, scale, offset, bits)
    for got, expected in zip(kernels.unpack(packed), (codes, scale, offset), strict=True):
        assert torch.equal(got, expected)
    assert packed.nbytes == -(-n // 16) * groups * (64 * bits + 64)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_gguf_types_keep_their_values(kind):
    rng = np.random.default_rng(0)
    dense = rng.standard_normal((37, 96)).astype(np.float32)
    qtype = gguf.GGMLQuantizationType[kind]
    raw = gguf.quants.quantize(dense, qtype)
    packed = kernels.from_gguf(raw, kind, (37, 96))
    expected = torch.from_numpy(gguf.quants.dequantize(raw, qtype))
    torch.testing.assert_close(kernels.dequantize(packed), expected, rtol=1e-6, atol=1e-6)


def test_other_gguf_types_have_no_packed_form_and_wrong_sizes_are_refused():
    assert kernels.from_gguf(np.zeros(10, np.uint8), "Q6_K", (1, 256)) is None
    with pytest.raises(ValueError, match="do not make this shape"):
        kernels.from_gguf(np.zeros(10, np.uint8), "Q8_0", (1, 32))


@pytest.mark.parametrize("sizes", [(16, 32, 48), (5, 16, 7)])
def test_rows_are_stacked(sizes):
    parts = [random_packed(n, 64, 4, seed=n) for n in sizes]
    stacked = kernels.concat_rows(parts)
    assert torch.equal(kernels.dequantize(stacked), torch.cat([kernels.dequantize(p) for p in parts]))


def test_rows_are_taken():
    packed = random_packed(50, 64, 8)
    rows = torch.tensor([49, 0, 17, 17])
    assert torch.equal(take_rows(packed, rows), kernels.dequantize(packed)[rows])


def test_what_does_not_belong_together_is_refused():
    codes = torch.zeros(2, 32, dtype=torch.uint8)
    scale = torch.zeros(2, 1).half()
    with pytest.raises(ValueError, match="need scale and offset"):
        kernels.pack(codes, scale, torch.zeros(2, 2).half(), 4)
    with pytest.raises(ValueError, match="float16"):
        kernels.pack(codes, scale.float(), scale, 4)
    with pytest.raises(ValueError, match="does not fit into 4 bits"):
        kernels.pack(codes + 16, scale, scale, 4)
    with pytest.raises(ValueError, match="cannot stack"):
        kernels.concat_rows([random_packed(16, 32, 4), random_packed(16, 32, 8)])
    with pytest.raises(ValueError, match="unknown format"):
        kernels.PackedWeight("w5", 16, 32, torch.zeros(1, 1, 320, dtype=torch.uint8))
