"""One step's tensors, built from persistent rows so that a decode step writes only what changed."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import kernels
from engine.request import Request
from engine.sampler import SampledRow
from engine.scheduler import ScheduledRequest, SchedulerOutput


@dataclass(frozen=True, slots=True)
class StepInput:
    """Tensors of one step. `sampled_indices` tells which of the T tokens' logits are sampled from.

    A request with k drafts has k + 1 rows: one after its last token and one after each draft.
    """

    token_ids: Tensor  # int64 [T]
    metadata: kernels.AttentionMetadata
    sampled: tuple[ScheduledRequest, ...]
    rows: tuple[SampledRow, ...]  # R, by request in the order of `sampled`
    sampled_indices: Tensor  # int64 [R]


class InputBatch:
    """Keeps the block table of every request in the batch: int32 [max_num_seqs, max_blocks]."""

    def __init__(self, max_num_seqs: int, max_model_len: int, block_size: int, device: torch.device) -> None:
        self.block_size = block_size
        self.device = device
        self._block_table = np.zeros((max_num_seqs, -(-max_model_len // block_size)), dtype=np.int32)
        self._num_blocks = [0] * max_num_seqs
        self._row_of: dict[str, int] = {}
        self._free_rows = list(range(max_num_seqs))

    def forget(self, request_id: str) -> None:
        """Drop a request that left the batch (finished or preempted); unknown ids are ignored."""
        row = self._row_of.pop(request_id, None)
        if row is not None:
            self._num_blocks[row] = 0
            self._free_rows.append(row)

    def prepare(self, output: SchedulerOutput) -> StepInput:
        """Tensors for the scheduled tokens, in the scheduler's order."""
        num_seqs, size = len(output.scheduled), self.block_size
        token_ids: list[int] = []
        positions = np.empty(output.num_tokens, dtype=np.int32)
        query_start = np.zeros(num_seqs + 1, dtype=np.int32)
        rows = np.empty(num_seqs, dtype=np.intp)
        for i, part in enumerate(output.scheduled):
            begin, end = part.num_computed_tokens, part.num_computed_tokens + part.num_scheduled_tokens
            first = query_start[i]
            last = query_start[i + 1] = first + part.num_scheduled_tokens
            token_ids.extend(part.request.all_token_ids[begin:end])
            token_ids.extend(part.draft_token_ids)
            positions[first:last] = range(begin, end) if last - first < 8 else np.arange(begin, end)
            rows[i] = self._update_row(part.request)

        num_query = np.diff(query_start)
        seq_lens = positions[query_start[1:] - 1] + 1
        block_table = self._block_table[rows, : -(-int(seq_lens.max()) // size)]
        seq_of_token = np.repeat(np.arange(num_seqs), num_query)
        slots = block_table[seq_of_token, positions // size] * size + positions % size
        sampled: list[ScheduledRequest] = []
        sampled_rows: list[SampledRow] = []
        sampled_indices: list[int] = []
        for part, last in zip(output.scheduled, query_start[1:].tolist(), strict=True):
            if part.is_sampled:
                sampled.append(part)
                first = last - 1 - len(part.draft_token_ids)
                sampled_rows += [
                    SampledRow(part.request, part.draft_token_ids[:i]) for i in range(last - first)
                ]
                sampled_indices += range(first, last)
        return StepInput(
            token_ids=torch.tensor(token_ids, dtype=torch.int64).to(self.device),
            metadata=kernels.AttentionMetadata(
                positions=self._to_device(positions),
                slot_mapping=self._to_device(slots.astype(np.int32, copy=False)),
                query_start_loc=self._to_device(query_start),
                seq_lens=self._to_device(seq_lens),
                block_table=self._to_device(np.ascontiguousarray(block_table)),
            ),
            sampled=tuple(sampled),
            rows=tuple(sampled_rows),
            sampled_indices=torch.tensor(sampled_indices, dtype=torch.int64).to(self.device),
        )

    def _update_row(self, request: Request) -> int:
        row = self._row_of.get(request.request_id)
        if row is None:
            row = self._row_of[request.request_id] = self._free_rows.pop()
        known, block_ids = self._num_blocks[row], request.block_ids
        if len(block_ids) > known:
            self._block_table[row, known : len(block_ids)] = block_ids[known:]
            self._num_blocks[row] = len(block_ids)
        return row

    def _to_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device)
