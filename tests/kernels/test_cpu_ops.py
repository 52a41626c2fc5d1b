"""The native CPU ops against the reference in float64, at ugly sizes."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kernels
from kernels import reference
from tests.kernels.helpers import FORMATS, random_packed, relative_error, rope, step

cpu = pytest.importorskip("kernels.cpu", reason="no C++ compiler", exc_type=OSError)

MIXED_STEPS = [
    [(0, 1)],
    [(0, 5)],
    [(15, 1), (16, 1), (0, 33)],
    [(255, 1), (256, 1), (700, 1)],
    [(250, 20), (3, 1), (0, 17), (513, 2)],
]


def caches(num_blocks: int, kv_heads: int, dim: int, chunks) -> tuple[torch.Tensor, torch.Tensor]:
    """Caches full of NaN but for what earlier steps computed."""
    g = torch.Generator().manual_seed(1)
    k = torch.full((num_blocks, kv_heads, dim, 16), float("nan"))
    v = torch.full((num_blocks, kv_heads, 16, dim), float("nan"))
    meta = step(chunks, num_blocks)
    for i, (computed, _) in enumerate(chunks):
        for p in range(computed):
            block, offset = int(meta.block_table[i, p // 16]), p % 16
            k[block, :, :, offset] = torch.randn(kv_heads, dim, generator=g)
            v[block, :, offset] = torch.randn(kv_heads, dim, generator=g)
    return k, v


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 16, 32), (3, 40, 96), (8, 7, 64), (13, 100, 160), (70, 33, 576)]
)
def test_linear(name, m, n, k):
    weight = random_packed(n, k, name)
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(2))
    bias = torch.randn(n)
    expected = x.double() @ kernels.dequantize(weight).double().T + bias
    assert relative_error(cpu.linear(x, weight, bias), expected) < 1e-4


@pytest.mark.parametrize("m", [1, 6])
def test_linear_of_stacked_formats(m):
    sizes, names = (40, 7, 100), ("w3g64", "w8row-sym", "w4g32-f16")
    weight = kernels.stack([random_packed(n, 96, f) for n, f in zip(sizes, names, strict=True)])
    x, bias = torch.randn(m, 96), torch.randn(147)
    expected = x.double() @ kernels.dequantize(weight).double().T + bias
    assert relative_error(cpu.linear(x, weight, bias), expected) < 1e-4


def test_linear_of_zeros_and_extremes():
    weight = random_packed(16, 64, "w4g32-f16")
    assert torch.equal(cpu.linear(torch.zeros(2, 64), weight), torch.zeros(2, 16))
    x = torch.full((1, 64), 1e30)
    assert relative_error(cpu.linear(x, weight), x.double() @ kernels.dequantize(weight).double().T) < 1e-4


@pytest.mark.parametrize("chunks", MIXED_STEPS)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 4, 64), (9, 3, 64), (8, 1, 32), (16, 1, 128)])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (20, None), (20, 0.5)])
def test_paged_attention(chunks, heads, kv_heads, dim, window, softcap):
    num_blocks = 120
    k, v = caches(num_blocks, kv_heads, dim, [(a + b, 0) for a, b in chunks])
    meta = step(chunks, num_blocks)
    query = torch.randn(len(meta.positions), heads, dim, generator=torch.Generator().manual_seed(3))
    got = cpu.paged_attention(query, k, v, meta, dim**-0.5, window, softcap)
    clean = torch.nan_to_num(k).double(), torch.nan_to_num(v).double()
    expected = reference.paged_attention(query.double(), *clean, meta, dim**-0.5, window, softcap)
    assert relative_error(got, expected) < 1e-5


def attention_weights(hidden: int, heads: int, kv_heads: int, dim: int, name: str | None, **kw):
    def matrix(n: int, k: int, seed: int):
        packed = random_packed(n, k, name or "w8g32", seed)
        return packed if name else kernels.dequantize(packed)

    cos, sin = rope(1024, dim)
    return kernels.AttentionWeights(
        norm=torch.rand(hidden) + 0.5,
        qkv=matrix((heads + 2 * kv_heads) * dim, hidden, 1),
        o=matrix(hidden, heads * dim, 2),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=dim,
        eps=1e-5,
        cos=cos,
        sin=sin,
        scale=dim**-0.5,
        **kw,
    )


@pytest.mark.parametrize("chunks", MIXED_STEPS)
@pytest.mark.parametrize("name", ["w4g32-f16", "w3g64", None])
@pytest.mark.parametrize("has_extras", [False, True])
def test_attention_block(chunks, name, has_extras):
    hidden, heads, kv_heads, dim, num_blocks = 96, 6, 2, 32, 120
    extras = {}
    if has_extras:
        width = (heads + 2 * kv_heads) * dim
        extras = {
            "qkv_bias": torch.randn(width),
            "o_bias": torch.randn(hidden),
            "q_norm": torch.rand(dim) + 0.5,
            "k_norm": torch.rand(dim) + 0.5,
            "post_norm": torch.rand(hidden) + 0.5,
            "window": 30,
        }
    w = attention_weights(hidden, heads, kv_heads, dim, name, **extras)
    k, v = caches(num_blocks, kv_heads, dim, chunks)
    meta = step(chunks, num_blocks)
    x = torch.randn(len(meta.positions), hidden, generator=torch.Generator().manual_seed(4))
    got, got_k, got_v = x.clone(), k.clone(), v.clone()
    cpu.attention_block(got, w, got_k, got_v, meta)
    expected, ref_k, ref_v = x.clone(), torch.nan_to_num(k), torch.nan_to_num(v)
    reference.attention_block(expected, w, ref_k, ref_v, meta)
    tolerance = 2e-4 if name else 1e-5  # packed weights see activations rounded to 16 bits
    assert relative_error(got - x, expected - x) < tolerance
    written = ~torch.isnan(got_k)
    assert relative_error(got_k[written], ref_k[written]) < tolerance
    assert torch.equal(torch.isnan(got_k).sum(), torch.isnan(got_v).sum())


@pytest.mark.parametrize("name", ["w4g32-f16", "w3g64", "w2g128", None])
@pytest.mark.parametrize("m", [1, 4, 9, 33])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_ffn_block(name, m, activation):
    hidden, ffn = 64, 160
    gate_up, down = (random_packed(n, k, name or "w8g32", n) for n, k in ((2 * ffn, hidden), (hidden, ffn)))
    w = kernels.FFNWeights(
        norm=torch.rand(hidden) + 0.5,
        gate_up=gate_up if name else kernels.dequantize(gate_up),
        down=down if name else kernels.dequantize(down),
        eps=1e-5,
        gate_up_bias=torch.randn(2 * ffn),
        down_bias=torch.randn(hidden),
        post_norm=torch.rand(hidden) if m == 9 else None,
        activation=activation,
    )
    x = torch.randn(m, hidden, generator=torch.Generator().manual_seed(5)) * 3
    got, expected = x.clone(), x.clone()
    cpu.ffn_block(got, w)
    reference.ffn_block(expected, w)
    assert relative_error(got - x, expected - x) < (2e-4 if name else 1e-5)


@pytest.mark.parametrize("name", FORMATS)
def test_embed(name):
    table = random_packed(50, 96, name)
    ids = torch.tensor([49, 0, 17, 17, 31])
    torch.testing.assert_close(cpu.embed(ids, table), kernels.dequantize(table)[ids], rtol=1e-6, atol=1e-6)


def test_logits():
    head, norm = random_packed(1000, 64, "w8g64"), torch.rand(64)
    x = torch.randn(5, 64)
    got = cpu.logits(x, norm, 1e-5, head)
    normed = reference.rms_norm(x, norm, 1e-5)
    expected = normed.double() @ kernels.dequantize(head).double().T
    assert relative_error(got, expected) < 2e-4


@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_a_tokens_result_is_the_same_bits_in_any_batch_and_on_any_threads(num_threads):
    hidden, heads, kv_heads, dim, num_blocks = 96, 6, 2, 32, 120
    w = attention_weights(hidden, heads, kv_heads, dim, "w4g32-f16")
    ffn = kernels.FFNWeights(
        torch.ones(hidden), random_packed(320, hidden, "w3g64"), random_packed(hidden, 160, "w4g32-sym"), 1e-5
    )
    length = 300
    x = torch.randn(length, hidden, generator=torch.Generator().manual_seed(6))

    def run(cuts: list[int]) -> torch.Tensor:
        """The same sequence in chunks that end at `cuts`."""
        k, v = caches(num_blocks, kv_heads, dim, [(0, length)])
        whole = step([(0, length)], num_blocks)
        out, begin = [], 0
        for end in cuts:
            meta = dataclasses.replace(
                whole,
                positions=whole.positions[begin:end].clone(),
                slot_mapping=whole.slot_mapping[begin:end].clone(),
                query_start_loc=torch.tensor([0, end - begin], dtype=torch.int32),
                seq_lens=torch.tensor([end], dtype=torch.int32),
            )
            part = x[begin:end].clone()
            cpu.attention_block(part, w, k, v, meta)
            cpu.ffn_block(part, ffn)
            out.append(part)
            begin = end
        return torch.cat(out)

    try:
        cpu.set_num_threads(1)
        expected = run([length])
        cpu.set_num_threads(num_threads)
        assert torch.equal(run([length]), expected)
        assert torch.equal(run([1, 2, 3, 50, 57, 270, *range(271, length + 1)]), expected)
    finally:
        cpu.set_num_threads(len(os.sched_getaffinity(0)))


def test_wrong_tensors_are_refused():
    weight = random_packed(16, 32, "w4g32")
    with pytest.raises(ValueError, match=r"contiguous torch\.float32"):
        cpu.linear(torch.randn(1, 32), weight, torch.zeros(16, dtype=torch.float64))
    with pytest.raises(ValueError, match="at least 1"):
        cpu.set_num_threads(0)


@pytest.mark.parametrize("isa", ["avx2", "generic"])
def test_other_instruction_sets_pass_the_same_tests(isa):
    """Runs this file's op tests against a library built for plainer processors."""
    if os.environ.get("KERNELS_CPU_ISA"):
        pytest.skip("already running for one instruction set")
    if isa == "avx2" and "avx2" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this processor has no AVX2")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    command += ["-k", "linear or ffn or logits or embed or (attention_block and w3)"]
    environment = {**os.environ, "KERNELS_CPU_ISA": isa}
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert result.returncode == 0, result.stdout[-3000:]


