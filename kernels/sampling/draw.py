"""From logits to one token a row: penalties, bias, mask, extremes of chunks, weights of chunks, the draw."""
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from kernels.sampling.common import as_integer, uniform_bits, weight_of

_NO_TOKEN = tl.constexpr(0x7FFFFFFF)


@triton.jit
def penalize(
    logits_ptr,  # float32 [R, V]
    in_prompt_ptr,  # uint8 [R, V]
    counts_ptr,  # int32 [R, V]
    repetition_ptr,
    presence_ptr,
    frequency_ptr,
    x_ptr,  # float32 [R, V], written
    vocab_size,
    CHUNK: tl.constexpr,
):
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    is_token = token < vocab_size
    at = row * vocab_size + token
    x = tl.load(logits_ptr + at, is_token, other=0.0)
    count = tl.load(counts_ptr + at, is_token, other=0)
    is_seen = (tl.load(in_prompt_ptr + at, is_token, other=0) != 0) | (count > 0)
    repetition = tl.load(repetition_ptr + row)
    weakened = tl.where(x > 0.0, tl.div_rn(x, repetition), x * repetition)
    x = tl.where(is_seen, weakened, x)
    x -= tl.load(frequency_ptr + row) * count.to(tl.float32)
    x -= tl.load(presence_ptr + row) * (count > 0).to(tl.float32)
    tl.store(x_ptr + at, x, is_token)


