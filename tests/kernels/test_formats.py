"""Packing: exact inverses, GGUF's values to the bit."""

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels
from kernels.formats import Format, take_rows
from tests.kernels.helpers import FORMATS, random_integer, random_packed


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 50),
    st.integers(1, 7),
    st.sampled_from([2, 3, 4, 5, 6, 8]),
    st.sampled_from([0, 32, 64, 128]),
    st.sampled_from(["-f16", "", "-sym"]),
    st.integers(0, 2**31),
)
def test_unpack_is_the_inverse_of_pack(n, tiles, bits, group_size, suffix, seed):
    name = f"w{bits}{f'g{group_size}' if group_size else 'row'}{suffix}"
    weight = random_integer(n, tiles * 32, name, seed)
    packed = kernels.pack(weight)
    assert str(packed.format) == name
    assert packed.nbytes == packed.format.nbytes(n, tiles * 32)
    got = kernels.unpack(packed)
    for field in ("codes", "scale", "offset", "row_scale"):
        expected, value = getattr(weight, field), getattr(got, field)
        assert (value is None) == (expected is None)
        assert expected is None or torch.equal(value, expected)


def test_values_follow_the_written_formula():
    w = random_integer(5, 96, "w3g64", seed=1)
    for n, k in [(0, 0), (4, 95), (2, 63), (3, 64)]:
        scale = float(w.row_scale[n]) * int(w.scale[n, k // 64]) / 256
        expected = scale * (int(w.codes[n, k]) - int(w.offset[n, k // 64]) / 32)
        assert float(kernels.dequantize(kernels.pack(w))[n, k]) == pytest.approx(expected, rel=1e-6)
    w = random_integer(3, 64, "w4row-sym", seed=2)
    expected = float(w.row_scale[1]) * int(w.scale[1, 0]) / 256 * (int(w.codes[1, 40]) - 8)
    assert float(kernels.dequantize(kernels.pack(w))[1, 40]) == pytest.approx(expected, rel=1e-6)


def test_bit_layout_is_the_drawn_one():
    """One set code at a time, found by hand in the bytes."""
    codes = torch.zeros(16, 32, dtype=torch.uint8)
    codes[5, 4 * 6 + 3] = 0b101  # quad 6, column 3 of it
    weight = kernels.IntegerWeight(
        Format.parse("w3row-sym"), codes, torch.zeros(16, 1, dtype=torch.uint8), None, torch.zeros(16).half()
    )
    data = kernels.pack(weight).data[0]
    low, high = data[:128].view(2, 16, 4), data[128:192].view(16, 4)
    assert int(low[1, 5, 3]) == 0b01 << (2 * 2)  # vector 1 holds quads 4 to 7, two bits each
    assert int(high[5, 3]) == 1 << 6
    assert int((data != 0).sum()) == 2


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
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
@pytest.mark.parametrize("formats", [("w4g64",) * 3, ("w4g64", "w2row", "w8g32-f16")])
def test_rows_are_stacked(sizes, formats):
    parts = [random_packed(n, 64, f, seed=n) for n, f in zip(sizes, formats, strict=True)]
    stacked = kernels.stack(parts)
    assert (stacked.n, stacked.k) == (sum(sizes), 64)
    assert isinstance(stacked, kernels.PackedWeight) == (sizes[0] == 16 and len(set(formats)) == 1)
    assert torch.equal(kernels.dequantize(stacked), torch.cat([kernels.dequantize(p) for p in parts]))


@pytest.mark.parametrize("name", FORMATS)
def test_rows_are_taken(name):
    packed = random_packed(50, 160, name)
    rows = torch.tensor([49, 0, 17, 17])
    assert torch.equal(take_rows(packed, rows), kernels.dequantize(packed)[rows])


@pytest.mark.parametrize("name", ["w7g64", "w4", "w4g0", "w4g48", "w4g64-f32", "../w4g64", "w4g64 ", ""])
def test_unknown_formats_are_refused(name):
    with pytest.raises(ValueError, match=r"unknown format|bits must be|group_size must be"):
        Format.parse(name)


def test_what_does_not_belong_together_is_refused():
    codes = torch.zeros(2, 32, dtype=torch.uint8)
    scale = torch.zeros(2, 1).half()
    affine = Format.parse("w4g32-f16")
    with pytest.raises(ValueError, match="offset must be"):
        kernels.IntegerWeight(affine, codes, scale, torch.zeros(2, 2).half())
    with pytest.raises(ValueError, match="scale must be"):
        kernels.IntegerWeight(affine, codes, scale.float(), scale)
    with pytest.raises(ValueError, match="row_scale must be"):
        kernels.IntegerWeight(Format.parse("w4g32-sym"), codes, torch.zeros(2, 1, dtype=torch.uint8))
    with pytest.raises(ValueError, match="does not fit into 4 bits"):
        kernels.pack(kernels.IntegerWeight(affine, codes + 16, scale, scale))
    with pytest.raises(ValueError, match="cannot stack"):
        kernels.stack([random_packed(16, 32, "w4g32"), random_packed(16, 64, "w4g32")])
    with pytest.raises(ValueError, match="expected uint8"):
        kernels.PackedWeight(affine, 16, 32, torch.zeros(1, 319, dtype=torch.uint8))
