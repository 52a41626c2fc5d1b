"""Which kernel computes which part of a step, and in which rows."""

from collections.abc import Sequence
from dataclasses import dataclass

from engine.scheduler import ScheduledRequest
from kernels.cuda.program import MAX_TOKENS

MAX_DRAFTS = MAX_TOKENS - 1
"""A token and its drafts are verified in one launch."""


@dataclass(frozen=True, slots=True)
class Layout:
    """A step's parts: lanes of at most 16 tokens, each one launch of the fused kernel, and prompt chunks.

    Lane i has rows 16 i to 16 i + 15 of the step's state; the tokens of one request stay together. The
    sampled tokens of the chunks have rows behind those of the lanes, in the chunks' order.
    """

    lanes: tuple[tuple[ScheduledRequest, ...], ...]
    chunks: tuple[ScheduledRequest, ...]

    @property
    def sampled_chunks(self) -> tuple[ScheduledRequest, ...]:
        return tuple(c for c in self.chunks if c.is_sampled)

    @property
    def sampled(self) -> tuple[ScheduledRequest, ...]:
        """Every part that yields tokens, the lanes' before the chunks'."""
        return tuple(p for lane in self.lanes for p in lane if p.is_sampled) + self.sampled_chunks

    @property
    def first_chunk_row(self) -> int:
        return len(self.lanes) * MAX_TOKENS

    def first_sampled_rows(self) -> dict[str, int]:
        """Row of each sampled request's (first) new token, by request id."""
        rows: dict[str, int] = {}
        for i, lane in enumerate(self.lanes):
            at = i * MAX_TOKENS
            for part in lane:
                if part.is_sampled:
                    rows[part.request.request_id] = at + num_own_tokens(part) - 1
                at += part.num_scheduled_tokens
        for i, part in enumerate(self.sampled_chunks):
            rows[part.request.request_id] = self.first_chunk_row + i
        return rows


def num_own_tokens(part: ScheduledRequest) -> int:
    """Tokens that are no drafts."""
    return part.num_scheduled_tokens - len(part.draft_token_ids)


def num_tokens_of(lane: Sequence[ScheduledRequest]) -> int:
    return sum(p.num_scheduled_tokens for p in lane)


def needs_prompt_logprobs(part: ScheduledRequest) -> bool:
    request = part.request
    has_any = part.num_computed_tokens < request.num_prompt_tokens - 1
    return request.params.prompt_logprobs is not None and has_any


def needs_hidden(part: ScheduledRequest) -> bool:
    """Whether more is read of the part's residual stream than what its tokens are sampled from."""
    return part.request.pooling is not None or needs_prompt_logprobs(part)


def lay_out(scheduled: Sequence[ScheduledRequest], *, keeps_chunks: bool = False) -> Layout:
    """Single tokens and drafts go into lanes; so do chunks as long as one launch more computes them all.

    A chunk of few tokens is cheaper there than to dequantize every matrix for it; with `keeps_chunks` it
    stays a chunk.
    """
    single = [p for p in scheduled if num_own_tokens(p) == 1 and not needs_hidden(p)]
    chunks = [p for p in scheduled if num_own_tokens(p) > 1 or needs_hidden(p)]
    is_little = num_tokens_of(chunks) <= MAX_TOKENS and not any(map(needs_hidden, chunks))
    if is_little and not keeps_chunks:
        single, chunks = single + chunks, []
    lanes: list[list[ScheduledRequest]] = []
    num_free = 0
    for part in single:
        if part.num_scheduled_tokens > num_free:
            lanes.append([])
            num_free = MAX_TOKENS
        lanes[-1].append(part)
        num_free -= part.num_scheduled_tokens
    return Layout(tuple(map(tuple, lanes)), tuple(chunks))


def max_lanes(max_num_seqs: int, max_drafts: int) -> int:
    """Lanes that any step may need, those of the chunks' sampled tokens included."""
    # A lane is left for the next one when a request's tokens do not fit: by then it holds that many requests.
    decodes = -(-max_num_seqs // (MAX_TOKENS // (1 + max_drafts)))
    return decodes + 2 + -(-max_num_seqs // MAX_TOKENS)
