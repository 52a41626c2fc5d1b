"""The cache's e4m3 form: its bytes, and the kernels that write and read them."""

import os
from types import SimpleNamespace

import pytest
import torch

from kernels import kv_cache, prefill
from kernels.prefill import Product, Tokens
from tests.kernels.helpers import relative_error, rope

triton = pytest.importorskip("triton", reason="triton is not installed")
HAS_GPU = torch.cuda.is_available()
IS_INTERPRETED = not HAS_GPU and os.environ.get("TRITON_INTERPRET") == "1"
if HAS_GPU or IS_INTERPRETED:
    from kernels.triton_ops import decode_attention
    from kernels.triton_ops import prefill as triton_prefill
NEEDS_GPU = pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
NEEDS_INTERPRETER = pytest.mark.skipif(
    not IS_INTERPRETED, reason="needs Triton's interpreter (TRITON_INTERPRET=1) and no GPU"
)
BF16 = 1.2e-2  # a value that rounds the other way, or is cut off by the interpreter
BYTES = torch.arange(256, dtype=torch.uint8)


@pytest.fixture(params=[pytest.param("cuda", marks=[pytest.mark.gpu, NEEDS_GPU]), "cpu"])
def device(request, monkeypatch) -> str:
    """Where the kernels run: on the GPU, or in the interpreter, which rounds to e4m3 wrongly by itself."""
    if request.param == "cpu":
        if not IS_INTERPRETED:
            pytest.skip("needs Triton's interpreter (TRITON_INTERPRET=1) and no GPU")
        _round_to_e4m3_correctly(monkeypatch)
        # It multiplies bfloat16's bits, too.
        monkeypatch.setattr(decode_attention, "_FP8_OPERANDS", triton.language.float16)
    return request.param


def _round_to_e4m3_correctly(monkeypatch) -> None:
    from triton.runtime import interpreter

    theirs, e4m3 = interpreter._convert_float, triton.language.float8e4nv

    def convert(data, input_dtype, output_dtype, rounding_mode):
        if output_dtype != e4m3 or input_dtype != triton.language.float32:
            return theirs(data, input_dtype, output_dtype, rounding_mode)
        codes = torch.from_numpy(data.copy()).clamp(-448, 448).to(torch.float8_e4m3fn)
        return codes.view(torch.uint8).numpy().reshape(data.shape)

    monkeypatch.setattr(interpreter, "_convert_float", convert)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def vectors(tokens: int, heads: int, dim: int, seed: int) -> torch.Tensor:
    """Keys or values [tokens, heads, dim] of very different sizes, as real ones are."""
    return randn(tokens, heads, dim, seed=seed) * randn(tokens, heads, 1, seed=seed + 1).exp2()


# The form itself.


def test_codes_are_the_nearest_ones_of_the_least_scale_that_fits():
    x = torch.cat([vectors(50, 2, 64, 0).flatten(0, 1), randn(20, 64) * 1e-30, randn(20, 64) * 1e30])
    x[3], x[4, 5] = 0.0, 448.0
    code, exponent = kv_cache.encode(x)
    scale = torch.pow(2.0, exponent.double() - 127)
    largest = x.double().abs().amax(-1)
    assert bool((largest <= 448 * scale).all())
    assert bool(((largest > 224 * scale) | (exponent == 1)).all())
    table = BYTES.view(torch.float8_e4m3fn).double()
    table = table[~table.isnan()].unique()
    wanted = x.double() / scale.unsqueeze(1)
    nearest = (wanted.unsqueeze(2) - table).abs().amin(2)
    assert torch.equal((code.double() - wanted).abs(), nearest)
    assert torch.equal(kv_cache.decode(code, exponent).double(), code.double() * scale.unsqueeze(1))


def test_what_is_read_is_exact_in_bfloat16_and_stays():
    x = vectors(300, 3, 128, 1)
    got = kv_cache.decode(*kv_cache.encode(x))
    assert torch.equal(got, got.bfloat16().float())
    assert torch.equal(kv_cache.decode(*kv_cache.encode(got)), got)
    off = (got - x).abs()
    assert bool((off <= x.abs() / 16 + x.abs().amax(-1, keepdim=True) * 2.0**-17).all())
    assert 0.02 < float((got - x).norm() / x.norm()) < 0.03


