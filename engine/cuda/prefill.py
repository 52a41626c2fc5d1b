"""Prompt chunks: the layers of `engine.cuda.layers` over the paged KV cache."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.cuda.graphs import capture
from engine.cuda.layers import DIRECT_TOKENS, Layer, Layers
from engine.cuda.transfer import upload
from engine.models.config import ModelConfig
from kernels.cuda import tables
from kernels.prefill import Activations, Form, Product, Tokens

# At most. Up to so many the host may be the slower one: 8B takes 31 ms for 2,048 tokens, and up to 38 where
# its launches come late.
_GRAPH_TOKENS = 2048
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
class _Step:
    """Inputs of so many tokens on the device, and the graph that reads them.

    ints: int32, token ids, then positions and rows (see `Tokens`), then tiles. x: float32 [T, hidden].
    """

    ints: Tensor
    x: Tensor
    tokens: Tokens
    graph: torch.cuda.CUDAGraph | None = None


class Prefill:
    """The number of tokens is rounded up, so that few shapes occur; small ones become CUDA graphs."""

    def __init__(
        self,
        layers: Layers,
        config: ModelConfig,
        block_table: Tensor,
        device: torch.device,
        num_decodes: int = 0,
        max_tokens: int = _GRAPH_TOKENS,
    ) -> None:
        """num_decodes: most decodes beside the chunks of a step. max_tokens: most tokens of a step."""
        self._num_decodes = num_decodes
        self._layers, self._config = layers, config
        self._block_table, self._device = block_table, device
        self._graphs: dict[tuple[int, bool], _Step] = {}  # of so many tokens, with decodes among them or not
        self._graph_tokens = min(max_tokens, _GRAPH_TOKENS)
        self._graph_x = torch.empty(_padded(self._graph_tokens), config.hidden_size, device=device)
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def forward(self, chunks: Sequence[Chunk], first_ids: Tensor | None = None) -> Tensor:
        """Residual stream after the last layer, float32 [tokens, hidden], chunk by chunk; fills the cache.

        first_ids: the ids of the first tokens, int32 on the device, where these are decodes: chunks of one
        token, whose ids the host may not know yet. The result is valid until the next call.
        """
        num_tokens = sum(len(c.token_ids) for c in chunks)
        padded = _padded(num_tokens)
        step = self._graphs.get((padded, first_ids is not None))
        if step is None or _num_tiles(chunks, step.tokens.tile) > len(step.tokens.tiles):
            tile = self._tile(padded)
            step = self._make(padded, _num_tiles(chunks, tile), tile, None)
        ints = _lay_out(chunks, padded, len(step.tokens.tiles), step.tokens.tile)
        step.ints.copy_(upload(ints, self._device))
        if first_ids is not None:
            step.ints[: len(first_ids)].copy_(first_ids)
        if step.graph is None:
            self._compute(step, is_prompt=first_ids is None)
        else:
            step.graph.replay()
        return step.x[:num_tokens]

    def warm_up(self) -> None:
        """Capture the graphs. To be called once, after a `forward`, in whose stream they will be replayed."""
        if self._device.type != "cuda":
            return
        sizes = sorted({_padded(n) for n in range(1, self._graph_tokens + 1)}, reverse=True)
        kinds = [(n, False) for n in sizes]
        if self._num_decodes:
            kinds += [(n, True) for n in sizes if n <= DIRECT_TOKENS]
        for padded, has_decodes in kinds:
            graph = torch.cuda.CUDAGraph()
            tile = self._tile(padded)
            num_tiles = padded // tile + _GRAPH_TILES + (self._num_decodes if has_decodes else 0)
            step = self._make(padded, num_tiles, tile, graph)
            step.ints.copy_(upload(_lay_out((), padded, num_tiles, tile), self._device))  # all of it padding
            self._compute(step, is_prompt=not has_decodes)  # compiles and loads what it needs
            with capture(graph, self._pool):
                self._compute(step, is_prompt=not has_decodes)
            self._graphs[padded, has_decodes] = step

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

    def _compute(self, step: _Step, *, is_prompt: bool) -> None:
        """The residual stream of the step's tokens."""
        x, ops = step.x, self._layers.ops
        tables.embed(step.ints[: len(x)], self._layers.weights.embedding, x, self._config.embedding_scale)

        def attend(qkv: Product, layer: Layer, form: Form) -> Activations:
            query = ops.rope_and_append(qkv, layer.attention, layer.caches, step.tokens)
            attended = ops.attend(query, layer.attention, layer.caches, step.tokens)
            quantized: Activations = ops.quantize(attended, form)
            return quantized

        pending = self._layers.forward(x, attend, is_prompt=is_prompt)
        ops.add(x, *pending, self._config.rms_norm_eps)


def _padded(num_tokens: int) -> int:
    """The number of tokens that a step of so many is computed as."""
    multiple = 32 if num_tokens <= 256 else 64 if num_tokens <= 512 else 128
    return -(-num_tokens // multiple) * multiple


def chunk_sizes(most: int) -> tuple[int, ...]:
    """Numbers of tokens up to `most` that are computed without padding; beyond the graphs' only a few."""
    captured = sorted({_padded(n) for n in range(1, _GRAPH_TOKENS + 1)})
    larger = range(_GRAPH_TOKENS + 512, most + 1, 512)
    return tuple(n for n in (*captured, *larger) if n <= most)


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


def padded_tokens(num_tokens: int) -> int:
    """That are in memory at once for chunks of so many tokens; the graphs have memory of their own."""
    return _padded(num_tokens) + _padded(min(num_tokens, _GRAPH_TOKENS))
