"""The state of a step's rows, on the device for the life of the process: inputs, sampling, results."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.cuda.layout import Layout, num_own_tokens
from engine.cuda.transfer import upload
from engine.request import Request
from engine.sampling_params import MAX_LOGPROBS, SamplingParams
from engine.scheduler import ScheduledRequest
from engine.structured import fill_masks
from kernels.cuda.program import BLOCK_TOKENS, MAX_TOKENS, StepInputs
from kernels.sampling import Mode, RowParams, SamplingBatch, allocate_masks, num_mask_words

_INT64 = ("seed", "position")
_INT32 = ("token_ids", "source", "positions", "sequences", "first_rows", "top_k", "is_masked")
_PARAMS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
_DTYPES = (
    [(n, np.int64) for n in _INT64] + [(n, np.int32) for n in _INT32] + [(n, np.float32) for n in _PARAMS]
)
_TORCH_DTYPES = {np.int64: torch.int64, np.int32: torch.int32, np.float32: torch.float32}


@dataclass(frozen=True, slots=True, eq=False)
class LaneRows:
    """Views of R rows (a lane has 16). sampled: int32 [R]; logprobs: float32 [R]; top_*: [R, 20]."""

    inputs: StepInputs
    batch: SamplingBatch
    sampled: Tensor
    logprobs: Tensor
    top_ids: Tensor
    top_logprobs: Tensor


class StepRows:
    """Rows of all lanes, and the block table of every request in the batch.

    A step either goes on from the one before, when the same requests decode in the same rows: then the
    device has moved every row's state on and nothing is copied. Or its rows are loaded, in one copy; tokens
    that only the device knows are taken from the rows in which they were sampled.
    """

    def __init__(
        self, num_lanes: int, max_num_seqs: int, max_model_len: int, vocab_size: int, device: torch.device
    ) -> None:
        self.device, self.vocab_size = device, vocab_size
        self.capacity = num_lanes * MAX_TOKENS
        self._state = torch.zeros(_num_bytes(self.capacity), dtype=torch.uint8, device=device)
        state = _views(self._state.view, self.capacity, _TORCH_DTYPES)
        self._token_ids, self._source, self._positions = (state[n] for n in _INT32[:3])
        self._positions.fill_(-1)  # all rows are padding
        self._sequences, self._first_rows = state["sequences"], state["first_rows"]
        # Masks are there from the beginning: graphs without them do not read them, and none is captured anew.
        self._batch = SamplingBatch(
            **{n: state[n] for n in ("seed", "position", "top_k", "is_masked", *_PARAMS)},
            masks=allocate_masks(self.capacity, vocab_size, device),
        )
        num_top = min(MAX_LOGPROBS, vocab_size)
        self.sampled = torch.zeros(self.capacity, dtype=torch.int32, device=device)
        self.logprobs = torch.zeros(self.capacity, device=device)
        self.top_ids = torch.zeros(self.capacity, num_top, dtype=torch.int32, device=device)
        self.top_logprobs = torch.zeros(self.capacity, num_top, device=device)
        max_blocks = -(-max_model_len // BLOCK_TOKENS)
        self.block_table = torch.zeros(max_num_seqs, max_blocks, dtype=torch.int32, device=device)
        self._free_slots = list(range(max_num_seqs))
        self._slots: dict[str, int] = {}
        self._num_blocks: dict[str, int] = {}
        self._sampled_rows: dict[str, int] = {}
        self._expected: list[list[tuple[Request, int]]] | None = None
        self.lanes = self._make_lanes()

    def forget(self, request_id: str) -> None:
        """Free the request's row of the block table; unknown ids are ignored."""
        if (slot := self._slots.pop(request_id, None)) is not None:
            self._free_slots.append(slot)
            del self._num_blocks[request_id]
            self._expected = None  # should it come back, then in another slot

    @property
    def token_ids(self) -> Tensor:
        """int32, of every row, as `load` left them."""
        return self._token_ids

    def slot(self, request_id: str) -> int:
        return self._slots[request_id]

    def can_go_on(self, layout: Layout) -> bool:
        """Whether every row goes on from the step before."""
        if self._expected is None or layout.sampled_chunks:
            return False
        if any(p.num_scheduled_tokens != 1 for lane in layout.lanes for p in lane):
            return False
        now = [[(p.request, p.num_computed_tokens) for p in lane] for lane in layout.lanes]
        return now == self._expected

    def note(self, layout: Layout) -> None:
        """Remember where the step samples what: to be called after its rows were loaded or went on."""
        self._sampled_rows = layout.first_sampled_rows()
        parts = [p for lane in layout.lanes for p in lane]
        can_follow = all(p.num_scheduled_tokens == 1 and p.is_sampled for p in parts)
        self._expected = (
            [[(p.request, p.num_computed_tokens + 1) for p in lane] for lane in layout.lanes]
            if can_follow
            else None
        )

    def update_blocks(self, requests: Iterable[Request]) -> None:
        """Bring the block table up to date: one copy where any request has new blocks, else none."""
        width = self.block_table.shape[1]
        entries: list[tuple[int, int]] = []
        for request in requests:
            slot = self._slots.get(request.request_id)
            if slot is None:
                slot = self._slots[request.request_id] = self._free_slots.pop()
                self._num_blocks[request.request_id] = 0
            known, block_ids = self._num_blocks[request.request_id], request.block_ids
            if len(block_ids) > known:
                entries += [(slot * width + i, block_ids[i]) for i in range(known, len(block_ids))]
                self._num_blocks[request.request_id] = len(block_ids)
        if entries:
            index, values = upload(np.array(entries, dtype=np.int64).T.copy(), self.device)
            self.block_table.view(-1).index_copy_(0, index, values.int())

    def load(self, layout: Layout) -> None:
        """Write every row of the step, in one copy (and more for penalties and biases)."""
        self._make_room_for([p for lane in layout.lanes for p in lane] + list(layout.chunks))
        host = np.zeros(_num_bytes(self.capacity), dtype=np.uint8)
        rows = _views(host.view, self.capacity, {t: t for t in _TORCH_DTYPES})
        rows["source"].fill(-1)
        rows["positions"].fill(-1)
        for name in ("top_p", "repetition_penalty"):
            rows[name].fill(1.0)
        special: list[tuple[int, ScheduledRequest, int]] = []
        for i, lane in enumerate(layout.lanes):
            at = i * MAX_TOKENS
            for part in lane:
                self._write_inputs(rows, at, at - i * MAX_TOKENS, part)
                num_own, params = num_own_tokens(part), part.request.params
                for j in range(num_own - 1, part.num_scheduled_tokens) if part.is_sampled else ():
                    _write_params(rows, at + j, part, j)
                    if params.has_penalties or params.logit_bias:
                        special.append((at + j, part, j))
                at += part.num_scheduled_tokens
        for i, part in enumerate(layout.sampled_chunks):
            row, last = layout.first_chunk_row + i, part.num_scheduled_tokens - 1
            _write_params(rows, row, part, last)
            if part.request.params.has_penalties or part.request.params.logit_bias:
                special.append((row, part, last))
        self._state.copy_(upload(host, self.device))
        if (rows["source"] >= 0).any():
            known = self.sampled[self._source.clamp(min=0).long()]
            self._token_ids.copy_(torch.where(self._source >= 0, known, self._token_ids))
        if self._batch.bias_count is not None:
            self._batch.bias_count.zero_()
        for row, part, offset in special:
            self._write_special(row, part, offset)

    def load_masks(self, layout: Layout) -> None:
        """Upload what may be sampled, in one copy. The requests' grammars stand where the step begins."""
        first_rows, words = layout.first_sampled_rows(), num_mask_words(self.vocab_size)
        parts = [p for p in layout.sampled if p.request.grammar is not None]
        rows = [first_rows[p.request.request_id] + j for p in parts for j in range(p.num_sampled)]
        if not rows:
            return
        assert self._batch.masks is not None
        masks = np.empty((len(rows), words), dtype=np.int32)
        fill_masks([(p.request.grammar, p.draft_token_ids) for p in parts if p.request.grammar], masks)
        index = upload(np.array(rows, dtype=np.int64), self.device)
        self._batch.masks.index_copy_(0, index, upload(masks, self.device))

    def _write_inputs(self, rows: dict[str, np.ndarray], at: int, first: int, part: ScheduledRequest) -> None:
        request, num_own = part.request, num_own_tokens(part)
        begin, end = part.num_computed_tokens, at + part.num_scheduled_tokens
        known = request.all_token_ids[begin : begin + num_own]
        if len(known) < num_own:  # the one pending token
            rows["source"][at] = self._sampled_rows[request.request_id]
            known = [0]
        rows["token_ids"][at:end] = [*known, *part.draft_token_ids]
        rows["positions"][at:end] = range(begin, begin + part.num_scheduled_tokens)
        rows["sequences"][at:end] = self._slots[request.request_id]
        rows["first_rows"][at:end] = first

    def _write_special(self, row: int, part: ScheduledRequest, offset: int) -> None:
        """Penalties' tokens and biases of the token sampled after the part's token `offset`."""
        request, params = part.request, part.request.params
        if params.has_penalties:
            end = part.num_computed_tokens + offset + 1
            tokens = [*request.all_token_ids[:end], *part.draft_token_ids][:end]
            if len(tokens) < end and not part.draft_token_ids:
                pending = self.sampled[self._sampled_rows[request.request_id]].view(1).long()
            else:
                pending = self.sampled[:0].long()
            known = upload(np.array(tokens, dtype=np.int64), self.device)
            prompt, output = known[: request.num_prompt_tokens], known[request.num_prompt_tokens :]
            self._batch.set_tokens(row, prompt, torch.cat([output, pending]))
        if params.logit_bias:
            own = {t: b for t, b in params.logit_bias.items() if t < self.vocab_size}
            position = _output_index(part, offset)
            self._batch.set_row(row, replace(row_params(params), logit_bias=own), request.seed, position)

    def _make_room_for(self, parts: Sequence[ScheduledRequest]) -> None:
        """Tensors for penalties and biases, once a request has them. The lanes are new objects then."""
        batch, params = self._batch, [p.request.params for p in parts]
        if batch.output_counts is None and any(p.has_penalties for p in params):
            batch = batch.with_penalties(self.vocab_size)
        if batch.bias_count is None and any(p.logit_bias for p in params):
            batch = batch.with_bias()
        if batch is not self._batch:
            self._batch = batch
            self.lanes = self._make_lanes()

    def of_lanes(self, first: int, count: int) -> LaneRows:
        """The rows of several lanes."""
        rows = slice(first * MAX_TOKENS, (first + count) * MAX_TOKENS)
        batch: dict[str, Any] = {f.name: getattr(self._batch, f.name) for f in fields(SamplingBatch)}
        views: dict[str, Any] = {k: None if t is None else t[rows] for k, t in batch.items()}
        return LaneRows(
            StepInputs(
                token_ids=self._token_ids[rows],
                positions=self._positions[rows],
                sequences=self._sequences[rows],
                first_rows=self._first_rows[rows],
                block_table=self.block_table,
            ),
            SamplingBatch(**views),
            *(t[rows] for t in (self.sampled, self.logprobs, self.top_ids, self.top_logprobs)),
        )

    def _make_lanes(self) -> tuple[LaneRows, ...]:
        return tuple(self.of_lanes(i, 1) for i in range(self.capacity // MAX_TOKENS))


def row_params(params: SamplingParams) -> RowParams:
    """What the sampling kernels read of a request's parameters."""
    return RowParams(
        top_k=params.top_k, **{n: getattr(params, n) for n in _PARAMS}, logit_bias=params.logit_bias
    )


def mode_of(parts: Iterable[ScheduledRequest]) -> Mode:
    """How much of the sampling pipeline these parts need."""
    return max((row_params(p.request.params).mode for p in parts), default=Mode.GREEDY)


def _write_params(rows: dict[str, np.ndarray], row: int, part: ScheduledRequest, offset: int) -> None:
    request, params = part.request, part.request.params
    rows["seed"][row] = (request.seed + (1 << 63)) % (1 << 64) - (1 << 63)
    rows["position"][row] = _output_index(part, offset)
    rows["top_k"][row] = min(params.top_k, (1 << 31) - 1)
    rows["is_masked"][row] = request.grammar is not None
    for name in _PARAMS:
        rows[name][row] = getattr(params, name)


def _output_index(part: ScheduledRequest, offset: int) -> int:
    """Index, in the request's output, of the token sampled after the part's token `offset`."""
    return part.num_computed_tokens + offset + 1 - part.request.num_prompt_tokens


def _num_bytes(capacity: int) -> int:
    return capacity * sum(np.dtype(t).itemsize for _, t in _DTYPES)


def _views(view, capacity, dtypes):  # type: ignore[no-untyped-def]
    """The fields of a buffer of bytes, one after the other: `view(dtype)` is the buffer's own method."""
    fields_of, at = {}, 0
    for name, dtype in _DTYPES:
        size = np.dtype(dtype).itemsize
        first = at // size
        fields_of[name] = view(dtypes[dtype])[first : first + capacity]
        at += capacity * size
    return fields_of