@pytest.mark.parametrize("kv_format", ["bf16", "fp8"])
@pytest.mark.parametrize(("heads", "dim"), [(1, 64), (3, 128), (2, 256)])
def test_tokens_are_read_where_they_were_written(kv_format, heads, dim):
    cache = kv_cache.allocate(7, heads, dim, kv_format, torch.device("cpu"))
    assert 2 * cache.nbytes == 7 * 16 * kv_cache.bytes_per_token(heads, dim, kv_format)
    cache.view(torch.uint8).fill_(255)
    x, block, offset = vectors(3, heads, dim, 2), torch.tensor([6, 0, 6]), torch.tensor([0, 15, 7])
    kv_cache.write(cache, block, offset, x)
    expected = x.bfloat16().float() if kv_format == "bf16" else kv_cache.decode(*kv_cache.encode(x))
    read = kv_cache.read(cache, torch.tensor([6, 0]))
    assert torch.equal(read[0, :, 0], expected[0])
    assert torch.equal(read[1, :, 15], expected[1])
    assert torch.equal(read[0, :, 7], expected[2])
    per_token = kv_cache.bytes_per_token(heads, dim, kv_format) // 2
    assert int((cache.view(torch.uint8) != 255).sum()) > 0.9 * 3 * per_token
    cache.view(torch.uint8)[6, :, : dim * 16].fill_(0)
    assert int((cache.view(torch.uint8)[1:6] != 255).sum()) == 0


# The kernels. A cache begins full of 255: NaN codes, infinite scales.


def attention(heads: int, kv_heads: int, dim: int, device: str, has_extras=False, window: int | None = None):
    cos, sin = (t.to(device) for t in rope(512, dim))
    bias = randn((heads + 2 * kv_heads) * dim, seed=11).to(device) if has_extras else None
    norms = [randn(dim, seed=12 + i).to(device) if has_extras else None for i in range(2)]
    sizes = {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": dim, "scale": dim**-0.5}
    norms = dict(zip(("q_norm", "k_norm"), norms, strict=True))
    return SimpleNamespace(**sizes, **norms, eps=1e-6, cos=cos, sin=sin, qkv_bias=bias, window=window)


def poisoned(num_blocks: int, kv_heads: int, dim: int, device: str) -> torch.Tensor:
    return kv_cache.allocate(num_blocks, kv_heads, dim, "fp8", torch.device(device)).fill_(255)


def product(tokens: int, width: int, kind: str, device: str, seed: int = 0) -> Product:
    values = randn(tokens, width, seed=seed).to(device)
    if kind == "splits":
        return Product(torch.stack([values, randn(tokens, width, seed=seed + 1).to(device)]))
    if kind == "plain":
        return Product(values.bfloat16())
    scales = randn(tokens, seed=seed + 1).abs() + 0.1, randn(width, seed=seed + 2).abs() + 0.1
    return Product((values * 1000).bfloat16(), scales[0].to(device), (scales[1] / 1000).to(device))


def decoded(cache: torch.Tensor) -> torch.Tensor:
    """A cache of float16 or bfloat16 with what an "fp8" one holds; NaN stays NaN."""
    whole = kv_cache.decode(kv_cache.codes(cache), kv_cache.exponents(cache))
    return whole.bfloat16() if cache.is_cuda else whole.half()


def check_written(mine: torch.Tensor, theirs: torch.Tensor, num_written: int) -> None:
    """Codes at most one step apart (sums run in another order), nothing else touched."""
    is_written = (theirs != 255).flatten()
    # A token's byte may be 255 by chance, but not its neighbours' too.
    assert num_written * 0.97 <= int(is_written.sum()) <= num_written
    a, b = mine.flatten()[is_written].cpu(), theirs.flatten()[is_written].cpu()
    assert float((a != b).float().mean()) < 0.01
    assert int(((mine != theirs).flatten() & ~is_written).sum()) <= num_written * 0.01
    values = [
        kv_cache.decode(kv_cache.codes(c), kv_cache.exponents(c)).nan_to_num(0, 0, 0) for c in (mine, theirs)
    ]
    assert relative_error(*values) < 3e-3


CHUNKS = [[(0, 20)], [(0, 1), (33, 40), (100, 17), (15, 2)]]
SHAPES = [(4, 4, 64), (9, 3, 64), (20, 2, 128), (2, 1, 256)]  # GQA of one, three, ten; Gemma's


def tokens_of(chunks: list[tuple[int, int]], tile: int, num_blocks: int, device: str) -> Tokens:
    """Chunks (first position, number of tokens) in scattered rows and blocks, with padding behind them."""
    table = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(3)).int().view(8, -1)
    positions, rows, tiles, first = [], [], [(0, 0, 0, 0)], 0
    for i, (start, count) in enumerate(chunks):
        positions += range(start, start + count)
        rows += [7 - i] * count
        tiles += [(first + j, min(tile, count - j), 7 - i, start + j) for j in range(0, count, tile)]
        first += count
    ints = [torch.tensor(v, dtype=torch.int32) for v in ([*positions, 0, 0, -1], [*rows, -1, -1, 2], tiles)]
    positions, rows, tiles = (t.to(device) for t in ints)
    return Tokens(positions, rows, table.to(device), tiles, tile)


