"""Prompt chunks: products from packed weights or of unpacked ones, Triton between them, paged KV cache."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

import kernels.prefill
from engine.cuda.decode import Caches
from engine.cuda.transfer import upload
from engine.cuda.weights import DeviceWeights, matrix_of
from engine.models.config import ModelConfig
from kernels import AttentionWeights, FFNWeights
from kernels.cuda import prompt, tables
from kernels.cuda.packing import DeviceWeight
from kernels.prefill import FP8, Activations, Form, Product, Tokens

Precision = Literal["fp8", "bf16"]
PRECISION: Precision = "fp8"
"""Of the products on a GPU: with "fp8", matrices of at most 4 bits a weight and their inputs are e4m3."""

_FP8_BITS = 4  # wider codes lose more to e4m3's three bits of mantissa than they lost to rounding
_DIRECT_TOKENS = 256  # at most are multiplied by packed weights; for more, unpacking them once is faster
_GRAPH_TOKENS = 1024  # at most; beyond, the launches hide behind the products
_GRAPH_TILES = 8  # beside those that are full


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens `start` to `start` + len(token_ids) of the sequence in row `slot` of the block table."""

    slot: int
    start: int
    token_ids: Sequence[int]

    @property
    def end(self) -> int:
        return self.start + len(self.token_ids)


@dataclass(frozen=True, slots=True, eq=False)
class _Matrix:
    """units: `tables.fp8_units`, or None for a bfloat16 product."""

    weight: DeviceWeight
    units: tuple[float, ...] | None

    def form(self, num_tokens: int) -> Form:
        """Of its input."""
        if self.units is None:
            return "bf16"
        return "tiled" if num_tokens <= _DIRECT_TOKENS else "fp8"


@dataclass(frozen=True, slots=True, eq=False)
class _Layer:
    attention: AttentionWeights
    ffn: FFNWeights
    caches: tuple[Tensor, Tensor]
    qkv: _Matrix
    o: _Matrix
    gate_up: _Matrix
    down: _Matrix


@dataclass(frozen=True, slots=True, eq=False)
class _Step:
    """Inputs of so many tokens on the device, and the graph that reads them.

    ints: int32, token ids, then positions and rows (see `Tokens`), then tiles. x: float32 [T, hidden].
    """

    ints: Tensor
    x: Tensor
    tokens: Tokens
    graph: torch.cuda.CUDAGraph | None = None


