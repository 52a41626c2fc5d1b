"""Lanes of at most 16 tokens: embedding, the fused kernel and sampling, replayed as CUDA graphs."""

import torch
from torch import Tensor

from engine.cuda.graphs import Graphs
from engine.cuda.layers import Caches
from engine.cuda.rows import StepRows
from engine.cuda.sampling import sample_rows
from engine.cuda.weights import DeviceWeights
from engine.models.config import ModelConfig
from kernels.cuda import tables
from kernels.cuda.program import MAX_TOKENS, PhaseList, StepProgram, add_layers
from kernels.sampling import Mode


class DecodeProgram:
    """The model's program, and a graph of it for each lane, number of tokens and way of sampling."""

    def __init__(
        self,
        weights: DeviceWeights,
        config: ModelConfig,
        caches: Caches | None,
        rows: StepRows,
        device: torch.device,
    ) -> None:
        """caches: bfloat16, or None where layers are computed elsewhere, and only sampling is done here."""
        self._weights, self._config, self._rows = weights, config, rows
        hidden = config.hidden_size
        self._embedded = torch.zeros(MAX_TOKENS, hidden, device=device)
        self.logits = torch.zeros(MAX_TOKENS, config.vocab_size, device=device)
        self._program, self._head = self._build(caches)
        self._lanes = rows.lanes
        self._graphs = Graphs(device)

    @property
    def has_layers(self) -> bool:
        """Whether it can `run`."""
        return self._program is not None

    def run(self, lane: int, num_tokens: int, mode: Mode, *, has_logprobs: bool, goes_on: bool) -> None:
        """Compute and sample the first rows of a lane. `goes_on`: each row from its last sampled token."""
        self._renew()
        key = (lane, num_tokens, mode, has_logprobs, goes_on)
        self._graphs.run((mode, has_logprobs), key, lambda: self._compute(*key))

    def forward(self, lane: int, num_tokens: int, *, goes_on: bool) -> None:
        """Compute the logits of the first rows of a lane, for `sample_masked` and no other call."""
        self._renew()
        key = (lane, num_tokens, goes_on)
        self._graphs.run("forward", key, lambda: self._forward(*key))

    def sample_masked(self, lane: int, num_tokens: int, mode: Mode, *, has_logprobs: bool) -> None:
        """Sample behind `forward`, by the rows' masks."""
        rows, logits = self._lanes[lane], self.logits[:num_tokens]
        self._graphs.run(
            ("masked", mode, has_logprobs),
            ("masked", lane, num_tokens, mode, has_logprobs),
            lambda: sample_rows(logits, rows, mode, has_logprobs=has_logprobs, has_masks=True),
        )

    def sample_hidden(
        self, lane: int, hidden: Tensor, mode: Mode, *, has_logprobs: bool, has_masks: bool
    ) -> None:
        """Sample the first rows of a lane from residual rows, float32 [rows <= 16, hidden]."""
        self._renew()
        rows, logits = self._lanes[lane], self.logits_of(hidden)
        sample_rows(logits, rows, mode, has_logprobs=has_logprobs, has_masks=has_masks)

    def logits_of(self, hidden: Tensor) -> Tensor:
        """float32 [rows, vocab] of residual rows, float32 [rows <= 16, hidden]; valid until the next call."""
        self._embedded[: len(hidden)] = hidden
        self._head.launch(len(hidden))
        return self.logits[: len(hidden)]

    def _build(self, caches: Caches | None) -> tuple[StepProgram | None, StepProgram]:
        """The whole model where it has caches, and final norm and head alone."""
        weights, eps, inputs = self._weights, self._config.rms_norm_eps, self._rows.lanes[0].inputs
        model, head = PhaseList(), PhaseList()
        embedded = self._embedded
        head.add_matmul(weights.head, embedded, self.logits, norm=weights.final_norm, eps=eps)
        if caches is None:
            return None, StepProgram(head, inputs)
        add_layers(
            model, weights.layers, caches, embedded, weights.final_norm, eps, weights.head, self.logits
        )
        config = self._config
        heads = (config.num_heads, config.num_kv_heads, config.head_dim)
        return StepProgram(model, inputs, heads), StepProgram(head, inputs)

    def _renew(self) -> None:
        if self._rows.lanes is not self._lanes:
            self._lanes = self._rows.lanes
            self._graphs.clear()

    def _compute(self, lane: int, num_tokens: int, mode: Mode, has_logprobs: bool, goes_on: bool) -> None:
        self._forward(lane, num_tokens, goes_on)
        sample_rows(self.logits[:num_tokens], self._lanes[lane], mode, has_logprobs=has_logprobs)

    def _forward(self, lane: int, num_tokens: int, goes_on: bool) -> None:
        rows = self._lanes[lane]
        token_ids = rows.sampled if goes_on else rows.inputs.token_ids
        tables.embed(
            token_ids[:num_tokens],
            self._weights.embedding,
            self._embedded[:num_tokens],
            self._config.embedding_scale,
            rows.inputs.positions if goes_on else None,
        )
        assert self._program is not None, "it has no layers"
        self._program.inputs = rows.inputs
        self._program.launch(num_tokens)