def fill(caches, table: torch.Tensor, lengths: dict[int, int], kv_heads: int, dim: int) -> None:
    """Keys and values of the first tokens of rows of the table, by row."""
    for row, length in lengths.items():
        at = torch.arange(length)
        block = table.cpu()[row, at // 16].long()
        for n, cache in enumerate(caches):
            new = vectors(length, kv_heads, dim, 100 * row + n)
            kv_cache.write(cache, block.to(cache.device), (at % 16).to(cache.device), new.to(cache.device))


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), SHAPES)
@pytest.mark.parametrize(("kind", "has_extras"), [("plain", False), ("scales", True)])
def test_rope_and_append(chunks, heads, kv_heads, dim, kind, has_extras, device):
    tokens, w = tokens_of(chunks, 16, 128, device), attention(heads, kv_heads, dim, device, has_extras)
    qkv = product(len(tokens.positions), (heads + 2 * kv_heads) * dim, kind, device)
    mine, theirs = ([poisoned(128, kv_heads, dim, device) for _ in "kv"] for _ in range(2))
    got = triton_prefill.rope_and_append(qkv, w, tuple(mine), tokens)
    expected = prefill.rope_and_append(qkv, w, tuple(theirs), tokens)
    assert relative_error(got, expected) < BF16
    for a, b in zip(mine, theirs, strict=True):
        check_written(a, b, sum(n for _, n in chunks) * kv_heads * (dim + 1))


def oracle(query, keys, values, positions, scale: float, window: int | None) -> torch.Tensor:
    """float64 [T, heads, dim] of query [T, heads, dim] over keys and values [S, kv_heads, dim]."""
    group = query.shape[1] // keys.shape[1]
    keys, values = (t.double().repeat_interleave(group, dim=1) for t in (keys, values))
    distance = positions.unsqueeze(1) - torch.arange(len(keys))
    hidden = (distance < 0) | (distance >= (window or 1 << 30))
    scores = torch.einsum("thd,shd->hts", query.double(), keys) * scale
    probs = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return torch.einsum("hts,shd->thd", probs, values)


@pytest.mark.parametrize("window", [None, 1, 20])
def test_the_specification_reads_what_was_rounded(window):
    """Against float64 over the rounded vectors: the scales are where they belong."""
    heads, kv_heads, dim, length = 6, 2, 64, 70
    w = attention(heads, kv_heads, dim, "cpu", window=window)
    caches, table = [poisoned(8, kv_heads, dim, "cpu") for _ in "kv"], torch.randperm(8).int().view(1, 8)
    fill(caches, table, {0: length}, kv_heads, dim)
    positions = torch.arange(30, length)
    tiles = torch.tensor([[0, 40, 0, 30]], dtype=torch.int32)
    tokens = Tokens(positions.int(), torch.zeros(40, dtype=torch.int32), table, tiles, 64)
    query = randn(40, heads, dim, seed=4)
    keys, values = (vectors(length, kv_heads, dim, n) for n in range(2))
    rounded = [kv_cache.decode(*kv_cache.encode(x)) for x in (keys, values)]
    got = prefill.attend(query, w, tuple(caches), tokens).view(40, heads, dim)
    assert relative_error(got, oracle(query, *rounded, positions, w.scale, window)) < 1e-5


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "tile"), [(2, 2, 64, 16), (6, 2, 128, 32), (2, 1, 256, 16)]
)
@pytest.mark.parametrize("window", [None, 1, 20])
def test_attend(chunks, heads, kv_heads, dim, tile, window, device):
    tokens, w = tokens_of(chunks, tile, 128, device), attention(heads, kv_heads, dim, device, window=window)
    caches = tuple(poisoned(128, kv_heads, dim, device) for _ in "kv")
    fill(caches, tokens.block_table, {7 - i: a + n for i, (a, n) in enumerate(chunks)}, kv_heads, dim)
    dtype = torch.bfloat16 if device == "cuda" else torch.float16
    query = randn(len(tokens.positions), heads, dim, seed=4).to(device, dtype)
    count = sum(n for _, n in chunks)
    got = triton_prefill.attend(query, w, caches, tokens)[:count]
    assert relative_error(got, prefill.attend(query, w, caches, tokens)[:count]) < 2 * BF16
    # Powers of two may be taken out of a product: the bits are those of a 16-bit cache of the same values,
    # where the tensor cores sum in the same order.
    plain = triton_prefill.attend(query, w, tuple(map(decoded, caches)), tokens)[:count]
    assert relative_error(got, plain) < 5e-3


def next_tokens(positions: list[int], rows: list[int], device: str) -> Tokens:
    table = torch.randperm(128, generator=torch.Generator().manual_seed(3)).int().view(8, 16).to(device)
    at, of = (torch.tensor(v, dtype=torch.int32, device=device) for v in (positions, rows))
    return Tokens(at, of, table, at.new_empty(0, 4), 1)