@triton.jit
def add_bias(ids_ptr, values_ptr, count_ptr, x_ptr, vocab_size, capacity, BLOCK: tl.constexpr):
    """x [R, V] += the row's biases, in place; a row's ids are distinct."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    is_set = at < tl.load(count_ptr + row)
    token = tl.load(ids_ptr + row * capacity + at, is_set, other=0)
    is_set = is_set & (token >= 0) & (token < vocab_size)
    value = tl.load(values_ptr + row * capacity + at, is_set, other=0.0)
    x = tl.load(x_ptr + row * vocab_size + token, is_set, other=0.0)
    tl.store(x_ptr + row * vocab_size + token, x + value, is_set)


@triton.jit
def mask(
    x_ptr,  # float32 [R, V]
    is_masked_ptr,  # int32 [R]
    masks_ptr,  # int32 [R, words]: bit i % 32 of word i // 32 for token i
    out_ptr,  # float32 [R, V], written, also where it is x
    vocab_size,
    num_words,
    CHUNK: tl.constexpr,
):
    """Of the bound rows, what their masks do not allow becomes -inf."""
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    is_token = token < vocab_size
    at = row * vocab_size + token
    x = tl.load(x_ptr + at, is_token, other=0.0)
    if tl.load(is_masked_ptr + row) != 0:
        words = tl.load(masks_ptr + row * num_words + token // 32, is_token, other=0)
        x = tl.where((words >> (token % 32)) & 1 != 0, x, float("-inf"))
    tl.store(out_ptr + at, x, is_token)


@triton.jit
def chunk_extremes(
    logits_ptr,  # float32 [R, V], the model's
    x_ptr,  # float32 [R, V], with penalties and bias (the same tensor where there are none)
    best_ptr,  # float32 [R, chunks], written: largest x
    best_id_ptr,  # int32 [R, chunks], written: its lowest token id
    low_ptr,  # float32 [R, chunks], written: smallest finite x
    raw_best_ptr,  # float32 [R, chunks], written with HAS_LOGPROBS: largest logit
    raw_sum_ptr,  # float32 [R, chunks], written with HAS_LOGPROBS: sum of exp(logit - largest)
    vocab_size,
    num_chunks,
    CHUNK: tl.constexpr,
    HAS_LOGPROBS: tl.constexpr,
):
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    is_token = token < vocab_size
    x = tl.load(x_ptr + row * vocab_size + token, is_token, other=float("-inf"))
    best = tl.max(x, axis=0)
    out = row * num_chunks + chunk
    tl.store(best_ptr + out, best)
    tl.store(best_id_ptr + out, tl.min(tl.where(x == best, token, _NO_TOKEN), axis=0))
    tl.store(low_ptr + out, tl.min(tl.where(x > float("-inf"), x, float("inf")), axis=0))
    if HAS_LOGPROBS:
        raw = tl.load(logits_ptr + row * vocab_size + token, is_token, other=float("-inf"))
        raw_best = tl.max(raw, axis=0)
        terms = tl.where(raw == raw_best, 1.0, tl.exp(raw - raw_best))
        tl.store(raw_best_ptr + out, raw_best)
        tl.store(raw_sum_ptr + out, tl.sum(tl.where(is_token, terms, 0.0), axis=0))


@triton.jit
def _kept_weights(x, is_token, best, temperature, threshold, min_p):
    weight = weight_of(x, best, temperature)
    return tl.where(is_token & (x >= threshold) & (weight >= min_p), as_integer(weight), 0)


@triton.jit
def chunk_weights(
    x_ptr,
    temperature_ptr,
    min_p_ptr,
    threshold_ptr,
    best_ptr,  # float32 [R, chunks]
    sums_ptr,  # int64 [R, chunks], written: weight of the kept tokens
    vocab_size,
    num_chunks,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    IS_FILTERED: tl.constexpr,
):
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    temperature = tl.load(temperature_ptr + row)
    if temperature > 0.0:
        at = tl.arange(0, CHUNKS)
        bests = tl.load(best_ptr + row * num_chunks + at, at < num_chunks, other=float("-inf"))
        token = chunk * CHUNK + tl.arange(0, CHUNK)
        is_token = token < vocab_size
        x = tl.load(x_ptr + row * vocab_size + token, is_token, other=float("-inf"))
        threshold, min_p = float("-inf"), 0.0
        if IS_FILTERED:
            threshold, min_p = tl.load(threshold_ptr + row), tl.load(min_p_ptr + row)
        kept = _kept_weights(x, is_token, tl.max(bests, axis=0), temperature, threshold, min_p)
        tl.store(sums_ptr + row * num_chunks + chunk, tl.sum(kept, axis=0))


@triton.jit
def _draw(x_ptr, sums, best, temperature, threshold, min_p, random, vocab_size, CHUNK: tl.constexpr):
    """The token at which the kept weights, added up in the order of ids, pass random / 2^53 of their sum."""
    total = tl.sum(sums, axis=0)
    target = tl.umulhi(random << 11, total.to(tl.uint64)).to(tl.int64)  # floor, and so below the total
    cumulative = tl.cumsum(sums, axis=0)
    is_before = cumulative <= target
    chunk = tl.sum(is_before.to(tl.int32), axis=0)
    target -= tl.sum(tl.where(is_before, sums, 0), axis=0)
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    is_token = token < vocab_size
    x = tl.load(x_ptr + token, is_token, other=float("-inf"))
    kept = _kept_weights(x, is_token, best, temperature, threshold, min_p)
    return chunk * CHUNK + tl.sum((tl.cumsum(kept, axis=0) <= target).to(tl.int32), axis=0)


@triton.jit
def choose(
    logits_ptr,
    x_ptr,
    temperature_ptr,
    min_p_ptr,
    threshold_ptr,
    seed_ptr,  # int64 [R]
    position_ptr,  # int64 [R], advanced with IS_ADVANCING
    counts_ptr,  # int32 [R, V], the chosen token counted with IS_ADVANCING and HAS_COUNTS
    best_ptr,
    best_id_ptr,
    sums_ptr,
    raw_best_ptr,
    raw_sum_ptr,
    token_ptr,  # int32 [R], written
    logprob_ptr,  # float32 [R], written with HAS_LOGPROBS
    raw_lse_ptr,  # float32 [R], written with HAS_LOGPROBS: log of the sum of exp(logit)
    vocab_size,
    num_chunks,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    IS_GREEDY: tl.constexpr,
    IS_FILTERED: tl.constexpr,
    HAS_LOGPROBS: tl.constexpr,
    IS_ADVANCING: tl.constexpr,
    HAS_COUNTS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, CHUNKS)
    is_chunk = at < num_chunks
    bests = tl.load(best_ptr + row * num_chunks + at, is_chunk, other=float("-inf"))
    best = tl.max(bests, axis=0)
    best_ids = tl.load(best_id_ptr + row * num_chunks + at, is_chunk, other=_NO_TOKEN)
    token = tl.min(tl.where(bests == best, best_ids, _NO_TOKEN), axis=0)
    position = tl.load(position_ptr + row)
    if not IS_GREEDY:
        temperature = tl.load(temperature_ptr + row)
        if temperature > 0.0:
            threshold, min_p = float("-inf"), 0.0
            if IS_FILTERED:
                threshold, min_p = tl.load(threshold_ptr + row), tl.load(min_p_ptr + row)
            sums = tl.load(sums_ptr + row * num_chunks + at, is_chunk, other=0)
            random = uniform_bits(tl.load(seed_ptr + row), position)
            row_ptr = x_ptr + row * vocab_size
            token = _draw(row_ptr, sums, best, temperature, threshold, min_p, random, vocab_size, CHUNK)
    token = tl.minimum(token, vocab_size - 1)  # a row of NaN alone chooses nothing: its id must still be one
    tl.store(token_ptr + row, token)
    if HAS_LOGPROBS:
        raw_bests = tl.load(raw_best_ptr + row * num_chunks + at, is_chunk, other=float("-inf"))
        raw_best = tl.max(raw_bests, axis=0)
        raw_sums = tl.load(raw_sum_ptr + row * num_chunks + at, is_chunk, other=0.0)
        raw_lse = raw_best + tl.log(tl.sum(raw_sums * tl.exp(raw_bests - raw_best), axis=0))
        tl.store(raw_lse_ptr + row, raw_lse)
        tl.store(logprob_ptr + row, tl.load(logits_ptr + row * vocab_size + token) - raw_lse)
    if IS_ADVANCING:
        tl.store(position_ptr + row, position + 1)
        if HAS_COUNTS:
            count = tl.load(counts_ptr + row * vocab_size + token)
            tl.store(counts_ptr + row * vocab_size + token, count + 1)


@triton.jit
def chunk_top(
    logits_ptr,
    top_ptr,  # float32 [R, chunks, num_top], written: the chunk's best, best first, lower ids before equals
    top_id_ptr,  # int32 [R, chunks, num_top], written
    vocab_size,
    num_chunks,
    num_top,
    CHUNK: tl.constexpr,
):
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    is_left = token < vocab_size
    x = tl.load(logits_ptr + row * vocab_size + token, is_left, other=float("-inf"))
    out = (row * num_chunks + chunk) * num_top
    for i in range(num_top):
        best = tl.max(tl.where(is_left, x, float("-inf")), axis=0)
        chosen = tl.min(tl.where(is_left & (x == best), token, _NO_TOKEN), axis=0)
        tl.store(top_ptr + out + i, best)
        tl.store(top_id_ptr + out + i, chosen)
        is_left = is_left & (token != chosen)


@triton.jit
def merge_top(
    top_ptr,
    top_id_ptr,
    raw_lse_ptr,
    ids_ptr,  # int32 [R, num_top], written
    logprobs_ptr,  # float32 [R, num_top], written
    num_candidates,
    num_top,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    is_left = at < num_candidates
    x = tl.load(top_ptr + row * num_candidates + at, is_left, other=float("-inf"))
    token = tl.load(top_id_ptr + row * num_candidates + at, is_left, other=_NO_TOKEN)
    is_left = is_left & (token != _NO_TOKEN)
    raw_lse = tl.load(raw_lse_ptr + row)
    for i in range(num_top):
        best = tl.max(tl.where(is_left, x, float("-inf")), axis=0)
        chosen = tl.min(tl.where(is_left & (x == best), token, _NO_TOKEN), axis=0)
        tl.store(ids_ptr + row * num_top + i, chosen)
        tl.store(logprobs_ptr + row * num_top + i, best - raw_lse)
        is_left = is_left & (token != chosen)
