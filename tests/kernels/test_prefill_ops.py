"""The Triton kernels of a prompt chunk (in the interpreter without a GPU) against their specification."""

import os
from types import SimpleNamespace

import pytest
import torch

from kernels import AttentionMetadata, prefill, reference
from kernels.prefill import Activations, Bound, Product, Tokens
from tests.kernels.helpers import relative_error, rope

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytest.importorskip("triton", reason="triton is not installed")
if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no GPU, and Triton's interpreter is not chosen", allow_module_level=True)
from kernels.triton_ops import decode_attention  # noqa: E402
from kernels.triton_ops import prefill as triton_prefill  # noqa: E402

DOT = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # the interpreter multiplies bfloat16's bits
BF16 = 1.2e-2  # a value that rounds the other way, or is cut off by the interpreter


@pytest.fixture(autouse=True)
def _poisoned_outputs(monkeypatch):
    empty, empty_like = torch.empty, torch.empty_like
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty_like(*a, **k).fill_(float("nan")))


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def product(tokens: int, width: int, has_scales: bool, seed: int = 0, splits: int = 1) -> Product:
    values = randn(tokens, width, seed=seed)
    if splits > 1:
        return Product(randn(splits, tokens, width, seed=seed))
    if not has_scales:
        return Product(values.bfloat16())
    scales = randn(tokens, seed=seed + 1).abs() + 0.1, randn(width, seed=seed + 2).abs() + 0.1
    return Product((values * 1000).bfloat16(), scales[0], scales[1] / 1000)


def check(got: Activations, expected: Activations) -> None:
    """The values they stand for; both round to nearest, but sums run in another order."""
    assert got.values.dtype == expected.values.dtype
    assert (got.scale is None) == (expected.scale is None)
    if got.scale is None or expected.scale is None:
        torch.testing.assert_close(got.values, expected.values, rtol=BF16, atol=1e-4)
        return
    num_tokens = len(got.scale)
    torch.testing.assert_close(got.scale, expected.scale, rtol=1e-5, atol=0)
    # Of tiles, whose rows are [lines, tokens], nothing is said of the padding tokens.
    rows = [a.values[..., :num_tokens, :].float() for a in (got, expected)]
    if got.values.dtype == torch.float16:
        torch.testing.assert_close(*rows, rtol=2e-3, atol=prefill.TILED_MAX * 1e-6)
        return
    values = [r * a.scale.unsqueeze(1) for r, a in zip(rows, (got, expected), strict=True)]
    off = (values[0] - values[1]).abs()
    # Triton's interpreter halves what rounds up to a power of two, about every twentieth value.
    share = 0.02 if DEVICE == "cuda" else 0.15
    assert (off > 1e-3 * values[1].abs()).float().mean() < share
    if DEVICE == "cuda":  # one step of e4m3 at most
        assert bool((off <= 0.13 * values[1].abs() + got.scale.unsqueeze(1) / 500).all())


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("hidden", [64, 416])
@pytest.mark.parametrize("form", ["bf16", "fp8", "tiled", "tiled_fp8"])
@pytest.mark.parametrize("extras", ["nothing", "product", "scales", "splits", "bias", "post_norm"])
def test_normalize(tokens, hidden, form, extras):
    x, norm, options = randn(tokens, hidden) * 3, randn(hidden, seed=1), {}
    if extras != "nothing":
        options["out"] = product(
            tokens, hidden, extras == "scales", seed=2, splits=3 if extras == "splits" else 1
        )
        options["bias"] = randn(hidden, seed=6) if extras in ("bias", "post_norm") else None
        options["post_norm"] = randn(hidden, seed=7) if extras == "post_norm" else None
    streams = x.clone(), x.clone()
    check(
        triton_prefill.normalize(streams[0], norm, 1e-5, form, **options),
        prefill.normalize(streams[1], norm, 1e-5, form, **options),
    )
    torch.testing.assert_close(*streams, rtol=1e-5, atol=1e-5)
    assert torch.equal(streams[0], x) == (extras == "nothing")


@pytest.mark.parametrize("has_extras", [False, True])
def test_add(has_extras):
    x, out = randn(3, 96), product(3, 96, has_extras, seed=2)
    bias, post_norm = (randn(96, seed=6), randn(96, seed=7)) if has_extras else (None, None)
    got, expected = x.clone(), x.clone()
    triton_prefill.add(got, out, bias, post_norm, 1e-5)
    prefill.add(expected, out, bias, post_norm, 1e-5)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "x", [randn(4, 80) * 100, torch.zeros(2, 80, device=DEVICE)], ids=["random", "zeros"]
)
@pytest.mark.parametrize("form", ["bf16", "fp8", "tiled", "tiled_fp8"])
def test_quantize(x, form):
    got = triton_prefill.quantize(x.bfloat16(), form)
    check(got, prefill.quantize(x.bfloat16(), form))
    if form == "fp8" and x.any():
        assert float(got.values.float().abs().amax(dim=1).min()) == prefill.FP8_MAX


