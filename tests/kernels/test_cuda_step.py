"""The Hopper kernels against float64: formats, ugly sizes, poisoned outputs, rows independent of batches."""

import pytest
import torch

from kernels import AttentionMetadata, AttentionWeights, FFNWeights, reference
from kernels.cuda import tables
from kernels.cuda.packing import (
    DEVICE_FORMATS,
    DeviceFormat,
    DeviceWeight,
    dequantize,
    random_matrix,
    to_device,
)
from kernels.cuda.program import MAX_TOKENS, Link, PhaseList, StepInputs, StepProgram, add_layers
from tests.kernels.helpers import random_packed, relative_error, rope

HAS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HAS_HOPPER, reason="needs a Hopper GPU (sm_90)")]
DEVICE = torch.device("cuda")
NAMES = ["w2g128", "w2g32", "w2g64", "w3g64", "w3g128", "w4g64", "w4g128", "w5g128", "w6g128", "w8row-sym"]
NAMES += ["w4g32-f16", "w5g32-f16", "w8g32-f16", "w4g64-sym"]
SHAPES = [(16, 256), (37, 96), (4000, 4096), (48, 14336), (8200, 800)]
W4 = DeviceFormat(4, 64, "zero")


def _weight(n: int, k: int, name: str, seed: int = 0) -> DeviceWeight:
    return to_device(random_packed(n, k, name, seed), DEVICE)


def _inputs(
    positions: list[int], sequences: list[int], first_rows: list[int], table: torch.Tensor
) -> StepInputs:
    inputs = StepInputs.allocate(len(table), table.shape[1], DEVICE)
    for to, values in (
        (inputs.positions, positions),
        (inputs.sequences, sequences),
        (inputs.first_rows, first_rows),
    ):
        to[: len(values)] = torch.tensor(values, dtype=torch.int32, device=DEVICE)
    inputs.block_table.copy_(table)
    return inputs


def _multiply(weight: DeviceWeight, x: torch.Tensor, **options: object) -> torch.Tensor:
    """One phase over x [tokens, k], its output poisoned before."""
    n = weight.parts[0].n if "activation" in options else weight.n
    out = torch.full((len(x), n), float("nan"), device=DEVICE)
    phases = PhaseList()
    phases.add_matmul(weight, x, out, **options)  # type: ignore[arg-type]
    StepProgram(phases, StepInputs.allocate(1, 1, DEVICE)).launch(len(x))
    torch.cuda.synchronize()
    return out


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.mark.parametrize("name", NAMES)
def test_dequantize_and_embed(name: str) -> None:
    weight = _weight(75, 800, name)
    expected = dequantize(weight.parts[0])
    torch.testing.assert_close(tables.dequantize(weight, torch.float32), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        tables.dequantize(weight).float(), expected.bfloat16().float(), rtol=1e-2, atol=1e-3
    )
    ids = torch.tensor([0, 74, 17, 8], dtype=torch.int32, device=DEVICE)
    out = torch.full((4, 800), float("nan"), device=DEVICE)
    positions = torch.tensor([3, -1, 0, 9], dtype=torch.int32, device=DEVICE)
    tables.embed(ids, weight, out, scale=2.0, advance=positions)
    torch.testing.assert_close(out, 2 * expected[ids.long()], rtol=1e-5, atol=1e-6)
    assert positions.tolist() == [4, -1, 1, 10]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tokens", [1, 3, 8, 16])
def test_product(name: str, shape: tuple[int, int], tokens: int) -> None:
    weight, x = _weight(*shape, name), _random(tokens, shape[1])
    expected = x.double() @ dequantize(weight.parts[0]).double().T
    assert relative_error(_multiply(weight, x), expected) < 1e-4


@pytest.mark.parametrize("name", ["w4g64", "w3g128", "w2g32", "w8row-sym", "w5g32-f16"])
@pytest.mark.parametrize("shape", [(4000, 4096), (48, 14336), (37, 96)])
def test_a_row_is_the_same_bits_in_any_batch(name: str, shape: tuple[int, int]) -> None:
    weight, x = _weight(*shape, name), _random(MAX_TOKENS, shape[1])
    together = _multiply(weight, x)
    for tokens in (1, 2, 3, 4, 5, 8, 13):
        assert torch.equal(_multiply(weight, x[:tokens].contiguous()), together[:tokens])
    assert torch.equal(_multiply(weight, x[7:8].contiguous()), together[7:8])


def test_stacked_formats_and_bias() -> None:
    weight = DeviceWeight(
        tuple(_weight(n, 288, f).parts[0] for n, f in ((48, "w4g64"), (32, "w3g64"), (20, "w8row-sym")))
    )
    x, bias = _random(3, 288), _random(100, seed=1)
    dense = torch.cat([dequantize(p) for p in weight.parts]).double()
    assert relative_error(_multiply(weight, x, bias=bias), x.double() @ dense.T + bias.double()) < 1e-4


