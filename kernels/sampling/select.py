"""Where top-k and top-p cut a row: a histogram, the band of logits that holds the cuts, bisection inside it.

No sort: `histogram` counts and weighs 64 bins of logits in chunks side by side; `find_band` takes the few
bins in which the cuts must lie; `compact` copies these logits next to each other; `bisect` finds the cuts
among them, one program a row. A band is a few hundred logits where the model is sure, a tenth of the
vocabulary where it is not.
"""
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from kernels.sampling.common import as_integer, bin_of, bins_per_logit, key_of, value_of, weight_of

BLOCK = 4096  # band logits that `bisect` holds at a time
_SUB = tl.constexpr(128)  # logits compared with all bins at a time: 8,192 values in the registers
_CHUNKS_AT_ONCE = tl.constexpr(16)


@triton.jit
def has_cut(temperature, top_k, top_p, vocab_size):
    return (temperature > 0.0) & (((top_k > 0) & (top_k < vocab_size)) | (top_p < 1.0))


@triton.jit
def row_range(chunk_best_ptr, chunk_low_ptr, row, num_chunks, CHUNKS: tl.constexpr):
    """The row's best logit and how many bins a logit spans, from its chunks' extremes [R, chunks]."""
    at = tl.arange(0, CHUNKS)
    is_chunk = at < num_chunks
    best = tl.max(tl.load(chunk_best_ptr + row * num_chunks + at, is_chunk, other=float("-inf")), axis=0)
    lowest = tl.min(tl.load(chunk_low_ptr + row * num_chunks + at, is_chunk, other=float("inf")), axis=0)
    return best, bins_per_logit(best, lowest)


@triton.jit
def histogram(
    x_ptr,  # float32 [R, V]
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    chunk_best_ptr,  # float32 [R, chunks]
    chunk_low_ptr,
    counts_ptr,  # int32 [R, chunks, BINS], written
    masses_ptr,  # int64 [R, chunks, BINS], written
    vocab_size,
    num_chunks,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    BINS: tl.constexpr,
):
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    temperature = tl.load(temperature_ptr + row)
    if has_cut(temperature, tl.load(top_k_ptr + row), tl.load(top_p_ptr + row), vocab_size):
        best, per_logit = row_range(chunk_best_ptr, chunk_low_ptr, row, num_chunks, CHUNKS)
        bins = tl.arange(0, BINS)
        counts = tl.zeros((BINS,), tl.int32)
        masses = tl.zeros((BINS,), tl.int64)
        for i in range(0, CHUNK, _SUB):
            token = chunk * CHUNK + i + tl.arange(0, _SUB)
            is_token = token < vocab_size
            x = tl.load(x_ptr + row * vocab_size + token, is_token, other=float("-inf"))
            of_bin = bin_of(x, best, per_logit)[:, None] == bins[None, :]
            of_bin = of_bin & is_token[:, None]
            counts += tl.sum(of_bin.to(tl.int32), axis=0)
            # float32 inside a tile: 1e-7 of a bin decides nothing, and it is half the registers.
            weight = weight_of(x, best, temperature)
            masses += as_integer(tl.sum(tl.where(of_bin, weight[:, None], 0.0), axis=0))
        at = (row * num_chunks + chunk) * BINS + bins
        tl.store(counts_ptr + at, counts)
        tl.store(masses_ptr + at, masses)


