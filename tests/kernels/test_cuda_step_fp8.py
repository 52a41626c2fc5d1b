"""The fused step over an e4m3 cache, against float32 torch whose keys and values are rounded the same way."""

import pytest
import torch

from kernels import kv_cache, reference
from kernels.cuda.packing import dequantize
from tests.kernels.helpers import relative_error
from tests.kernels.test_cuda_step import (
    DEVICE,
    HAS_HOPPER,
    SHAPES_OF_ATTENTION,
    Decoder,
    _dense_block,
    _inputs,
    _random,
)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HAS_HOPPER, reason="needs a Hopper GPU (sm_90)")]
ROUNDING = 1e-2  # a value on the edge of two codes, 6% apart


def _rounded(x: torch.Tensor) -> torch.Tensor:
    return kv_cache.decode(*kv_cache.encode(x))


class Fp8Decoder(Decoder):
    """Its caches are full of 255 (NaN codes, infinite scales) but for the tokens that `fill` writes."""

    def __init__(self, *shape) -> None:
        super().__init__(*shape)
        of_cache = self.num_blocks, self.kv_heads, self.dim, "fp8", DEVICE
        self.caches = [
            tuple(kv_cache.allocate(*of_cache).fill_(255) for _ in "kv")
            for _ in self.layers  # type: ignore[arg-type]
        ]

    def fill(self, table: torch.Tensor, lengths: dict[int, int]) -> None:
        """Random first tokens of rows of the table."""
        for row, length in lengths.items():
            at = torch.arange(length)
            block = table[row, at // 16].long().to(DEVICE)
            for i, caches in enumerate(self.caches):
                for n, cache in enumerate(caches):
                    new = _random(length, self.kv_heads, self.dim, seed=1000 * i + 100 * n + row)
                    kv_cache.write(cache, block, (at % 16).to(DEVICE), new)

    def expected_of(self, x: torch.Tensor, table: torch.Tensor, runs: list[tuple[int, int, int]]):
        """Logits, and caches [blocks, kv_heads, 16, dim]. runs: (row of the table, start, tokens)."""
        dense = [[_dense_block(b) for b in layer] for layer in self.layers]
        every = torch.arange(self.num_blocks, device=DEVICE)
        caches = [[kv_cache.read(c, every) for c in layer] for layer in self.caches]
        tokens, first = x.clone(), 0
        for row, start, count in runs:
            own = tokens[first : first + count]
            metadata = reference.AttentionMetadata(
                torch.arange(start, start + count, dtype=torch.int32, device=DEVICE),
                torch.stack([table[row, p // 16] * 16 + p % 16 for p in range(start, start + count)]).to(
                    DEVICE
                ),
                torch.tensor([0, count], dtype=torch.int32),
                torch.tensor([start + count], dtype=torch.int32),
                table[row : row + 1].to(DEVICE),
            )
            for (attention, ffn), layer in zip(dense, caches, strict=True):
                keys = layer[0].transpose(2, 3).contiguous()
                reference.attention_block(own, attention, keys, layer[1], metadata)
                layer[0] = keys.transpose(2, 3)
                reference.ffn_block(own, ffn)
            first += count
        return reference.logits(tokens, self.norm, 1e-5, dequantize(self.head.parts[0])), caches


@pytest.fixture(autouse=True)
def _appends_what_was_rounded(monkeypatch):
    theirs = reference.append_kv
    monkeypatch.setattr(
        reference, "append_kv", lambda keys, values, *to: theirs(_rounded(keys), _rounded(values), *to)
    )


@pytest.mark.parametrize("shape", SHAPES_OF_ATTENTION)
def test_decoder_step(shape: tuple[int, int, int, int | None, bool]) -> None:
    decoder = Fp8Decoder(*shape)
    table = (
        torch.randperm(decoder.num_blocks, generator=torch.Generator().manual_seed(3))[:396].view(4, 99).int()
    )
    # Sequences of one, three and four tokens; contexts within and beyond a split; one row of padding.
    runs, positions = [(2, 0, 1), (0, 126, 3), (1, 1300, 4)], [0, 126, 127, 128, 1300, 1301, 1302, 1303]
    decoder.fill(table, {0: 126, 1: 1300})
    inputs = _inputs([*positions, -1], [2, 0, 0, 0, 1, 1, 1, 1, 3], [0, 1, 1, 1, 4, 4, 4, 4, 8], table)
    x = _random(9, 512, seed=5)
    decoder.embedded[:9] = x
    expected, caches = decoder.expected_of(x[:8], table, runs)
    decoder.program(inputs).launch(9)
    torch.cuda.synchronize()
    assert relative_error(decoder.logits[:8], expected) < ROUNDING
    every = torch.arange(decoder.num_blocks, device=DEVICE)
    for mine, theirs in zip(decoder.caches, caches, strict=True):
        for cache, wanted in zip(mine, theirs, strict=True):
            got = kv_cache.read(cache, every)
            assert torch.equal(got.isnan(), wanted.isnan())
            assert float((got.nan_to_num() != wanted.nan_to_num()).float().mean()) < 1e-3
            assert relative_error(got.nan_to_num(), wanted.nan_to_num()) < 0.07
    together = decoder.logits[:8].clone()
    for row in (0, 1, 4):  # first tokens of their sequences, each alone
        alone = _inputs([positions[row]], [inputs.sequences[row].item()], [0], table)
        decoder.embedded[:1] = x[row]
        program = decoder.program(alone)
        decoder.logits.fill_(float("nan"))
        program.launch(1)
        torch.cuda.synchronize()
        assert torch.equal(decoder.logits[:1], together[row : row + 1])


def test_verifying_drafts_equals_decoding() -> None:
    """Four tokens of one sequence in one step give the bits of four steps."""
    decoder = Fp8Decoder(8, 2, 64)
    table = torch.arange(396).view(4, 99).int()
    x, first = _random(4, 512, seed=6), 254
    decoder.fill(table, {0: first})
    inputs = _inputs([first + i for i in range(4)], [0] * 4, [0] * 4, table)
    decoder.embedded[:4] = x
    decoder.program(inputs).launch(4)
    torch.cuda.synchronize()
    together = decoder.logits[:4].clone()
    for i in range(4):
        decoder.embedded[:1] = x[i]
        decoder.program(_inputs([first + i], [0], [0], table)).launch(1)
        torch.cuda.synchronize()
        assert torch.equal(decoder.logits[:1], together[i : i + 1])


def test_a_bfloat16_cache_of_the_same_values_gives_the_same() -> None:
    """But for the new token's key and value, which one rounds more than the other."""
    decoder, plain = Fp8Decoder(16, 2, 128), Decoder(16, 2, 128)
    table = torch.arange(396).view(4, 99).int()
    decoder.fill(table, {0: 1000})
    every = torch.arange(decoder.num_blocks, device=DEVICE)
    plain.caches = [tuple(kv_cache.read(c, every).bfloat16() for c in layer) for layer in decoder.caches]
    inputs, x = _inputs([1000], [0], [0], table), _random(1, 512, seed=7)
    logits = []
    for one in (decoder, plain):
        one.embedded[:1] = x
        one.program(inputs).launch(1)
        torch.cuda.synchronize()
        logits.append(one.logits[:1].clone())
    assert relative_error(*logits) < ROUNDING
