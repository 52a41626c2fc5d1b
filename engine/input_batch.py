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
        size = self.block_size
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        query_start = [0]
        seq_lens: list[int] = []
        sampled: list[ScheduledRequest] = []
        sampled_rows: list[SampledRow] = []
        sampled_indices: list[int] = []
        # Plain lists, two tensors: between two forward passes every array operation starts with cold caches
        # and takes longer than this loop does for a decode step.
        for part in output.scheduled:
            request, drafts = part.request, part.draft_token_ids
            begin, end = part.num_computed_tokens, part.num_computed_tokens + part.num_scheduled_tokens
            token_ids += request.all_token_ids[begin:end]
            token_ids += drafts
            positions += range(begin, end)
            block_ids = request.block_ids
            slots += [block_ids[i // size] * size + i % size for i in range(begin, end)]
            last = len(positions)
            query_start.append(last)
            seq_lens.append(end)
            if part.is_sampled:
                sampled.append(part)
                sampled_rows += [SampledRow(request, drafts[:i]) for i in range(1 + len(drafts))]
                sampled_indices += range(last - 1 - len(drafts), last)
        rows = [self._update_row(part.request) for part in output.scheduled]
        block_table = self._block_table[rows, : -(-max(seq_lens) // size)]

        fields = torch.tensor(positions + slots + query_start + seq_lens, dtype=torch.int32).to(self.device)
        num_tokens, num_seqs = len(positions), len(rows)
        at = (num_tokens, 2 * num_tokens, 2 * num_tokens + num_seqs + 1)
        indices = torch.tensor(token_ids + sampled_indices, dtype=torch.int64).to(self.device)
        return StepInput(
            token_ids=indices[:num_tokens],
            metadata=kernels.AttentionMetadata(
                positions=fields[: at[0]],
                slot_mapping=fields[at[0] : at[1]],
                query_start_loc=fields[at[1] : at[2]],
                seq_lens=fields[at[2] :],
                block_table=torch.from_numpy(block_table).to(self.device),
            ),
            sampled=tuple(sampled),
            rows=tuple(sampled_rows),
            sampled_indices=indices[num_tokens:],
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
