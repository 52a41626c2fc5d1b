"""Runs scheduled steps on a Hopper GPU; one step may be launched while another one runs."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from engine.checkpoint import Checkpoint
from engine.config import EngineConfig
from engine.cuda.batch import MIN_ROWS, BatchProgram
from engine.cuda.decode import DecodeProgram
from engine.cuda.layers import DIRECT_TOKENS, Layers, workspace_bytes
from engine.cuda.layout import (
    MAX_DRAFTS,
    Layout,
    lay_out,
    max_lanes,
    needs_hidden,
    needs_prompt_logprobs,
    num_tokens_of,
)
from engine.cuda.prefill import Chunk, Prefill, chunk_sizes, padded_tokens
from engine.cuda.results import ChunkResults, Ticket, collect, logprobs_of, read_out
from engine.cuda.rows import StepRows, mode_of
from engine.cuda.weights import DeviceWeights, UnsupportedError, load_weights
from engine.errors import ParameterError
from engine.model_runner import DEFAULT_TOKEN_BUDGET, StepResult, resolve_device, size_kv_cache
from engine.models.rope import rope_limit
from engine.outputs import ModelInfo
from engine.pooling import pool_chunk
from engine.request import Request
from engine.sampling_params import SamplingParams
from engine.scheduler import ScheduledRequest, SchedulerOutput
from engine.speculation import DraftPolicy
from kernels import kv_cache
from kernels.cuda import build
from kernels.cuda.program import BLOCK_TOKENS, MAX_TOKENS
from kernels.kv_cache import KVFormat
from kernels.sampling import Mode

_HOPPER = (9, 0)
# Of the cache in the fused kernel. It has a form for "fp8" (src/step_fp8.cu) that has not run on a GPU yet.
_FUSED_FORMATS: tuple[KVFormat, ...] = ("bf16",)

# Decodes that are computed with the chunks of a step of few tokens, in one pass over the weights, where there
# are enough of them to be a large batch. Their attention is then a prompt's, a program for every head, and
# reads the keys once a head: with more keys a pass of their own costs less.
_JOINT_DECODES = 64
_JOINT_KEYS = 48 * 1024


class CudaModelRunner:
    """Owns the GPU's memory: weights in fragment order, paged KV cache, the rows of a step.

    Decodes (and short chunks) run as CUDA graphs of the fused kernel, 16 tokens at a time, or of
    `BatchProgram`, where there are many; other chunks run through `Prefill`. All work is queued on one
    stream, in the order of the launches.
    """

    runs_ahead = True

    def __init__(self, config: EngineConfig, checkpoint: Checkpoint) -> None:
        """Raises UnsupportedError where the kernels cannot run the checkpoint on this machine."""
        self.device = resolve_device(config)
        _check_machine(config, self.device)
        shape = checkpoint.config
        max_drafts = DraftPolicy.for_device("cuda", config.speculative_tokens).max_tokens
        if max_drafts > MAX_DRAFTS:
            raise ParameterError("speculative_tokens", f"must be at most {MAX_DRAFTS} on a GPU")
        self.token_budget = config.token_budget or max(DEFAULT_TOKEN_BUDGET["cuda"], config.max_num_seqs)
        limit = rope_limit(shape)
        self.max_model_len = min(config.max_model_len or limit, limit)
        self._max_num_seqs = config.max_num_seqs
        self._eps = shape.rms_norm_eps
        weights = self.weights = load_weights(checkpoint, self.max_model_len, self.device)
        chunk = min(self.token_budget, self.max_model_len)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # what repacking took
        precision = config.prefill_precision
        reserved = workspace_bytes(shape, weights, padded_tokens(chunk), config.max_num_seqs, precision)
        kv_format: KVFormat = "fp8" if config.kv_cache_dtype == "fp8" else "bf16"
        of_layer = kv_cache.bytes_per_token(shape.num_kv_heads, shape.head_dim, kv_format)
        bytes_per_token = shape.num_layers * of_layer
        self.num_blocks = size_kv_cache(config, self.max_model_len, bytes_per_token, self.device, reserved)
        of_cache = self.num_blocks, shape.num_kv_heads, shape.head_dim, kv_format, self.device
        caches = tuple(
            (kv_cache.allocate(*of_cache), kv_cache.allocate(*of_cache)) for _ in range(shape.num_layers)
        )
        self.max_model_len = min(self.max_model_len, self.num_blocks * config.block_size)
        self.chunk_sizes: Sequence[int] = chunk_sizes(min(self.token_budget, self.max_model_len - 1))
        self.rows = StepRows(
            max_lanes(config.max_num_seqs, max_drafts),
            config.max_num_seqs,
            self.max_model_len,
            shape.vocab_size,
            self.device,
        )
        # Decodes over another cache are large batches, however few rows they have.
        is_fused = kv_format in _FUSED_FORMATS
        self.decode = DecodeProgram(weights, shape, caches if is_fused else None, self.rows, self.device)
        layers = Layers(weights, caches, self.device, precision)
        self.batch = BatchProgram(
            layers, shape, self.rows, self.device, takes_all=not is_fused, has_drafts=max_drafts > 0
        )
        num_joint = min(_JOINT_DECODES, config.max_num_seqs) if self.batch.takes_rows(MIN_ROWS) else 0
        self.prefill = Prefill(
            layers, shape, self.rows.block_table, self.device, num_joint, self.token_budget
        )
        self.info = _describe(config, checkpoint, weights, self.max_model_len)
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        if self._stream is not None:
            torch.cuda.synchronize()  # what was made on the default stream is there

    @torch.inference_mode()
    def launch(self, output: SchedulerOutput) -> Ticket | Layout:
        """Queue a step; nothing is waited for.

        Where a mask depends on a token in flight, nothing is sampled: the layout is to go to `sample_late`.
        """
        with torch.cuda.stream(self._stream):
            for request_id in output.preempted_ids:
                self.forget(request_id)
            joins = self._joins(output.scheduled)
            layout = lay_out(output.scheduled, keeps_chunks=joins)
            self.rows.update_blocks(p.request for p in output.scheduled)
            goes_on = not joins and self.rows.can_go_on(layout)
            if not goes_on:
                self.rows.load(layout)
            self.rows.note(layout)
            if any(p.request.grammar and p.request.num_pending_tokens for p in layout.sampled):
                self._forward_lanes(layout, goes_on)
                return layout
            self.rows.load_masks(layout)
            if joins:
                self._run_jointly(layout)
                return read_out(layout, self.rows, ChunkResults())
            self._run_lanes(layout, goes_on)
            return read_out(layout, self.rows, self._run_chunks(layout))

    def can_sample_late(self, num_decodes: int) -> bool:
        """Whether so many decodes are one pass, whose logits stay where they are until they are sampled."""
        return num_decodes <= (DIRECT_TOKENS if self.batch.takes_rows(num_decodes) else MAX_TOKENS)

    @torch.inference_mode()
    def sample_late(self, ticket: Ticket | Layout) -> Ticket:
        """Queue masks and sampling of a step that was launched without them."""
        if isinstance(ticket, Ticket):
            return ticket
        with torch.cuda.stream(self._stream):
            self.rows.load_masks(ticket)
            self._sample_lanes(ticket)
            return read_out(ticket, self.rows, ChunkResults())

    def collect(self, ticket: Ticket | Layout) -> StepResult:
        """Wait for a step's results. Raises EngineDeadError if the GPU does not deliver them."""
        assert isinstance(ticket, Ticket), "it was not sampled"
        return collect(ticket)

    def is_joint(self, num_decodes: int, num_prompt_tokens: int) -> bool:
        """Whether a step of so many decodes and tokens of chunks is one pass over the weights."""
        return (
            num_prompt_tokens > 0
            and MIN_ROWS <= num_decodes <= _JOINT_DECODES
            and num_decodes + num_prompt_tokens <= DIRECT_TOKENS
            and self.batch.takes_rows(num_decodes)
        )

    def execute(self, output: SchedulerOutput) -> StepResult:
        """Launch a step and wait for it."""
        return self.collect(self.launch(output))

    def forget(self, request_id: str) -> None:
        """Drop what is kept for a request that left the batch; unknown ids are ignored."""
        self.rows.forget(request_id)

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Compile and capture what greedy decoding needs, run the largest prefill and a sampled decode.

        Writes into the KV cache's first blocks, which hold nothing yet.
        """
        num_tokens = max(1, min(self.token_budget, self.max_model_len - 1))
        params = SamplingParams(top_p=0.9)
        request = Request("warm-up", [0] * num_tokens, params, max_model_len=self.max_model_len + 1)
        request.block_ids = list(range(min(-(-(num_tokens + 1) // BLOCK_TOKENS), self.num_blocks)))
        self.execute(SchedulerOutput((ScheduledRequest(request, 0, num_tokens),)))
        self.execute(SchedulerOutput((ScheduledRequest(request, num_tokens - 1, 1),)))
        self.forget(request.request_id)
        with torch.cuda.stream(self._stream):
            self.prefill.warm_up()
            self.rows.load(Layout((), ()))  # rows of padding, which write nothing
            self.rows.note(Layout((), ()))
            num_lanes = -(-self._max_num_seqs // MAX_TOKENS)
            for n in range(MAX_TOKENS, 0, -1) if self.decode.has_layers else ():
                for goes_on in (False, False, True):  # the first run of its kind is not captured
                    self.decode.run(0, n, Mode.GREEDY, has_logprobs=False, goes_on=goes_on)
                    self.decode.forward(0, n, goes_on=goes_on)
                    self.decode.sample_masked(0, n, Mode.GREEDY, has_logprobs=False)
                for lane in range(1, num_lanes + 1):  # a prompt's last few tokens, behind that many decodes
                    self.decode.run(lane, n, Mode.GREEDY, has_logprobs=False, goes_on=False)
            for n in range(num_lanes, 0, -1):
                if self.batch.takes_rows(n * MAX_TOKENS):
                    for goes_on in (False, False, True):
                        self.batch.run(n, Mode.GREEDY, has_logprobs=False, goes_on=goes_on)
                        self.batch.run_masked(n, Mode.GREEDY, has_logprobs=False, goes_on=goes_on)
        if self._stream is not None:
            self._stream.synchronize()

    def _run_lanes(self, layout: Layout, goes_on: bool) -> None:
        if self.batch.takes(layout):
            parts = [p for lane in layout.lanes for p in lane if p.is_sampled]
            has_logprobs = _want_logprobs(parts)
            run = self.batch.run_masked if _have_masks(parts) else self.batch.run
            run(
                len(layout.lanes),
                mode_of(parts),
                has_logprobs=has_logprobs,
                goes_on=goes_on,
                is_shared=self.batch.is_shared(layout),
            )
            return
        for i, lane in enumerate(layout.lanes):
            sampled, num_tokens = [p for p in lane if p.is_sampled], num_tokens_of(lane)
            mode, has_logprobs = mode_of(sampled), _want_logprobs(sampled)
            if _have_masks(sampled):
                self.decode.forward(i, num_tokens, goes_on=goes_on)
                self.decode.sample_masked(i, num_tokens, mode, has_logprobs=has_logprobs)
            else:
                self.decode.run(i, num_tokens, mode, has_logprobs=has_logprobs, goes_on=goes_on)

    def _forward_lanes(self, layout: Layout, goes_on: bool) -> None:
        """The logits of decodes that are one pass and no chunks; see `can_sample_late`."""
        assert not layout.chunks
        if self.batch.takes(layout):
            is_shared = self.batch.is_shared(layout)
            self.batch.forward(len(layout.lanes), goes_on=goes_on, is_shared=is_shared)
        else:
            [lane] = layout.lanes
            self.decode.forward(0, num_tokens_of(lane), goes_on=goes_on)

    def _sample_lanes(self, layout: Layout) -> None:
        """Sample behind `_forward_lanes`, by the masks."""
        mode, has_logprobs = mode_of(layout.sampled), _want_logprobs(layout.sampled)
        if self.batch.takes(layout):
            self.batch.sample_masked(len(layout.lanes), mode, has_logprobs=has_logprobs)
        else:
            [lane] = layout.lanes
            self.decode.sample_masked(0, num_tokens_of(lane), mode, has_logprobs=has_logprobs)

    def _run_chunks(self, layout: Layout) -> ChunkResults:
        """Compute the chunks and sample those that end their prompts."""
        if not layout.chunks:
            return ChunkResults()
        hidden = self.prefill.forward([self._chunk(p) for p in layout.chunks])
        return self._sample_chunks(layout, hidden)

    def _joins(self, scheduled: Sequence[ScheduledRequest]) -> bool:
        """Whether decodes and chunks are computed together: all of them plain, and few."""
        decodes = [p for p in scheduled if p.num_scheduled_tokens == 1]
        num_tokens = num_tokens_of(scheduled) - len(decodes)
        return (
            self.is_joint(len(decodes), num_tokens)
            and sum(p.num_computed_tokens for p in decodes) <= _JOINT_KEYS
            and not any(p.draft_token_ids or needs_hidden(p) for p in scheduled)
        )

    def _run_jointly(self, layout: Layout) -> None:
        """Decodes as chunks of one token before the others; their ids are where the rows were loaded."""
        decodes = [p for lane in layout.lanes for p in lane]
        chunks = [Chunk(self.rows.slot(p.request.request_id), p.num_computed_tokens, (0,)) for p in decodes]
        chunks += [self._chunk(p) for p in layout.chunks]
        hidden = self.prefill.forward(chunks, self.rows.token_ids[: len(decodes)])
        for i, lane in enumerate(layout.lanes):
            own = hidden[i * MAX_TOKENS :][: len(lane)]  # lanes of single tokens are full but for the last
            self.decode.sample_hidden(
                i, own, mode_of(lane), has_logprobs=_want_logprobs(lane), has_masks=_have_masks(lane)
            )
        self._sample_chunks(layout, hidden[len(decodes) :])

    def _sample_chunks(self, layout: Layout, hidden: Tensor) -> ChunkResults:
        """Sample where prompts end, from the chunks' residual stream."""
        results = ChunkResults()
        last, first = [], 0
        for part in layout.chunks:
            own, request_id = hidden[first : first + part.num_scheduled_tokens], part.request.request_id
            if needs_prompt_logprobs(part):
                results.prompt_logprobs[request_id] = self._prompt_logprobs(part, own)
            if (pooling := part.request.pooling) is not None:
                results.pooled[request_id] = pool_chunk(own, self.weights.final_norm, self._eps, pooling)
            first += part.num_scheduled_tokens
            if part.is_sampled:
                last.append(first - 1)
        sampled, first_lane = layout.sampled_chunks, len(layout.lanes)
        for i in range(0, len(sampled), MAX_TOKENS):
            group = sampled[i : i + MAX_TOKENS]
            self.decode.sample_hidden(
                first_lane + i // MAX_TOKENS,
                torch.stack([hidden[row] for row in last[i : i + MAX_TOKENS]]),
                mode_of(group),
                has_logprobs=_want_logprobs(group),
                has_masks=_have_masks(group),
            )
        return results

    def _chunk(self, part: ScheduledRequest) -> Chunk:
        begin = part.num_computed_tokens
        tokens = part.request.all_token_ids[begin : begin + part.num_scheduled_tokens]
        return Chunk(self.rows.slot(part.request.request_id), begin, tokens)

    def _prompt_logprobs(self, part: ScheduledRequest, hidden: Tensor) -> Tensor:
        request, begin = part.request, part.num_computed_tokens + 1
        end = min(begin + part.num_scheduled_tokens, request.num_prompt_tokens)
        token_ids, num_top = request.all_token_ids[begin:end], request.params.prompt_logprobs or 0
        pieces = [
            logprobs_of(
                self.decode.logits_of(hidden[i : i + MAX_TOKENS][: end - begin - i]),
                token_ids[i : i + MAX_TOKENS],
                num_top,
            )
            for i in range(0, end - begin, MAX_TOKENS)
        ]
        return torch.cat(pieces)


