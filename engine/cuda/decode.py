"""Lanes of at most 16 tokens: embedding, the fused kernel and sampling, replayed as CUDA graphs."""

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.cuda.rows import LaneRows, StepRows
from engine.cuda.weights import DeviceWeights
from engine.models.config import ModelConfig
from kernels.cuda import tables
from kernels.cuda.program import MAX_TOKENS, PhaseList, StepProgram, add_layers
from kernels.sampling import Mode, sample

Caches = Sequence[tuple[Tensor, Tensor]]


class DecodeProgram:
    """The model's program, and a graph of it for each lane, number of tokens and way of sampling.

    A graph is captured when it is wanted for the second time: the first run, uncaptured, compiles and loads
    what it needs. Graphs hold the addresses of the rows' tensors; they are dropped when those are new ones.
    """

    def __init__(
        self,
        weights: DeviceWeights,
        config: ModelConfig,
        caches: Caches,
        rows: StepRows,
        device: torch.device,
    ) -> None:
        self._weights, self._config, self._rows, self._device = weights, config, rows, device
        hidden = config.hidden_size
        self._embedded = torch.zeros(MAX_TOKENS, hidden, device=device)
        self.logits = torch.zeros(MAX_TOKENS, config.vocab_size, device=device)
        self._program, self._head = self._build(caches)
        self._lanes = rows.lanes
        self._graphs: dict[tuple[int, int, Mode, bool, bool], torch.cuda.CUDAGraph] = {}
        self._seen: set[tuple[Mode, bool]] = set()
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def run(self, lane: int, num_tokens: int, mode: Mode, *, has_logprobs: bool, goes_on: bool) -> None:
        """Compute and sample the first rows of a lane. `goes_on`: each row from its last sampled token."""
        self._renew()
        kind, key = (mode, has_logprobs), (lane, num_tokens, mode, has_logprobs, goes_on)
        if kind not in self._seen or self._device.type == "cpu":
            self._seen.add(kind)
            self._compute(*key)
            return
        graph = self._graphs.get(key)
        if graph is None:
            graph = self._graphs[key] = torch.cuda.CUDAGraph()
            stream = torch.cuda.current_stream()
            with torch.cuda.graph(graph, self._pool, stream, capture_error_mode="thread_local"):
                self._compute(*key)
        graph.replay()

    def sample_hidden(self, lane: int, hidden: Tensor, mode: Mode, *, has_logprobs: bool) -> None:
        """Sample the first rows of a lane from residual rows, float32 [rows <= 16, hidden]."""
        self._renew()
        self.logits_of(hidden)
        self._sample(self._lanes[lane], len(hidden), mode, has_logprobs)

    def logits_of(self, hidden: Tensor) -> Tensor:
        """float32 [rows, vocab] of residual rows, float32 [rows <= 16, hidden]; valid until the next call."""
        self._embedded[: len(hidden)] = hidden
        self._head.launch(len(hidden))
        return self.logits[: len(hidden)]

    def _build(self, caches: Caches) -> tuple[StepProgram, StepProgram]:
        """The whole model, and final norm and head alone."""
        weights, eps, inputs = self._weights, self._config.rms_norm_eps, self._rows.lanes[0].inputs
        model, head = PhaseList(), PhaseList()
        embedded = self._embedded
        add_layers(
            model, weights.layers, caches, embedded, weights.final_norm, eps, weights.head, self.logits
        )
        head.add_matmul(weights.head, self._embedded, self.logits, norm=weights.final_norm, eps=eps)
        config = self._config
        heads = (config.num_heads, config.num_kv_heads, config.head_dim)
        return StepProgram(model, inputs, heads), StepProgram(head, inputs)

    def _renew(self) -> None:
        if self._rows.lanes is not self._lanes:
            self._lanes = self._rows.lanes
            self._graphs.clear()
            self._seen.clear()

    def _compute(self, lane: int, num_tokens: int, mode: Mode, has_logprobs: bool, goes_on: bool) -> None:
        rows = self._lanes[lane]
        token_ids = rows.sampled if goes_on else rows.inputs.token_ids
        tables.embed(
            token_ids[:num_tokens],
            self._weights.embedding,
            self._embedded[:num_tokens],
            self._config.embedding_scale,
            rows.inputs.positions if goes_on else None,
        )
        self._program.inputs = rows.inputs
        self._program.launch(num_tokens)
        self._sample(rows, num_tokens, mode, has_logprobs)

    def _sample(self, rows: LaneRows, num_rows: int, mode: Mode, has_logprobs: bool) -> None:
        num_top = rows.top_ids.shape[1] if has_logprobs else None
        got = sample(self.logits[:num_rows], rows.batch, num_logprobs=num_top, mode=mode, advance=True)
        rows.sampled[:num_rows].copy_(got.token_ids)
        if got.logprobs is not None and got.top_ids is not None and got.top_logprobs is not None:
            rows.logprobs[:num_rows].copy_(got.logprobs)
            rows.top_ids[:num_rows].copy_(got.top_ids)
            rows.top_logprobs[:num_rows].copy_(got.top_logprobs)