@pytest.mark.parametrize("is_packed", [True, False])
def test_layers_in_one_call_are_the_same_bits_as_block_by_block(is_packed):
    hidden, heads, kv_heads, dim, chunks = 96, 6, 2, 32, [(0, 5), (17, 1)]
    meta = step(chunks, 20)
    layers = []
    for i in range(3):
        down = random_packed(hidden, 160, "w4g32-sym", i)
        ffn = kernels.FFNWeights(
            torch.rand(hidden), random_packed(320, hidden, "w3g64", i), down, 1e-5, activation="gelu_tanh"
        )
        # A dense block in the middle has no native call: all blocks run one by one.
        name = "w4g32-f16" if is_packed or i != 1 else None
        layers.append((attention_weights(hidden, heads, kv_heads, dim, name), ffn))
    x = torch.randn(6, hidden, generator=torch.Generator().manual_seed(8))
    one, two = (tuple(caches(20, kv_heads, dim, chunks) for _ in layers) for _ in range(2))
    got, expected = x.clone(), x.clone()
    kernels.decoder_layers(got, tuple(layers), one, meta)
    for (attention, ffn), (k, v) in zip(layers, two, strict=True):
        cpu.attention_block(expected, attention, k, v, meta)
        cpu.ffn_block(expected, ffn)
    assert torch.equal(got, expected)
    for (k, v), (other_k, other_v) in zip(one, two, strict=True):
        assert torch.equal(k.nan_to_num(), other_k.nan_to_num())
        assert torch.equal(v.nan_to_num(), other_v.nan_to_num())
