"""The Triton ops (in the interpreter without a GPU) against the reference in float64, at ugly sizes."""

import dataclasses
import os

import numpy as np
import pytest
import torch

import kernels
from kernels import reference
from kernels.formats import PLANES, Format
from tests.kernels.helpers import FORMATS, random_packed, relative_error, rope, step

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytest.importorskip("triton", reason="triton is not installed")
if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no GPU, and Triton's interpreter is not chosen", allow_module_level=True)
from kernels import triton_ops  # noqa: E402

ALL_FORMATS = [str(Format(b, g, k)) for b in PLANES for g in (32, 0) for k in ("affine", "zero", "sym")]
STEPS = [
    [(0, 1)],
    [(15, 1), (16, 1), (0, 33)],
    [(255, 1), (300, 1), (31, 1)],
    [(90, 20), (3, 1), (0, 17), (213, 2)],
]


@pytest.fixture(autouse=True)
def _poisoned_outputs(monkeypatch):
    """Whatever an op allocates holds NaN until a kernel writes it."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        out = empty(*args, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() else out.fill_(-12345)

    monkeypatch.setattr(torch, "empty", poisoned)


def to_device(item):
    """A tensor, a weight or a dataclass of them on the device under test."""
    if isinstance(item, torch.Tensor):
        return item.to(DEVICE)
    if isinstance(item, kernels.StackedWeight):
        return kernels.StackedWeight(tuple(to_device(p) for p in item.parts))
    if dataclasses.is_dataclass(item) and not isinstance(item, Format):
        fields = {f.name: to_device(getattr(item, f.name)) for f in dataclasses.fields(item)}
        return type(item)(**fields)
    return item


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def packed(n: int, k: int, name: str, seed: int = 0) -> kernels.PackedWeight:
    return to_device(random_packed(n, k, name, seed))


def caches(num_blocks: int, kv_heads: int, dim: int, chunks, dtype=torch.float32):
    """Caches full of NaN but for what earlier steps computed."""
    k = torch.full((num_blocks, kv_heads, dim, 16), float("nan"))
    v = torch.full((num_blocks, kv_heads, 16, dim), float("nan"))
    meta, g = step(chunks, num_blocks), torch.Generator().manual_seed(1)
    for i, (computed, _) in enumerate(chunks):
        for p in range(computed):
            block, offset = int(meta.block_table[i, p // 16]), p % 16
            k[block, :, :, offset] = torch.randn(kv_heads, dim, generator=g)
            v[block, :, offset] = torch.randn(kv_heads, dim, generator=g)
    return k.to(DEVICE, dtype), v.to(DEVICE, dtype)


@pytest.mark.parametrize("name", ALL_FORMATS)
def test_linear_of_every_format(name):
    weight = packed(23, 160, name)
    x, bias = randn(3, 160), randn(23)
    expected = x.double() @ kernels.dequantize(weight).double().T + bias
    assert relative_error(triton_ops.linear(x, weight, bias), expected) < 1e-5


@pytest.mark.parametrize("name", ["w4g64", "w3g128-sym", "w8g32-f16"])
@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 16, 32), (8, 7, 64), (16, 100, 576), (17, 33, 288), (70, 5, 96)]
)
def test_linear_of_ugly_sizes(name, m, n, k):
    weight, x = packed(n, k, name), randn(m, k)
    expected = x.double() @ kernels.dequantize(weight).double().T
    assert relative_error(triton_ops.linear(x, weight), expected) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_linear_of_16_bit_activations(dtype):
    weight, x = packed(40, 96, "w5g64"), randn(5, 96).to(dtype)
    expected = x.double() @ kernels.dequantize(weight).double().T
    assert relative_error(triton_ops.linear(x, weight), expected) < 1e-5


def test_linear_of_stacked_and_dense_weights():
    sizes, names = (40, 7, 100), ("w3g64", "w8row-sym", "w4g32-f16")
    weight = kernels.stack([packed(n, 96, f) for n, f in zip(sizes, names, strict=True)])
    x, bias = randn(6, 96), randn(147)
    dense = kernels.dequantize(weight)
    expected = x.double() @ dense.double().T + bias
    assert relative_error(triton_ops.linear(x, weight, bias), expected) < 1e-5
    assert relative_error(triton_ops.linear(x, dense, bias), expected) < 1e-5


def test_a_tokens_product_does_not_depend_on_its_batch(monkeypatch):
    if DEVICE == "cpu":  # the interpreter takes numpy's BLAS, where a sum may depend on its row's place
        monkeypatch.setattr(np, "matmul", lambda a, b, **rest: np.einsum("ik,kj->ij", a, b, **rest))
    weight, x = packed(50, 320, "w3g64"), randn(8, 320)
    together = triton_ops.linear(x, weight)
    for i in range(8):
        assert torch.equal(triton_ops.linear(x[i : i + 1], weight)[0], together[i])


@pytest.mark.parametrize("name", FORMATS)
def test_embed(name):
    table = packed(50, 96, name)
    ids = torch.tensor([49, 0, 17, 17, 31], device=DEVICE)
    for token_ids in (ids, ids.int()):
        got = triton_ops.embed(token_ids, table)
        torch.testing.assert_close(got, kernels.dequantize(table)[ids], rtol=1e-6, atol=1e-6)
    dense = randn(50, 96).bfloat16()
    assert torch.equal(triton_ops.embed(ids, dense), dense[ids].float())


def test_logits_and_rms_norm():
    head, norm, x = packed(1000, 64, "w8g64"), randn(64), randn(5, 64)
    normed = reference.rms_norm(x, norm, 1e-5)
    torch.testing.assert_close(triton_ops.rms_norm(x, norm, 1e-5), normed, rtol=1e-5, atol=1e-6)
    expected = normed.double() @ kernels.dequantize(head).double().T
    assert relative_error(triton_ops.logits(x, norm, 1e-5, head), expected) < 1e-5


@pytest.mark.parametrize("chunks", STEPS)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 4, 64), (9, 3, 80), (20, 1, 32)])
@pytest.mark.parametrize("window", [None, 20])
def test_paged_attention(chunks, heads, kv_heads, dim, window):
    k, v = caches(120, kv_heads, dim, [(a + b, 0) for a, b in chunks])
    meta = to_device(step(chunks, 120))
    query = randn(len(meta.positions), heads, dim, seed=3)
    got = triton_ops.paged_attention(query, k, v, meta, dim**-0.5, window)
    clean = torch.nan_to_num(k), torch.nan_to_num(v)
    expected = reference.paged_attention(query, *clean, meta, dim**-0.5, window)
    assert relative_error(got, expected) < 3e-5


@pytest.mark.parametrize("num_kv_heads", [1, 4])
def test_paged_attention_of_a_long_table_splits_the_context(num_kv_heads):
    chunks = [(300, 1), (0, 2), (30, 3)]
    k, v = caches(700, num_kv_heads, 32, [(a + b, 0) for a, b in chunks], torch.bfloat16)
    meta = step(chunks, 700)
    table = torch.nn.functional.pad(meta.block_table, (0, 400), value=699)
    meta = to_device(dataclasses.replace(meta, block_table=table))
    query = randn(6, 4, 32)
    got = triton_ops.paged_attention(query, k, v, meta, 0.2)
    expected = reference.paged_attention(query, torch.nan_to_num(k), torch.nan_to_num(v), meta, 0.2)
    assert relative_error(got, expected) < 3e-5


@pytest.mark.parametrize("chunks", [STEPS[0], [(15, 1), (0, 19), (40, 3)]])
@pytest.mark.parametrize("has_extras", [False, True])
@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.bfloat16])
def test_attention_block(chunks, has_extras, kv_dtype):
    hidden, heads, kv_heads, dim = 96, 6, 2, 32
    width = (heads + 2 * kv_heads) * dim
    cos, sin = (t.to(DEVICE) for t in rope(1024, dim))
    qkv = [packed(n * dim, hidden, f, n) for n, f in ((heads, "w3g64"), (2 * kv_heads, "w8row"))]
    extras = {}
    if has_extras:
        extras = {
            "qkv_bias": randn(width, seed=1),
            "o_bias": randn(hidden, seed=2),
            "q_norm": randn(dim, seed=3).abs() + 0.5,
            "k_norm": randn(dim, seed=4).abs() + 0.5,
            "post_norm": randn(hidden, seed=5).abs() + 0.5,
            "window": 30,
        }
    w = kernels.AttentionWeights(
        norm=randn(hidden, seed=6).abs() + 0.5,
        qkv=kernels.stack(qkv),
        o=packed(hidden, heads * dim, "w4g32-f16", 2),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=dim,
        eps=1e-5,
        cos=cos,
        sin=sin,
        scale=dim**-0.5,
        **extras,
    )
    k, v = caches(120, kv_heads, dim, chunks, kv_dtype)
    meta = to_device(step(chunks, 120))
    x = randn(len(meta.positions), hidden, seed=7)
    got, got_k, got_v = x.clone(), k.clone(), v.clone()
    triton_ops.attention_block(got, w, got_k, got_v, meta)
    expected, ref_k, ref_v = x.clone(), k.clone(), v.clone()
    reference.attention_block(expected, w, ref_k, ref_v, meta)
    # A key or value that rounds the other way to bfloat16 is off by 2^-8 (the interpreter truncates).
    tolerance = 3e-5 if kv_dtype == torch.float32 else 2e-2
    assert relative_error(got - x, expected - x) < tolerance
    for cache, ref in ((got_k, ref_k), (got_v, ref_v)):
        assert torch.equal(cache.isnan(), ref.isnan())
        assert relative_error(cache.nan_to_num(), ref.nan_to_num()) < tolerance


def test_a_padding_token_leaves_the_cache_alone():
    k, v = (torch.zeros(2, 1, *s, device=DEVICE) for s in ((4, 16), (16, 4)))
    w = dataclasses.make_dataclass(
        "W", ["num_heads", "num_kv_heads", "head_dim", "eps", "q_norm", "k_norm", "cos", "sin"]
    )
    cos, sin = (t.to(DEVICE) for t in rope(8, 4))
    meta = to_device(
        dataclasses.replace(step([(0, 1)], 2), slot_mapping=torch.tensor([-1], dtype=torch.int32))
    )
    from kernels.triton_ops.attention import rope_and_append

    rope_and_append(randn(1, 12), w(1, 1, 4, 1e-5, None, None, cos, sin), k, v, meta)
    assert not k.any()
    assert not v.any()


@pytest.mark.parametrize("m", [1, 9, 18])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ffn_block(m, activation, dtype):
    hidden, ffn = 64, 160
    w = kernels.FFNWeights(
        norm=randn(hidden).abs() + 0.5,
        gate_up=kernels.stack([packed(ffn, hidden, "w3g64", 1), packed(ffn, hidden, "w2g64", 2)]),
        down=packed(hidden, ffn, "w6g64", 3),
        eps=1e-5,
        gate_up_bias=randn(2 * ffn),
        down_bias=randn(hidden),
        post_norm=randn(hidden).abs() if m == 9 else None,
        activation=activation,
    )
    x = (randn(m, hidden, seed=5) * 3).to(dtype)
    got, expected = x.clone(), x.clone()
    triton_ops.ffn_block(got, w)
    reference.ffn_block(expected, w)
    assert relative_error(got - x, expected - x) < (3e-5 if dtype == torch.float32 else 4e-2)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a GPU")
def test_the_blocks_run_in_a_cuda_graph():
    hidden, heads, kv_heads, dim, chunks = 256, 8, 2, 64, [(300, 1), (17, 1)]
    cos, sin = (t.to(DEVICE) for t in rope(1024, dim))
    w = kernels.AttentionWeights(
        norm=torch.ones(hidden, device=DEVICE),
        qkv=packed((heads + 2 * kv_heads) * dim, hidden, "w4g64"),
        o=packed(hidden, heads * dim, "w4g64"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=dim,
        eps=1e-5,
        cos=cos,
        sin=sin,
        scale=dim**-0.5,
    )
    f = kernels.FFNWeights(w.norm, packed(1024, hidden, "w3g64"), packed(hidden, 512, "w3g64"), 1e-5)
    k, v = caches(120, kv_heads, dim, chunks)
    meta = to_device(step(chunks, 120))
    x, start = randn(2, hidden), randn(2, hidden)

    def run():
        x.copy_(start)
        triton_ops.attention_block(x, w, k, v, meta)
        triton_ops.ffn_block(x, f)

    run()
    expected = x.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    x.zero_()
    graph.replay()
    assert torch.equal(x, expected)