@pytest.mark.parametrize("ffn", [32, 416])
@pytest.mark.parametrize("form", ["bf16", "fp8", "tiled", "tiled_fp8"])
@pytest.mark.parametrize("has_extras", [False, True])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gate(ffn, form, has_extras, activation):
    both, bias = product(3, 2 * ffn, has_extras), randn(2 * ffn, seed=5) if has_extras else None
    check(triton_prefill.gate(both, bias, activation, form), prefill.gate(both, bias, activation, form))


CHUNKS = [
    [(0, 20)],
    [(0, 1), (33, 40), (100, 17), (15, 2)],
]


def tokens_of(chunks: list[tuple[int, int]], tile: int, num_blocks: int) -> Tokens:
    """Chunks (first position, number of tokens) in scattered rows and blocks, with padding behind them."""
    table = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(3)).int().view(8, -1)
    positions, rows, tiles, first = [], [], [(0, 0, 0, 0)], 0
    for i, (start, count) in enumerate(chunks):
        positions += range(start, start + count)
        rows += [7 - i] * count
        tiles += [(first + j, min(tile, count - j), 7 - i, start + j) for j in range(0, count, tile)]
        first += count
    ints = [torch.tensor(v, dtype=torch.int32) for v in (positions + [0] * 3, rows + [-1] * 3, tiles)]
    positions, rows, tiles = (t.to(DEVICE) for t in ints)
    return Tokens(positions, rows, table.to(DEVICE), tiles, tile)