def values_of(activations) -> torch.Tensor:
    if activations.scale is None:
        return activations.values.float()
    scale = activations.scale.unsqueeze(1)
    return activations.values[:, : len(scale)].float() * scale


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), SHAPES)
@pytest.mark.parametrize(
    ("form", "kind", "window"), [("tiled", "plain", None), ("bf16", "scales", 70), ("tiled", "splits", 1)]
)
@pytest.mark.parametrize(  # parts of the context come of the programs
    ("programs", "is_shared"), [(1, False), (1024, False), (1024, True)]
)
def test_attend_next(heads, kv_heads, dim, form, kind, window, programs, is_shared, device, monkeypatch):
    monkeypatch.setattr(decode_attention, "_PROGRAMS", programs)
    monkeypatch.setattr(decode_attention, "_LONG", 64)
    positions, rows = [0, 15, 16, 255, 130, -1], [3, 5, 1, 0, 2, 4]
    if is_shared:  # drafts of two sequences, and a short chunk
        positions, rows = [14, 15, 16, 17, 200, 130, 131, -1, 0, 1], [3, 3, 3, 3, 5, 1, 1, 4, 2, 2]
    tokens, w = (
        next_tokens(positions, rows, device),
        attention(heads, kv_heads, dim, device, kind == "scales", window),
    )
    mine, theirs = (tuple(poisoned(128, kv_heads, dim, device) for _ in "kv") for _ in range(2))
    firsts: dict[int, int] = {}
    for row, position in zip(rows, positions, strict=True):
        firsts.setdefault(row, max(position, 0))
    for caches in (mine, theirs):
        fill(caches, tokens.block_table, firsts, kv_heads, dim)
    qkv = product(len(rows), (heads + 2 * kv_heads) * dim, kind, device)
    bound = prefill.Bound.of(50.0, 16, qkv.values.device) if form == "tiled" else None
    got = triton_prefill.attend_next(qkv, w, mine, tokens, form, bound, is_shared=is_shared)
    expected = prefill.attend_next(qkv, w, theirs, tokens, form, bound)
    assert relative_error(values_of(got), values_of(expected)) < 2 * BF16
    for a, b in zip(mine, theirs, strict=True):
        cached = sum(firsts[r] for r in firsts)
        new = sum(p >= 0 for p in positions)
        check_written(a, b, (cached + new) * kv_heads * (dim + 1))


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(9, 3, 64), (8, 2, 128)])
def test_tokens_of_one_sequence_see_each_other_with_16_bits_too(heads, kv_heads, dim, device):
    positions, rows = [14, 15, 16, 17, 100, -1], [3, 3, 3, 3, 5, 1]
    tokens, w = next_tokens(positions, rows, device), attention(heads, kv_heads, dim, device)
    dtype = torch.bfloat16 if device == "cuda" else torch.float16
    mine, theirs = (
        tuple(torch.full((128, kv_heads, 16, dim), float("nan"), dtype=dtype, device=device) for _ in "kv")
        for _ in range(2)
    )
    for caches in (mine, theirs):
        fill(caches, tokens.block_table, {3: 14, 5: 100}, kv_heads, dim)
    qkv = product(6, (heads + 2 * kv_heads) * dim, "plain", device)
    got = triton_prefill.attend_next(qkv, w, mine, tokens, "bf16", is_shared=True)
    expected = prefill.attend_next(qkv, w, theirs, tokens, "bf16")
    assert relative_error(values_of(got), values_of(expected)) < 2 * BF16


def test_drafts_have_the_bits_of_single_steps(device):
    """Where both are appended first, in a batch of the same size."""
    heads, kv_heads, dim = 4, 2, 64
    w = attention(heads, kv_heads, dim, device)
    qkv = product(4, (heads + 2 * kv_heads) * dim, "plain", device)
    together, one_by_one = (tuple(poisoned(128, kv_heads, dim, device) for _ in "kv") for _ in range(2))
    tokens = next_tokens([200, 201, 202, 203], [2, 2, 2, 2], device)
    for caches in (together, one_by_one):
        fill(caches, tokens.block_table, {2: 200}, kv_heads, dim)
    got = values_of(triton_prefill.attend_next(qkv, w, together, tokens, "bf16", is_shared=True))
    rows = []
    for i in range(4):
        positions = [200 + j if j == i else -1 for j in range(4)]
        step = next_tokens(positions, [2, 2, 2, 2], device)
        out = triton_prefill.attend_next(qkv, w, one_by_one, step, "bf16", is_shared=True)
        rows.append(values_of(out)[i])
    assert torch.equal(got, torch.stack(rows))
    assert all(torch.equal(a, b) for a, b in zip(together, one_by_one, strict=True))
