"""A step's results on their way to the host."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from engine.cuda.layout import Layout
from engine.cuda.rows import StepRows
from engine.cuda.transfer import Completion, download, upload
from engine.messages import RawLogprobs
from engine.model_runner import StepResult, accept
from engine.sampler import SampledToken
from engine.scheduler import ScheduledRequest


@dataclass(frozen=True, slots=True, eq=False)
class _Logprobs:
    """By row: logprobs float32 [R] of the sampled tokens; top_ids int32, top_logprobs float32 [R, 20]."""

    own: Tensor
    top_ids: Tensor
    top_logprobs: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class ChunkResults:
    """What a step's chunks yield beside tokens, by request id.

    prompt_logprobs: float64 [positions, 1 + n, 2], (token id, logprob). pooled: float32 [hidden].
    """

    prompt_logprobs: dict[str, Tensor] = field(default_factory=dict)
    pooled: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Ticket:
    """Host copies that are filled once `completion` is reached.

    sampled: each sampled part and the row of its first new token. tokens: int32 [R].
    """

    sampled: tuple[tuple[ScheduledRequest, int], ...]
    tokens: Tensor
    logprobs: _Logprobs | None
    chunks: ChunkResults
    completion: Completion


def read_out(layout: Layout, rows: StepRows, chunks: ChunkResults) -> Ticket:
    """Queue the copies of what the step has sampled, and its chunks yielded."""
    parts = layout.sampled
    first_rows = layout.first_sampled_rows()
    sampled = tuple((p, first_rows[p.request.request_id]) for p in parts)
    num_rows = max((row + 1 + len(p.draft_token_ids) for p, row in sampled), default=0)
    logprobs = None
    if any(p.request.params.logprobs is not None for p in parts):
        tensors = (rows.logprobs, rows.top_ids, rows.top_logprobs)
        logprobs = _Logprobs(*(download(t[:num_rows]) for t in tensors))
    return Ticket(
        sampled,
        download(rows.sampled[:num_rows]),
        logprobs,
        ChunkResults(_downloaded(chunks.prompt_logprobs), _downloaded(chunks.pooled)),
        Completion(rows.device),
    )


def collect(ticket: Ticket) -> StepResult:
    """Wait, and turn rows into tokens. Raises EngineDeadError if the device hangs."""
    ticket.completion.wait()
    ids = ticket.tokens.tolist()
    tokens = [
        SampledToken(ids[row], _row_logprobs(ticket.logprobs, row, ids[row], part))
        for part, first in ticket.sampled
        for row in range(first, first + 1 + len(part.draft_token_ids))
    ]
    prompt_logprobs = {k: _entries(t) for k, t in ticket.chunks.prompt_logprobs.items()}
    return StepResult(accept([p for p, _ in ticket.sampled], tokens), prompt_logprobs, ticket.chunks.pooled)


def logprobs_of(logits: Tensor, token_ids: Sequence[int], num_top: int) -> Tensor:
    """(id, logprob) of the given token and the best ones, float64 [R, 1 + num_top, 2], for logits [R, V]."""
    logprobs = logits.log_softmax(dim=-1)
    index = upload(np.array(token_ids, dtype=np.int64), logits.device).unsqueeze(1)
    values, ids = logprobs.topk(num_top, dim=-1)
    ids, values = torch.cat([index, ids], dim=1), torch.cat([logprobs.gather(1, index), values], dim=1)
    return torch.stack([ids.double(), values.double()], dim=-1)


def _downloaded(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {request_id: download(tensor) for request_id, tensor in tensors.items()}


def _entries(pairs: Tensor) -> list[RawLogprobs]:
    return [tuple((int(i), p) for i, p in row) for row in pairs.tolist()]


def _row_logprobs(
    logprobs: _Logprobs | None, row: int, token_id: int, part: ScheduledRequest
) -> RawLogprobs | None:
    num_top = part.request.params.logprobs
    if logprobs is None or num_top is None:
        return None
    ids, values = logprobs.top_ids[row, :num_top].tolist(), logprobs.top_logprobs[row, :num_top].tolist()
    return ((token_id, float(logprobs.own[row])), *zip(ids, values, strict=True))
