"""Sampling in plain torch: the specification of the kernels, itself without host synchronization.

For each row: the raw distribution is kept for logprobs; repetition, then frequency and presence penalties
(Keskar et al. 2019; OpenAI); bias; mask; temperature; top-k; of what is left the nucleus (Holtzman et al.
2020); of that what is at least `min_p` times as likely as the best (Nguyen et al. 2024). Tokens tied with the
last one that a cut keeps are kept as well. The draw inverts the distribution function in the order of token
ids, at a number that is a hash of (seed, position).
"""

from functools import cache

import torch
from torch import Tensor

from kernels.sampling.batch import Mode, Sampled, SamplingBatch


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
    num_rows, vocab_size = logits.shape
    adjusted = _adjust(logits.float(), batch)
    if has_masks:
        adjusted = _masked(adjusted, batch)
    token_ids = adjusted.argmax(dim=-1)
    if mode is not Mode.GREEDY:
        temperature = batch.temperature[:num_rows].unsqueeze(1)
        weights = _weights(adjusted, temperature)
        if mode is Mode.FILTERED:
            weights = weights * keep(adjusted, weights, batch)
        cumulative = weights.cumsum(dim=-1)
        target = _uniform(batch.seed[:num_rows], batch.position[:num_rows]).unsqueeze(1) * cumulative[:, -1:]
        drawn = torch.searchsorted(cumulative, target, right=True)[:, 0].clamp_(max=vocab_size - 1)
        token_ids = torch.where(temperature[:, 0] == 0, token_ids, drawn)
    if advance:
        batch.position[:num_rows] += 1
        if batch.output_counts is not None:
            one = torch.ones_like(token_ids, dtype=torch.int32).unsqueeze(1)
            batch.output_counts[:num_rows].scatter_add_(1, token_ids.unsqueeze(1), one)
    if num_logprobs is None:
        return Sampled(token_ids.int())
    logprobs = logits.float().log_softmax(dim=-1)
    own = logprobs.gather(1, token_ids.unsqueeze(1)).squeeze(1)
    # Stable, so that of equal tokens the lower ids come first.
    values, ids = logprobs.sort(dim=-1, descending=True, stable=True)
    return Sampled(token_ids.int(), own, ids[:, :num_logprobs].int(), values[:, :num_logprobs].contiguous())


def keep(logits: Tensor, weights: Tensor, batch: SamplingBatch) -> Tensor:
    """bool [R, V]: what top-k, top-p and min-p leave of the adjusted logits [R, V] with these weights."""
    num_rows, vocab_size = logits.shape
    top_k, top_p, min_p = (
        t[:num_rows].unsqueeze(1) for t in (batch.top_k.long(), batch.top_p.double(), batch.min_p)
    )
    top_k = torch.where((top_k <= 0) | (top_k > vocab_size), vocab_size, top_k)
    order = logits.sort(dim=-1, descending=True, stable=True)
    by_rank = weights.gather(1, order.indices)
    kth = order.values.gather(1, top_k - 1)
    by_rank = by_rank * (order.values >= kth)
    cumulative = by_rank.cumsum(dim=-1)
    in_nucleus = cumulative - by_rank < top_p * cumulative[:, -1:]
    num_kept = in_nucleus.sum(dim=-1, keepdim=True).clamp_(min=1)
    last = torch.where(top_p < 1, order.values.gather(1, num_kept - 1), float("-inf"))
    return (logits >= kth) & (logits >= last) & (weights.float() >= min_p)


def _adjust(logits: Tensor, batch: SamplingBatch) -> Tensor:
    num_rows = logits.shape[0]
    if batch.is_in_prompt is not None and batch.output_counts is not None:
        counts = batch.output_counts[:num_rows]
        repetition, presence, frequency = (
            t[:num_rows].unsqueeze(1)
            for t in (batch.repetition_penalty, batch.presence_penalty, batch.frequency_penalty)
        )
        weakened = torch.where(logits > 0, logits / repetition, logits * repetition)
        logits = torch.where(batch.is_in_prompt[:num_rows] | (counts > 0), weakened, logits)
        logits = logits - frequency * counts - presence * (counts > 0)
    if batch.bias_ids is not None and batch.bias_values is not None and batch.bias_count is not None:
        index = torch.arange(batch.bias_ids.shape[1], device=logits.device)
        is_set = index < batch.bias_count[:num_rows].unsqueeze(1)
        values = torch.where(is_set, batch.bias_values[:num_rows], 0.0)
        ids = torch.where(is_set, batch.bias_ids[:num_rows], 0).long()
        logits = logits.scatter_add(1, ids, values)
    return logits


def mask_bias(masks: Tensor, vocab_size: int) -> Tensor:
    """float32 [R, vocab_size]: 0, or -inf where masks, int32 [R, words] as in `SamplingBatch`, forbid it."""
    of_bytes = _byte_biases(masks.device).index_select(0, masks.view(torch.uint8).int().view(-1))
    return of_bytes.view(len(masks), -1)[:, :vocab_size]


@cache
def _byte_biases(device: torch.device) -> Tensor:
    """float32 [256, 8]: of each byte's bits. Looking eight tokens up at a time is ten times as fast."""
    bits = torch.arange(256, device=device).unsqueeze(1) >> torch.arange(8, device=device) & 1
    return torch.where(bits == 1, 0.0, float("-inf"))


def _masked(logits: Tensor, batch: SamplingBatch) -> Tensor:
    assert batch.masks is not None
    assert batch.is_masked is not None
    num_rows, vocab_size = logits.shape
    is_bound = (batch.is_masked[:num_rows] != 0).unsqueeze(1)
    return torch.where(is_bound, logits + mask_bias(batch.masks[:num_rows], vocab_size), logits)


def _weights(logits: Tensor, temperature: Tensor) -> Tensor:
    """float64 [R, V], 1 for the best token; rows of temperature 0 hold anything finite."""
    best = logits.amax(dim=-1, keepdim=True)
    temperature = torch.where(temperature == 0, 1.0, temperature)
    distance = torch.where(logits == best, 0.0, logits / temperature - best / temperature)
    return distance.double().exp()


def _uniform(seed: Tensor, position: Tensor) -> Tensor:
    """float64 in [0, 1): SplitMix64's finalizer (Steele et al. 2014) over int64 seeds and positions."""
    x = seed * _signed(0x9E3779B97F4A7C15) + (position + 1) * _signed(0xD1B54A32D192ED03)
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return _shift(x ^ _shift(x, 31), 11).double() * 2.0**-53


def _shift(x: Tensor, by: int) -> Tensor:
    """x >> by with zeros from the left."""
    return (x >> by) & ((1 << (64 - by)) - 1)


def _signed(x: int) -> int:
    return x - (1 << 64)
