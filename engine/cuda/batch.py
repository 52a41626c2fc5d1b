"""Decodes of many rows in one pass over the weights: the layers of `engine.cuda.layers`, as CUDA graphs."""

import torch
from torch import Tensor

from engine.cuda.graphs import Graphs
from engine.cuda.layers import DIRECT_TOKENS, Layer, Layers
from engine.cuda.layout import Layout
from engine.cuda.rows import LaneRows, StepRows
from engine.cuda.sampling import sample_rows
from engine.models.config import ModelConfig
from kernels.cuda import attention, tables
from kernels.cuda.program import MAX_TOKENS
from kernels.prefill import Activations, Form, Product, Tokens
from kernels.sampling import Mode

# ms a step here and in the fused kernel, on an H200: Llama-3-8B's shape 4 rows 2.11 and 2.15, 6 rows 2.13
# and 2.70, 8 rows 2.14 and 2.63; 70B's 4 rows 12.9 and 11.1, 6 rows 12.9 and 14.9, 8 rows 13.0 and 14.4. The
# fused kernel computes 5 to 8 rows as 8, and more as 16: 9 rows of 8B take 3.94 there on an H100.
# From 5 rows on this would be faster, but its float16 products are less exact than the fused kernel's.
MIN_ROWS = 9
_GROUP = DIRECT_TOKENS // MAX_TOKENS  # lanes that one pass takes