def _want_logprobs(parts: Sequence[ScheduledRequest]) -> bool:
    return any(p.request.params.logprobs is not None for p in parts)


def _have_masks(parts: Sequence[ScheduledRequest]) -> bool:
    return any(p.request.grammar is not None for p in parts)


def _check_machine(config: EngineConfig, device: torch.device) -> None:
    if config.dtype != "auto":
        raise UnsupportedError(f"dtype {config.dtype} asks for dense weights")
    if torch.cuda.get_device_capability(device) != _HOPPER:
        raise UnsupportedError(f"{torch.cuda.get_device_name(device)} is no Hopper GPU")
    try:
        build.library()
    except OSError as error:
        raise UnsupportedError(str(error)) from None


def _describe(
    config: EngineConfig, checkpoint: Checkpoint, weights: DeviceWeights, max_model_len: int
) -> ModelInfo:
    matrices, vectors = weights.matrices, weights.vectors
    return ModelInfo(
        name=config.served_model_name or Path(config.model).name.removesuffix(".gguf"),
        architecture=checkpoint.config.architecture,
        num_parameters=sum(m.n * m.k for m in matrices) + sum(v.numel() for v in vectors),
        max_model_len=max_model_len,
        vocab_size=checkpoint.config.vocab_size,
        weight_bytes=sum(m.nbytes for m in matrices) + sum(v.nbytes for v in vectors),
        weight_format=checkpoint.weight_format,
        hidden_size=checkpoint.config.hidden_size,
    )
