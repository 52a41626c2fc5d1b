"""Launches the sampling kernels: three for temperature alone, seven with filters, two for a greedy batch.

Penalties, biases and masks are one more each.
"""

import torch
import triton
from torch import Tensor

from kernels.sampling import draw, select
from kernels.sampling.batch import Mode, Sampled, SamplingBatch
from kernels.sampling.common import BINS, CHUNK


def sample(
    logits: Tensor,
    batch: SamplingBatch,
    *,
    num_logprobs: int | None = None,
    mode: Mode = Mode.FILTERED,
    advance: bool = False,
    has_masks: bool = False,
) -> Sampled:
    """See `kernels.sampling.sample`."""
    if logits.dtype != torch.float32 or not logits.is_contiguous():
        raise ValueError(f"logits must be contiguous float32, got {logits.dtype}, strides {logits.stride()}")
    num_rows, vocab_size = logits.shape
    if num_logprobs is not None and not 0 <= num_logprobs <= vocab_size:
        raise ValueError(f"num_logprobs must be in [0, {vocab_size}], got {num_logprobs}")
    num_chunks = triton.cdiv(vocab_size, CHUNK)
    padded_chunks = triton.next_power_of_2(num_chunks)
    grid = (num_chunks, num_rows)
    has_logprobs = num_logprobs is not None

    def scratch(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=logits.device)

    x = _adjust(logits, batch)
    if has_masks:
        x = _mask(logits, x, batch)
    best, low, raw_best, raw_sum = (scratch(num_rows, num_chunks) for _ in range(4))
    best_id = scratch(num_rows, num_chunks, dtype=torch.int32)
    draw.chunk_extremes[grid](
        logits, x, best, best_id, low, raw_best, raw_sum, vocab_size, num_chunks, CHUNK, has_logprobs
    )
    threshold = scratch(num_rows)
    sums = scratch(num_rows, num_chunks, dtype=torch.int64)
    is_filtered = mode is Mode.FILTERED
    if is_filtered:
        _find_thresholds(x, batch, best, low, threshold)
    if mode is not Mode.GREEDY:
        draw.chunk_weights[grid](
            x,
            batch.temperature,
            batch.min_p,
            threshold,
            best,
            sums,
            vocab_size,
            num_chunks,
            CHUNK,
            padded_chunks,
            is_filtered,
        )
    token_ids = scratch(num_rows, dtype=torch.int32)
    logprobs, raw_lse = scratch(num_rows), scratch(num_rows)
    draw.choose[(num_rows,)](
        logits,
        x,
        batch.temperature,
        batch.min_p,
        threshold,
        batch.seed,
        batch.position,
        batch.position if batch.output_counts is None else batch.output_counts,
        best,
        best_id,
        sums,
        raw_best,
        raw_sum,
        token_ids,
        logprobs,
        raw_lse,
        vocab_size,
        num_chunks,
        CHUNK,
        padded_chunks,
        IS_GREEDY=mode is Mode.GREEDY,
        IS_FILTERED=is_filtered,
        HAS_LOGPROBS=has_logprobs,
        IS_ADVANCING=advance,
        HAS_COUNTS=batch.output_counts is not None,
    )
    if num_logprobs is None:
        return Sampled(token_ids)
    top_ids, top_logprobs = _top_logprobs(logits, raw_lse, num_logprobs)
    return Sampled(token_ids, logprobs, top_ids, top_logprobs)


def _adjust(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """The logits with penalties and bias, in a tensor of their own unless there are none."""
    num_rows, vocab_size = logits.shape
    x = logits
    if batch.is_in_prompt is not None and batch.output_counts is not None:
        x = torch.empty_like(logits)
        draw.penalize[(triton.cdiv(vocab_size, CHUNK), num_rows)](
            logits,
            batch.is_in_prompt.view(torch.uint8),
            batch.output_counts,
            batch.repetition_penalty,
            batch.presence_penalty,
            batch.frequency_penalty,
            x,
            vocab_size,
            CHUNK,
        )
    if batch.bias_ids is not None:
        x = logits.clone() if x is logits else x
        capacity = batch.bias_ids.shape[1]
        draw.add_bias[(num_rows,)](
            batch.bias_ids,
            batch.bias_values,
            batch.bias_count,
            x,
            vocab_size,
            capacity,
            triton.next_power_of_2(capacity),
        )
    return x


def _mask(logits: Tensor, x: Tensor, batch: SamplingBatch) -> Tensor:
    """x with the rows' masks, in a tensor that is not the logits'."""
    assert batch.masks is not None
    assert batch.is_masked is not None
    num_rows, vocab_size = x.shape
    out = torch.empty_like(x) if x is logits else x
    draw.mask[(triton.cdiv(vocab_size, CHUNK), num_rows)](
        x, batch.is_masked, batch.masks, out, vocab_size, batch.masks.shape[1], CHUNK
    )
    return out


def _find_thresholds(x: Tensor, batch: SamplingBatch, best: Tensor, low: Tensor, threshold: Tensor) -> None:
    num_rows, vocab_size = x.shape
    num_chunks = best.shape[1]
    grid, padded_chunks = (num_chunks, num_rows), triton.next_power_of_2(num_chunks)

    def scratch(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    counts = scratch(num_rows, num_chunks, BINS)
    masses = scratch(num_rows, num_chunks, BINS, dtype=torch.int64)
    band, offsets = scratch(num_rows, 4), scratch(num_rows, num_chunks)
    band_mass = scratch(num_rows, 2, dtype=torch.int64)
    band_x = torch.empty_like(x)
    cuts = (batch.temperature, batch.top_k, batch.top_p)
    select.histogram[grid](
        x, *cuts, best, low, counts, masses, vocab_size, num_chunks, CHUNK, padded_chunks, BINS
    )
    select.find_band[(num_rows,)](
        *cuts, counts, masses, band, band_mass, offsets, vocab_size, num_chunks, BINS
    )
    select.compact[grid](x, best, low, band, offsets, band_x, vocab_size, num_chunks, CHUNK, padded_chunks)
    select.bisect[(num_rows,)](
        *cuts,
        best,
        band,
        band_mass,
        band_x,
        threshold,
        vocab_size,
        num_chunks,
        padded_chunks,
        select.BLOCK,
        num_warps=8,
    )


def _top_logprobs(logits: Tensor, raw_lse: Tensor, num_top: int) -> tuple[Tensor, Tensor]:
    num_rows, vocab_size = logits.shape
    num_chunks = triton.cdiv(vocab_size, CHUNK)
    ids = torch.empty(num_rows, num_top, dtype=torch.int32, device=logits.device)
    logprobs = torch.empty(num_rows, num_top, device=logits.device)
    if num_top:
        top = torch.empty(num_rows, num_chunks, num_top, device=logits.device)
        top_id = torch.empty(num_rows, num_chunks, num_top, dtype=torch.int32, device=logits.device)
        draw.chunk_top[(num_chunks, num_rows)](logits, top, top_id, vocab_size, num_chunks, num_top, CHUNK)
        num_candidates = num_chunks * num_top
        block = triton.next_power_of_2(num_candidates)
        draw.merge_top[(num_rows,)](top, top_id, raw_lse, ids, logprobs, num_candidates, num_top, block)
    return ids, logprobs