class BatchProgram:
    """Steps of rows with one token each. Rows beyond the last one, up to a whole lane, are padding.

    A row's bits depend on the number of lanes beside it: the products of more tokens are cut differently.
    Where the fused kernel cannot read the cache, all lanes come here, also those with several tokens of a
    request.
    """

    def __init__(
        self,
        layers: Layers,
        config: ModelConfig,
        rows: StepRows,
        device: torch.device,
        *,
        takes_all: bool = False,
        has_drafts: bool = False,
    ) -> None:
        """takes_all: there is no other way to compute lanes. has_drafts: there may be any."""
        self._layers, self._config, self._rows = layers, config, rows
        self._takes_all, self._has_drafts = takes_all, has_drafts
        self._num_rows = min(len(rows.lanes) * MAX_TOKENS, DIRECT_TOKENS)
        self._x = torch.zeros(self._num_rows, config.hidden_size, device=device)
        self._logits = torch.zeros(self._num_rows, config.vocab_size, device=device)
        self._no_tiles = torch.zeros(0, 4, dtype=torch.int32, device=device)
        self._is_possible = layers.is_direct or device.type == "cpu"
        self._lanes = rows.lanes
        self._graphs = Graphs(device)

    def takes(self, layout: Layout) -> bool:
        """Whether a step's decodes are faster here than 16 at a time, or possible here alone."""
        if self._takes_all:
            return True
        parts = [p for lane in layout.lanes for p in lane]
        return self.takes_rows(len(parts)) and all(p.num_scheduled_tokens == 1 for p in parts)

    def takes_rows(self, num_rows: int) -> bool:
        """The same for so many rows of one token each."""
        return self._takes_all or (self._is_possible and num_rows >= MIN_ROWS)

    def is_shared(self, layout: Layout) -> bool:
        """Whether several rows may be of one request.

        Steps without drafts are computed the same way where there are others, so that a row has the bits of
        plain decoding as long as there are as many lanes.
        """
        if self._takes_all and self._has_drafts:
            return True
        return any(p.num_scheduled_tokens > 1 for lane in layout.lanes for p in lane)

    def run(
        self, num_lanes: int, mode: Mode, *, has_logprobs: bool, goes_on: bool, is_shared: bool = False
    ) -> None:
        """Compute and sample the rows of the first lanes. `goes_on`: each row from its last sampled token."""
        self._renew()
        for first, count in _passes(num_lanes):
            kind = (count, mode, has_logprobs, is_shared)
            key = (first, count, mode, has_logprobs, goes_on, is_shared)
            self._graphs.run(kind, key, lambda key=key: self._compute(*key))  # type: ignore[misc]

    def run_masked(
        self, num_lanes: int, mode: Mode, *, has_logprobs: bool, goes_on: bool, is_shared: bool = False
    ) -> None:
        """As `run`, by the rows' masks."""
        self._renew()
        for first, count in _passes(num_lanes):
            self._run_forward(first, count, goes_on, is_shared)
            self._run_sampling(first, count, mode, has_logprobs)

    def forward(self, num_lanes: int, *, goes_on: bool, is_shared: bool = False) -> None:
        """Compute logits, for `sample_masked` and no other call. At most one pass's lanes (256 rows)."""
        [(first, count)] = _passes(num_lanes)
        self._renew()
        self._run_forward(first, count, goes_on, is_shared)

    def sample_masked(self, num_lanes: int, mode: Mode, *, has_logprobs: bool) -> None:
        """Sample behind `forward`, by the rows' masks."""
        self._run_sampling(0, num_lanes, mode, has_logprobs)

    def _renew(self) -> None:
        if self._rows.lanes is not self._lanes:
            self._lanes = self._rows.lanes
            self._graphs.clear()

    def _run_forward(self, first: int, count: int, goes_on: bool, is_shared: bool) -> None:
        rows = self._rows.of_lanes(first, count)
        self._graphs.run(
            ("forward", count, is_shared),
            ("forward", first, count, goes_on, is_shared),
            lambda: self._forward(rows, count, goes_on, is_shared),
        )

    def _run_sampling(self, first: int, count: int, mode: Mode, has_logprobs: bool) -> None:
        rows, logits = self._rows.of_lanes(first, count), self._logits[: count * MAX_TOKENS]
        self._graphs.run(
            ("masked", count, mode, has_logprobs),
            ("masked", first, count, mode, has_logprobs),
            lambda: sample_rows(logits, rows, mode, has_logprobs=has_logprobs, has_masks=True),
        )

    def _compute(
        self, first: int, count: int, mode: Mode, has_logprobs: bool, goes_on: bool, is_shared: bool
    ) -> None:
        rows = self._rows.of_lanes(first, count)
        logits = self._forward(rows, count, goes_on, is_shared)
        sample_rows(logits, rows, mode, has_logprobs=has_logprobs)

    def _forward(self, rows: LaneRows, count: int, goes_on: bool, is_shared: bool) -> Tensor:
        """float32 [rows, vocab]; valid until the next call."""
        inputs, num_rows = rows.inputs, count * MAX_TOKENS
        x, logits = self._x[:num_rows], self._logits[:num_rows]
        tokens = Tokens(inputs.positions, inputs.sequences, inputs.block_table, self._no_tiles, 1)
        tables.embed(
            rows.sampled if goes_on else inputs.token_ids,
            self._layers.weights.embedding,
            x,
            self._config.embedding_scale,
            inputs.positions if goes_on else None,
        )

        def attend(qkv: Product, layer: Layer, form: Form) -> Activations:
            w, caches, bound = layer.attention, layer.caches, layer.attended
            is_apart = form == "tiled" and not is_shared
            if is_apart and bound is not None and attention.can_attend(w, caches, num_rows):
                return attention.attend_next(qkv, w, caches, tokens, bound)
            attended: Activations = self._layers.ops.attend_next(
                qkv, w, caches, tokens, form, bound, is_shared=is_shared
            )
            return attended

        pending = self._layers.forward(x, attend, is_prompt=False)
        self._layers.logits(x, self._config.rms_norm_eps, pending, logits)
        return logits


def _passes(num_lanes: int) -> list[tuple[int, int]]:
    """First lane and number of lanes of each."""
    return [(first, min(_GROUP, num_lanes - first)) for first in range(0, num_lanes, _GROUP)]