def weights(heads: int, kv_heads: int, dim: int, has_extras: bool, window: int | None = None):
    cos, sin = (t.to(DEVICE) for t in rope(256, dim))
    bias = randn((heads + 2 * kv_heads) * dim, seed=11) if has_extras else None
    norms = [randn(dim, seed=12 + i) if has_extras else None for i in range(2)]
    sizes = {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": dim, "scale": dim**-0.5}
    norms = dict(zip(("q_norm", "k_norm"), norms, strict=True))
    return SimpleNamespace(**sizes, **norms, eps=1e-6, cos=cos, sin=sin, qkv_bias=bias, window=window)


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 4, 64), (9, 3, 64), (20, 2, 128), (2, 1, 256)])
@pytest.mark.parametrize("has_extras", [False, True])
def test_rope_and_append(chunks, heads, kv_heads, dim, has_extras):
    tokens, w = tokens_of(chunks, 16, 128), weights(heads, kv_heads, dim, has_extras)
    qkv = product(len(tokens.positions), (heads + 2 * kv_heads) * dim, has_extras)
    shape = (128, kv_heads, 16, dim)
    caches = [[torch.full(shape, float("nan")).to(DEVICE, torch.bfloat16) for _ in "kv"] for _ in range(2)]
    got = triton_prefill.rope_and_append(qkv, w, tuple(caches[0]), tokens)
    expected = prefill.rope_and_append(qkv, w, tuple(caches[1]), tokens)
    assert relative_error(got, expected) < BF16
    for a, b in zip(*caches, strict=True):
        assert torch.equal(a.isnan(), b.isnan())
        assert int((~a.isnan()).sum()) == sum(n for _, n in chunks) * kv_heads * dim
        assert relative_error(a.nan_to_num(), b.nan_to_num()) < BF16


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("tile", [16, 32])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(2, 2, 64), (6, 2, 128), (2, 1, 256)])
@pytest.mark.parametrize("window", [None, 1, 20])
def test_attend(chunks, tile, heads, kv_heads, dim, window):
    tokens, w = tokens_of(chunks, tile, 128), weights(heads, kv_heads, dim, False, window)
    k, v = (torch.full((128, kv_heads, 16, dim), float("nan")) for _ in "kv")
    for i, (start, count) in enumerate(chunks):
        for p in range(start + count):
            at = int(tokens.block_table[7 - i, p // 16]), slice(None), p % 16
            k[at], v[at] = randn(kv_heads, dim, seed=p).cpu(), randn(kv_heads, dim, seed=p + 1000).cpu()
    caches = k.to(DEVICE, DOT), v.to(DEVICE, DOT)
    query = randn(len(tokens.positions), heads, dim, seed=4).to(DOT)
    got = triton_prefill.attend(query, w, caches, tokens)
    expected = prefill.attend(query, w, caches, tokens)
    count = sum(n for _, n in chunks)
    assert relative_error(got[:count], expected[:count]) < 2 * BF16
    # The specification itself, against that of the decode kernels.
    metadata = AttentionMetadata(
        tokens.positions[:count],
        tokens.positions[:0],
        torch.tensor([0, *torch.tensor([n for _, n in chunks]).cumsum(0)], dtype=torch.int32),
        torch.tensor([a + n for a, n in chunks], dtype=torch.int32),
        tokens.block_table.flip(0)[: len(chunks)],
    )
    keys = caches[0].nan_to_num().transpose(2, 3)
    plain = reference.paged_attention(
        query[:count].float(), keys, caches[1].nan_to_num(), metadata, w.scale, window
    )
    assert relative_error(expected[:count], plain.flatten(1)) < BF16


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 4, 64), (9, 3, 64), (20, 2, 128), (2, 1, 256)])
@pytest.mark.parametrize(
    ("form", "extras", "window"),
    [("tiled", "nothing", None), ("bf16", "scales", 70), ("tiled", "splits", 1)],
)
@pytest.mark.parametrize("programs", [1, 1024])  # of which parts of the context come
def test_attend_next(heads, kv_heads, dim, form, extras, window, programs, monkeypatch):
    monkeypatch.setattr(decode_attention, "_PROGRAMS", programs)
    monkeypatch.setattr(decode_attention, "_LONG", 64)
    positions = [0, 15, 16, 255, 130, -1]
    w = weights(heads, kv_heads, dim, extras == "scales", window)
    table = torch.randperm(96, generator=torch.Generator().manual_seed(3)).int().view(6, 16).to(DEVICE)
    rows = torch.tensor([3, 5, 1, 0, 2, 4], dtype=torch.int32, device=DEVICE)
    at = torch.tensor(positions, dtype=torch.int32, device=DEVICE)
    tokens = Tokens(at, rows, table, at.new_empty(0, 4), 1)
    caches = [torch.full((96, kv_heads, 16, dim), float("nan")) for _ in "kv"]
    for i, position in enumerate(positions):
        for p in range(position):
            place = int(table[rows[i], p // 16]), slice(None), p % 16
            for n, cache in enumerate(caches):
                cache[place] = randn(kv_heads, dim, seed=1000 * n + p).cpu()
    qkv = product(6, (heads + 2 * kv_heads) * dim, extras == "scales", splits=3 if extras == "splits" else 1)
    mine, theirs = (tuple(c.to(DEVICE, DOT) for c in caches) for _ in range(2))
    bound = Bound.of(50.0, 8, torch.device(DEVICE)) if form == "tiled" else None
    for _ in range(2):  # counters are as they were
        got = triton_prefill.attend_next(qkv, w, mine, tokens, form, bound)
    expected = prefill.attend_next(qkv, w, theirs, tokens, form, bound)
    values = [
        a.values[:, :6].float() * (1 if a.scale is None else a.scale.unsqueeze(1)) if a.values.dim() == 3
        else a.values.float()
        for a in (got, expected)
    ]  # fmt: skip
    assert relative_error(*values) < 2 * BF16
    for a, b in zip(mine, theirs, strict=True):
        assert torch.equal(a.isnan(), b.isnan())
        assert relative_error(a.nan_to_num(), b.nan_to_num()) < BF16


@pytest.mark.parametrize("dtype", [torch.float16, prefill.FP8])
def test_tiles_hold_every_value_once(dtype):
    largest = 2039 if dtype == torch.float16 else 17  # exact
    values = torch.arange(70 * 300).view(70, 300).remainder(largest).to(dtype)
    lines, columns = prefill.tiled(values), 128 // dtype.itemsize
    assert lines.shape == (512 // columns, 72, columns)
    for t, c in ((0, 0), (69, 299), (13, 45), (7, 130), (64, 255)):
        q, h, i, j = c // 8 % 4, c // 4 % 2, c // 2 % 2, c % 2
        inside = 8 * j + 2 * q + i if dtype == torch.float16 else 4 * q + 2 * j + i
        place, own = c % columns // 32 * 32 + 16 * h + inside, 16 // dtype.itemsize
        assert lines[c // columns, t, (place // own ^ t % 8) * own + place % own] == values[t, c]
    assert float(lines.double().sum()) == float(values.double().sum())  # the rest is zeros


def test_products_know_their_scales():
    a, b = Product(randn(2, 3).bfloat16()), product(2, 3, True)
    assert torch.equal(a.float(), a.values.float())
    assert b.row_scale is not None
    assert b.token_scale is not None
    torch.testing.assert_close(b.float(), b.values.float() * b.token_scale[:, None] * b.row_scale)