@triton.jit
def find_band(
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    counts_ptr,  # int32 [R, chunks, BINS]
    masses_ptr,  # int64 [R, chunks, BINS]
    band_ptr,  # int32 [R, 4], written: first bin, last bin, logits in the band, logits above it
    band_mass_ptr,  # int64 [R, 2], written: weight above the band, weight of the row
    offsets_ptr,  # int32 [R, chunks], written: band logits in the chunks before
    vocab_size,
    num_chunks,
    BINS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    top_k, top_p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row)
    bins = tl.arange(0, BINS)
    tl.store(band_ptr + row * 4 + 2, 0)
    if has_cut(tl.load(temperature_ptr + row), top_k, top_p, vocab_size):
        counts = tl.zeros((BINS,), tl.int32)
        masses = tl.zeros((BINS,), tl.int64)
        for i in range(0, num_chunks, _CHUNKS_AT_ONCE):
            chunk = i + tl.arange(0, _CHUNKS_AT_ONCE)
            at = (row * num_chunks + chunk[:, None]) * BINS + bins[None, :]
            is_chunk = (chunk < num_chunks)[:, None]
            counts += tl.sum(tl.load(counts_ptr + at, is_chunk, other=0), axis=0)
            masses += tl.sum(tl.load(masses_ptr + at, is_chunk, other=0), axis=0)
        count_to, mass_to = tl.cumsum(counts, axis=0), tl.cumsum(masses, axis=0)
        has_k = (top_k > 0) & (top_k < vocab_size)
        k_bin = tl.where(has_k, tl.sum((count_to < top_k).to(tl.int32), axis=0), BINS - 1)
        # The weight that top-k leaves lies between these two, so the nucleus ends in one of these bins.
        most = tl.sum(tl.where(bins <= k_bin, masses, 0), axis=0)
        least = tl.where(has_k, most - tl.sum(tl.where(bins == k_bin, masses, 0), axis=0), most)
        p_first = tl.sum((mass_to < (top_p * least.to(tl.float64)).to(tl.int64)).to(tl.int32), axis=0)
        p_last = tl.sum((mass_to < (top_p * most.to(tl.float64)).to(tl.int64)).to(tl.int32), axis=0)
        has_p = top_p < 1.0
        first = tl.minimum(tl.where(has_p, p_first, k_bin), k_bin)
        last = tl.where(has_k, k_bin, tl.minimum(p_last, BINS - 1))
        is_above = bins < first
        tl.store(band_ptr + row * 4, first)
        tl.store(band_ptr + row * 4 + 1, last)
        is_band = (bins >= first) & (bins <= last)
        tl.store(band_ptr + row * 4 + 2, tl.sum(tl.where(is_band, counts, 0), axis=0))
        tl.store(band_ptr + row * 4 + 3, tl.sum(tl.where(is_above, counts, 0), axis=0))
        tl.store(band_mass_ptr + row * 2, tl.sum(tl.where(is_above, masses, 0), axis=0))
        tl.store(band_mass_ptr + row * 2 + 1, tl.sum(masses, axis=0))
        before = tl.zeros((), tl.int32)
        for i in range(0, num_chunks, _CHUNKS_AT_ONCE):
            chunk = i + tl.arange(0, _CHUNKS_AT_ONCE)
            at = (row * num_chunks + chunk[:, None]) * BINS + bins[None, :]
            mask = (chunk < num_chunks)[:, None] & is_band[None, :]
            in_band = tl.sum(tl.load(counts_ptr + at, mask, other=0), axis=1)
            offset = before + tl.cumsum(in_band, axis=0) - in_band
            tl.store(offsets_ptr + row * num_chunks + chunk, offset, chunk < num_chunks)
            before += tl.sum(in_band, axis=0)