def _in_link(x: torch.Tensor) -> Link:
    """As if a phase of the program had written x [tokens, 256 n] there: its only writing, mark 1."""
    link = Link.allocate(len(x), x.shape[1], DEVICE)
    pieces = x.view(len(x), -1, 32, 2, 4).transpose(2, 3).reshape(x.shape)
    link.data.copy_((pieces.view(torch.int32) | 1).view(torch.float32))
    link.writings = 1
    return link


def _out_of_link(link: Link) -> torch.Tensor:
    assert (link.data.view(torch.int32) & 1 == 1).all()
    return link.data.view(len(link.data), -1, 2, 32, 4).transpose(2, 3).reshape(link.data.shape)


@pytest.mark.parametrize("tokens", [1, 2, 4, 16])
@pytest.mark.parametrize("has_post_norm", [False, True])
def test_norm_with_delta(tokens: int, has_post_norm: bool) -> None:
    k, weight = 5120, _weight(256, 5120, "w4g64")
    x, delta, norm = _random(tokens, k), _random(tokens, k, seed=1), _random(k, seed=2)
    post = _random(k, seed=3) if has_post_norm else None
    stream = Link.allocate(tokens, k, DEVICE)
    got = _multiply(weight, x, norm=norm, eps=1e-5, delta=_in_link(delta), delta_norm=post, stream=stream)
    added = delta.double() if post is None else reference.rms_norm(delta, post, 1e-5).double()
    h = x.double() + added
    normed = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-5) * norm.double()
    assert relative_error(_out_of_link(stream), h) < 1e-5
    assert relative_error(got, normed @ dequantize(weight.parts[0]).double().T) < 1e-4


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("tokens", [1, 7, 16])
def test_gated(activation: str, tokens: int) -> None:
    gate, up = _weight(5000, 1056, "w4g64"), _weight(5000, 1056, "w3g64", seed=1)
    x = _random(tokens, 1056)
    g, u = (x.double() @ dequantize(w.parts[0]).double().T for w in (gate, up))
    got = _multiply(DeviceWeight((*gate.parts, *up.parts)), x, activation=activation)
    assert relative_error(got, reference.activate(g, activation) * u) < 1e-4


def test_refuses_too_many_tokens() -> None:
    with pytest.raises(ValueError, match="num_tokens"):
        _multiply(_weight(16, 256, "w4g64"), _random(17, 256))