class Prefill:
    """Sums, residual stream, norms and rotation in float32; outputs of products in bfloat16.

    Up to 256 tokens, e4m3 products read the packed weights. For more, and for bfloat16, a matrix is
    unpacked into one scratch buffer, as large as the largest, right before its use. The number of tokens is
    rounded up, so that few shapes occur; small ones are captured as CUDA graphs.
    """

    def __init__(
        self,
        weights: DeviceWeights,
        config: ModelConfig,
        caches: Caches,
        block_table: Tensor,
        device: torch.device,
        precision: Precision | None = None,
    ) -> None:
        """precision: PRECISION if it is not given; a CPU has bfloat16 alone."""
        self._config, self._block_table, self._device = config, block_table, device
        self._embedding = weights.embedding
        use_fp8 = (precision or PRECISION) == "fp8" and device.type == "cuda"
        self._ops = _ops(device)
        self._layers = [
            _Layer(a, f, c, *(_matrix(w, use_fp8) for w in (a.qkv, a.o, f.gate_up, f.down)))
            for (a, f), c in zip(weights.layers, caches, strict=True)
        ]
        matrices = [m for layer in self._layers for m in (layer.qkv, layer.o, layer.gate_up, layer.down)]
        size = max(_scratch_bytes(m.weight, m.units is not None) for m in matrices)
        self._scratch = torch.empty(size, dtype=torch.uint8, device=device)
        self._row_scale = torch.empty(max(m.weight.n for m in matrices), device=device)
        self._graphs: dict[int, _Step] = {}
        self._graph_x = torch.empty(_GRAPH_TOKENS, config.hidden_size, device=device)
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self._one = torch.ones((), device=device)

    def forward(self, chunks: Sequence[Chunk]) -> Tensor:
        """Residual stream after the last layer, float32 [tokens, hidden], chunk by chunk; fills the cache.

        Valid until the next call.
        """
        num_tokens = sum(len(c.token_ids) for c in chunks)
        padded = _padded(num_tokens)
        step = self._graphs.get(padded)
        if step is None or _num_tiles(chunks, step.tokens.tile) > len(step.tokens.tiles):
            tile = self._tile(padded)
            step = self._make(padded, _num_tiles(chunks, tile), tile, None)
        ints = _lay_out(chunks, padded, len(step.tokens.tiles), step.tokens.tile)
        step.ints.copy_(upload(ints, self._device))
        if step.graph is None:
            self._compute(step)
        else:
            step.graph.replay()
        return step.x[:num_tokens]

    def warm_up(self) -> None:
        """Capture the graphs. To be called once, after a `forward`, in whose stream they will be replayed."""
        if self._device.type != "cuda":
            return
        for padded in sorted({_padded(n) for n in range(1, _GRAPH_TOKENS + 1)}, reverse=True):
            tile, graph = self._tile(padded), torch.cuda.CUDAGraph()
            step = self._make(padded, padded // tile + _GRAPH_TILES, tile, graph)
            step.ints.copy_(upload(_lay_out((), padded, len(step.tokens.tiles), tile), self._device))
            self._compute(step)  # compiles and loads what it needs
            stream = torch.cuda.current_stream()
            with torch.cuda.graph(graph, self._pool, stream, capture_error_mode="thread_local"):
                self._compute(step)
            self._graphs[padded] = step

    def _tile(self, padded: int) -> int:
        """Queries of a program of the attention: fewer where there would be few programs."""
        return 64 if padded <= 512 or self._config.head_dim > 128 else 128

    def _make(self, padded: int, num_tiles: int, tile: int, graph: torch.cuda.CUDAGraph | None) -> _Step:
        ints = torch.empty(3 * padded + 4 * num_tiles, dtype=torch.int32, device=self._device)
        if graph is None:
            x = torch.empty(padded, self._config.hidden_size, device=self._device)
        else:
            x = self._graph_x[:padded]
        _, positions, rows = ints[: 3 * padded].view(3, padded)
        tiles = ints[3 * padded :].view(num_tiles, 4)
        return _Step(ints, x, Tokens(positions, rows, self._block_table, tiles, tile), graph)

    def _compute(self, step: _Step) -> None:
        """The residual stream of the step's tokens."""
        x, ops, num_tokens = step.x, self._ops, len(step.x)
        tables.embed(step.ints[: len(x)], self._embedding, x, self._config.embedding_scale)
        last: tuple[Product, Tensor | None, Tensor | None] | tuple[()] = ()
        for layer in self._layers:
            a, f = layer.attention, layer.ffn
            normed = ops.normalize(x, a.norm, a.eps, layer.qkv.form(num_tokens), *last)
            query = ops.rope_and_append(self._multiply(normed, layer.qkv), a, layer.caches, step.tokens)
            attended = ops.attend(query, a, layer.caches, step.tokens)
            out = self._multiply(ops.quantize(attended, layer.o.form(num_tokens)), layer.o)
            form = layer.gate_up.form(num_tokens)
            normed = ops.normalize(x, f.norm, f.eps, form, out, a.o_bias, a.post_norm)
            both = self._multiply(normed, layer.gate_up)
            gated = ops.gate(both, f.gate_up_bias, f.activation, layer.down.form(num_tokens))
            last = self._multiply(gated, layer.down), f.down_bias, f.post_norm
        assert last
        ops.add(x, *last, self._layers[-1].ffn.eps)

    def _multiply(self, x: Activations, matrix: _Matrix) -> Product:
        """x times the matrix, transposed. The product's row scales are valid until the next one."""
        if matrix.units is None:
            dense = tables.dequantize(matrix.weight, out=self._scratch.view(torch.bfloat16))
            return Product(x.values @ dense.T)
        if x.values.dim() == 3:
            return prompt.multiply(matrix.weight, matrix.units, x)
        values, row_scale = tables.dequantize_fp8(
            matrix.weight, matrix.units, self._scratch.view(FP8), self._row_scale
        )
        out = torch._scaled_mm(
            x.values,
            values.T,
            scale_a=self._one,
            scale_b=self._one,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
        return Product(out, x.scale, row_scale)


def _is_narrow(matrix: DeviceWeight) -> bool:
    return all(p.format.bits <= _FP8_BITS and p.n % 16 == 0 for p in matrix.parts)  # as cuBLAS has it


def _matrix(weight: object, use_fp8: bool) -> _Matrix:
    matrix = matrix_of(weight)
    return _Matrix(matrix, tables.fp8_units(matrix) if use_fp8 and _is_narrow(matrix) else None)


def _scratch_bytes(matrix: DeviceWeight, is_fp8: bool) -> int:
    return matrix.n * matrix.k * (1 if is_fp8 else 2)


def _padded(num_tokens: int) -> int:
    """The number of tokens that a step of so many is computed as."""
    multiple = 32 if num_tokens <= 256 else 64 if num_tokens <= 512 else 128
    return -(-num_tokens // multiple) * multiple


def _lay_out(chunks: Sequence[Chunk], padded: int, num_tiles: int, tile: int) -> np.ndarray:
    """The `ints` of a step: all that the device must know of its chunks."""
    ints = np.zeros(3 * padded + 4 * num_tiles, dtype=np.int32)
    token_ids, positions, rows = ints[: 3 * padded].reshape(3, padded)
    rows.fill(-1)
    tiles, first = [], 0
    for c in chunks:
        last = first + len(c.token_ids)
        token_ids[first:last] = c.token_ids
        positions[first:last] = np.arange(c.start, c.end)
        rows[first:last] = c.slot
        for i in range(0, len(c.token_ids), tile):
            tiles.append((first + i, min(tile, last - first - i), c.slot, c.start + i))
        first = last
    tiles.sort(key=lambda t: -t[3])  # those with the most keys start first
    ints[3 * padded :].reshape(num_tiles, 4)[: len(tiles)] = np.array(tiles).reshape(-1, 4)
    return ints


def _num_tiles(chunks: Sequence[Chunk], tile: int) -> int:
    return sum(-(-len(c.token_ids) // tile) for c in chunks)


def workspace_bytes(config: ModelConfig, weights: DeviceWeights, num_tokens: int, max_model_len: int) -> int:
    """What a chunk of so many tokens takes beside weights and cache, scratch buffer included; rounded up."""
    layers = [matrix_of(w) for a, f in weights.layers for w in (a.qkv, a.o, f.gate_up, f.down)]
    scratch = max(_scratch_bytes(m, PRECISION == "fp8" and _is_narrow(m)) for m in layers)
    # float32 residual stream; bfloat16 (or narrower) inputs and outputs of the two widest products.
    widest = 3 * config.intermediate_size + 2 * (config.q_size + config.kv_size) + 2 * config.hidden_size
    padded = _padded(num_tokens) + _padded(_GRAPH_TOKENS)  # the graphs have memory of their own
    splits = (
        2 * prompt.MAX_SPLITS * 4 * _DIRECT_TOKENS * (config.q_size + 2 * config.kv_size + config.hidden_size)
    )
    return scratch + 4 * max(m.n for m in layers) + padded * (4 * config.hidden_size + 2 * widest) + splits


def _ops(device: torch.device) -> Any:
    """The functions of `kernels.prefill`, in Triton on a GPU."""
    if device.type != "cuda":
        return kernels.prefill
    from kernels.triton_ops import prefill  # imports triton

    return prefill