@triton.jit
def compact(
    x_ptr,  # float32 [R, V]
    chunk_best_ptr,
    chunk_low_ptr,
    band_ptr,
    offsets_ptr,
    band_x_ptr,  # float32 [R, V], written: the band's logits in the order of token ids
    vocab_size,
    num_chunks,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if tl.load(band_ptr + row * 4 + 2) > 0:
        best, per_logit = row_range(chunk_best_ptr, chunk_low_ptr, row, num_chunks, CHUNKS)
        token = chunk * CHUNK + tl.arange(0, CHUNK)
        is_token = token < vocab_size
        x = tl.load(x_ptr + row * vocab_size + token, is_token, other=float("-inf"))
        bin_id = bin_of(x, best, per_logit)
        in_band = (bin_id >= tl.load(band_ptr + row * 4)) & (bin_id <= tl.load(band_ptr + row * 4 + 1))
        in_band = in_band & is_token
        one = in_band.to(tl.int32)
        at = tl.load(offsets_ptr + row * num_chunks + chunk) + tl.cumsum(one, axis=0) - one
        tl.store(band_x_ptr + row * vocab_size + at, x, in_band)


@triton.jit
def _count_from(band_ptr, num, key, BLOCK: tl.constexpr):
    """How many of the band's logits have at least this key."""
    total = tl.zeros((), tl.int32)
    for i in range(0, num, BLOCK):
        at = i + tl.arange(0, BLOCK)
        x = tl.load(band_ptr + at, at < num, other=0.0)
        total += tl.sum(((key_of(x) >= key) & (at < num)).to(tl.int32), axis=0)
    return total


@triton.jit
def _mass_from(band_ptr, num, key, best, temperature, BLOCK: tl.constexpr):
    """The weight of the band's logits that have at least this key (int64: one above the last fits)."""
    total = tl.zeros((), tl.int64)
    for i in range(0, num, BLOCK):
        at = i + tl.arange(0, BLOCK)
        x = tl.load(band_ptr + at, at < num, other=0.0)
        weight = as_integer(weight_of(x, best, temperature))
        is_in = (key_of(x).to(tl.int64) >= key) & (at < num)
        total += tl.sum(tl.where(is_in, weight, 0), axis=0)
    return total


@triton.jit
def bisect(
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    chunk_best_ptr,
    band_ptr,
    band_mass_ptr,
    band_x_ptr,
    threshold_ptr,  # float32 [R], written: logits below it are cut
    vocab_size,
    num_chunks,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    num = tl.load(band_ptr + row * 4 + 2)
    tl.store(threshold_ptr + row, float("-inf"))
    if num > 0:
        temperature = tl.load(temperature_ptr + row)
        top_k, top_p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row)
        at = tl.arange(0, CHUNKS)
        chunk_best = tl.load(chunk_best_ptr + row * num_chunks + at, at < num_chunks, other=float("-inf"))
        best = tl.max(chunk_best, axis=0)
        count_above = tl.load(band_ptr + row * 4 + 3)
        mass_above = tl.load(band_mass_ptr + row * 2)
        kept = tl.load(band_mass_ptr + row * 2 + 1)
        logits_ptr = band_x_ptr + row * vocab_size
        least = tl.full((), 0x7FFFFFFF, tl.int32)
        most = tl.full((), -0x7FFFFFFF, tl.int32)
        for i in range(0, num, BLOCK):
            index = i + tl.arange(0, BLOCK)
            key = key_of(tl.load(logits_ptr + index, index < num, other=0.0))
            least = tl.minimum(least, tl.min(tl.where(index < num, key, 0x7FFFFFFF), axis=0))
            most = tl.maximum(most, tl.max(tl.where(index < num, key, -0x7FFFFFFF), axis=0))
        low, high = least.to(tl.int64), most.to(tl.int64)
        highest = high
        if (top_k > 0) & (top_k < vocab_size):  # the largest key that k logits reach
            while low < high:
                middle = low + (high - low + 1) // 2
                if count_above + _count_from(logits_ptr, num, middle, BLOCK) >= top_k:
                    low = middle
                else:
                    high = middle - 1
            kept = mass_above + _mass_from(logits_ptr, num, low, best, temperature, BLOCK)
        if top_p < 1.0:  # the smallest key above which less than the nucleus lies
            target = (top_p * kept.to(tl.float64)).to(tl.int64)
            high = highest
            while low < high:
                middle = low + (high - low) // 2
                if mass_above + _mass_from(logits_ptr, num, middle + 1, best, temperature, BLOCK) < target:
                    high = middle
                else:
                    low = middle + 1
        tl.store(threshold_ptr + row, value_of(low.to(tl.int32)))