class Decoder:
    """A small random decoder: the kernel's program, and plain float32 torch on the same weights."""

    def __init__(
        self, heads: int, kv_heads: int, dim: int, window: int | None = None, gemma: bool = False
    ) -> None:
        g = torch.Generator(device=DEVICE).manual_seed(0)
        hidden, ffn, vocab = 512, 1056, 1000
        cos, sin = (t.to(DEVICE) for t in rope(4096, dim))

        def matrix(n: int, k: int, f: DeviceFormat = W4) -> DeviceWeight:
            return DeviceWeight((random_matrix(n, k, f, DEVICE, g),))

        def vector(n: int) -> torch.Tensor:
            return 1 + 0.2 * torch.randn(n, device=DEVICE, generator=g)

        def layer() -> tuple[AttentionWeights, FFNWeights]:
            qkv = [
                matrix(n * dim, hidden, f).parts[0]
                for n, f in ((heads, W4), (kv_heads, W4), (kv_heads, DEVICE_FORMATS[8]))
            ]
            attention = AttentionWeights(
                norm=vector(hidden), qkv=DeviceWeight(tuple(qkv)), o=matrix(hidden, heads * dim),
                num_heads=heads, num_kv_heads=kv_heads, head_dim=dim, eps=1e-5, cos=cos, sin=sin,
                scale=dim**-0.5, window=window,
                q_norm=vector(dim) if gemma else None, k_norm=vector(dim) if gemma else None,
                post_norm=vector(hidden) if gemma else None,
            )  # fmt: skip
            both = (matrix(ffn, hidden).parts[0], matrix(ffn, hidden, DEVICE_FORMATS[2]).parts[0])
            return attention, FFNWeights(
                norm=vector(hidden), gate_up=DeviceWeight(both), down=matrix(hidden, ffn), eps=1e-5,
                post_norm=vector(hidden) if gemma else None, activation="gelu_tanh" if gemma else "silu",
            )  # fmt: skip

        self.layers, self.norm, self.head = (
            [layer(), layer()],
            vector(hidden),
            matrix(vocab, hidden, DEVICE_FORMATS[8]),
        )
        self.num_blocks, self.dim, self.kv_heads, self.heads = 400, dim, kv_heads, heads
        shape = (self.num_blocks, kv_heads, 16, dim)
        self.caches = [tuple(_random(*shape, seed=i).bfloat16() for i in (1, 2)) for _ in self.layers]
        self.embedded = torch.zeros(MAX_TOKENS, hidden, device=DEVICE)
        self.logits = torch.zeros(MAX_TOKENS, vocab, device=DEVICE)

    def program(self, inputs: StepInputs) -> StepProgram:
        phases = PhaseList()
        add_layers(phases, self.layers, self.caches, self.embedded, self.norm, 1e-5, self.head, self.logits)  # type: ignore[arg-type]
        return StepProgram(phases, inputs, (self.heads, self.kv_heads, self.dim))

    def expected(self, x: torch.Tensor, inputs: StepInputs, runs: list[tuple[int, int]]) -> torch.Tensor:
        """runs: (first row, rows) of each sequence in the step."""
        tokens = len(x)
        positions, starts = inputs.positions[:tokens], [r for r, _ in runs] + [tokens]
        rows = inputs.sequences[[r for r, _ in runs]].long()
        table, seq = inputs.block_table[rows], inputs.sequences[:tokens].long()
        blocks = inputs.block_table[seq, (positions // 16).long()]
        metadata = AttentionMetadata(
            positions, blocks * 16 + positions % 16, torch.tensor(starts, dtype=torch.int32),
            positions[[s - 1 for s in starts[1:]]] + 1, table,
        )  # fmt: skip
        dense = [[_dense_block(b) for b in layer] for layer in self.layers]
        x = x.clone()
        for (attention, ffn), (keys, values) in zip(dense, self.caches, strict=True):
            k_cache, v_cache = keys.transpose(2, 3).contiguous(), values.clone()
            reference.attention_block(x, attention, k_cache, v_cache, metadata)
            reference.ffn_block(x, ffn)
        return reference.logits(x, self.norm, 1e-5, dequantize(self.head.parts[0]))


def _dense_block(block):  # type: ignore[no-untyped-def]
    from dataclasses import replace

    def dense(w: DeviceWeight) -> torch.Tensor:
        return torch.cat([dequantize(p) for p in w.parts])

    if isinstance(block, AttentionWeights):
        return replace(block, qkv=dense(block.qkv), o=dense(block.o))
    return replace(block, gate_up=dense(block.gate_up), down=dense(block.down))


SHAPES_OF_ATTENTION = [
    (8, 2, 64, None, False),
    (9, 3, 64, None, False),
    (16, 2, 128, None, False),
    (4, 4, 128, 100, False),
]
SHAPES_OF_ATTENTION += [(4, 1, 256, None, True), (4, 1, 256, 50, True)]


@pytest.mark.parametrize("shape", SHAPES_OF_ATTENTION)
def test_decoder_step(shape: tuple[int, int, int, int | None, bool]) -> None:
    decoder = Decoder(*shape)
    table = (
        torch.randperm(decoder.num_blocks, generator=torch.Generator().manual_seed(3))[:396].view(4, 99).int()
    )
    # Sequences of one, three and four tokens; contexts within and beyond a split; one row of padding.
    runs, positions = [(0, 1), (1, 3), (4, 4)], [0, 126, 127, 128, 1300, 1301, 1302, 1303]
    inputs = _inputs([*positions, -1], [2, 0, 0, 0, 1, 1, 1, 1, 3], [0, 1, 1, 1, 4, 4, 4, 4, 8], table)
    x = _random(9, 512, seed=5)
    decoder.embedded[:9] = x
    expected = decoder.expected(x[:8], inputs, runs)
    program = decoder.program(inputs)
    program.launch(9)
    torch.cuda.synchronize()
    assert relative_error(decoder.logits[:8], expected) < 3e-3  # a key on the edge of two bfloat16 values
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
    decoder = Decoder(8, 2, 64)
    table = torch.arange(396).view(4, 99).int()
    x = _random(4, 512, seed=6)
    first = 254
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


def test_replays_of_a_graph() -> None:
    """A captured step gives the same bits at every replay."""
    decoder = Decoder(8, 2, 128)
    table = torch.arange(396).view(4, 99).int()
    inputs = _inputs([700], [0], [0], table)
    x = _random(1, 512, seed=7)
    program = decoder.program(inputs)
    decoder.embedded[:1] = x
    program.launch(1)
    torch.cuda.synchronize()
    first = decoder.logits[:1].clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        program.launch(1)
    for _ in range(50):
        decoder.logits.fill_(float("nan"))
        decoder.embedded[:1] = x
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(decoder.logits[:1], first)
