"""From logits to tokens: penalties, bias, temperature, top-k, top-p, min-p, logprobs."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.messages import RawLogprobs
from engine.request import Request

# Nearly every nucleus ends within this many candidates; a row whose does not is sorted whole.
_NUM_CANDIDATES = 1024
_MASK64 = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class SampledToken:
    token_id: int
    logprobs: RawLogprobs | None


@dataclass(slots=True)
class _TokenCounts:
    """How often each token occurred; follows one request's tokens."""

    in_prompt: Tensor  # bool [vocab]
    in_output: Tensor  # float32 [vocab], occurrences
    num_seen: int


class Sampler:
    """Samples one token per row.

    A row's result depends on its own logits, parameters, seed and position alone, never on the rows
    beside it: the uniform number is a hash of (seed, position), so that a preempted request goes on
    with the same tokens.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self.vocab_size = vocab_size
        self.device = device
        self._counts: dict[str, _TokenCounts] = {}

    def sample(self, logits: Tensor, requests: Sequence[Request]) -> list[SampledToken]:
        """One token for each row of logits, float32 [R, vocab]; the tensor is overwritten."""
        logprobs = _gather_raw_logprobs(logits, requests)
        for row, request in enumerate(requests):
            if request.params.has_penalties:
                self._penalize(logits[row], request)
            if request.params.logit_bias:
                _add_bias(logits[row], request)
        token_ids = self._choose(logits, requests)
        return [
            SampledToken(token_id, entry(token_id) if entry else None)
            for token_id, entry in zip(token_ids, logprobs, strict=True)
        ]

    def forget(self, request_id: str) -> None:
        """Drop what is kept for a request that left the batch."""
        self._counts.pop(request_id, None)

    def _choose(self, logits: Tensor, requests: Sequence[Request]) -> list[int]:
        token_ids: list[int] = logits.argmax(dim=-1).tolist()
        plain = [i for i, r in enumerate(requests) if not r.params.is_greedy and not _is_filtered(r)]
        filtered = [i for i, r in enumerate(requests) if not r.params.is_greedy and _is_filtered(r)]
        for rows, choose in ((plain, _sample_plain), (filtered, _sample_filtered)):
            if rows:
                chosen = choose(
                    logits[rows] if len(rows) < len(requests) else logits, [requests[i] for i in rows]
                )
                for i, token_id in zip(rows, chosen, strict=True):
                    token_ids[i] = token_id
        return token_ids

    def _penalize(self, logits: Tensor, request: Request) -> None:
        params, counts = request.params, self._counts_of(request)
        if params.repetition_penalty != 1.0:
            seen = counts.in_prompt | (counts.in_output > 0)
            penalty = params.repetition_penalty
            weakened = torch.where(logits > 0, logits / penalty, logits * penalty)
            logits.copy_(torch.where(seen, weakened, logits))
        logits.sub_(counts.in_output, alpha=params.frequency_penalty)
        logits.sub_((counts.in_output > 0).float(), alpha=params.presence_penalty)

    def _counts_of(self, request: Request) -> _TokenCounts:
        counts = self._counts.get(request.request_id)
        if counts is None:
            in_prompt = torch.zeros(self.vocab_size, dtype=torch.bool, device=self.device)
            in_prompt[request.all_token_ids[: request.num_prompt_tokens]] = True
            in_output = torch.zeros(self.vocab_size, device=self.device)
            counts = _TokenCounts(in_prompt, in_output, request.num_prompt_tokens)
            self._counts[request.request_id] = counts
        for token_id in request.all_token_ids[counts.num_seen :]:
            counts.in_output[token_id] += 1
        counts.num_seen = request.num_tokens
        return counts


def position_logprobs(logits: Tensor, token_ids: Sequence[int], num_top: int) -> list[RawLogprobs]:
    """For each row of logits [R, vocab]: the given token and the `num_top` best, with their logprobs."""
    logprobs = logits.log_softmax(dim=-1)
    index = torch.tensor(token_ids, device=logits.device).unsqueeze(1)
    own = logprobs.gather(1, index).squeeze(1).tolist()
    if num_top == 0:
        return [((t, p),) for t, p in zip(token_ids, own, strict=True)]
    values, ids = logprobs.topk(num_top, dim=-1)
    return [
        ((t, p), *zip(row_ids, row_values, strict=True))
        for t, p, row_ids, row_values in zip(token_ids, own, ids.tolist(), values.tolist(), strict=True)
    ]


class _RowLogprobs:
    """The model's own distribution of one row, kept from before penalties and bias change it."""

    def __init__(self, logits: Tensor, num_top: int) -> None:
        self._logits = logits.clone().unsqueeze(0)
        self._num_top = num_top

    def __call__(self, token_id: int) -> RawLogprobs:
        return position_logprobs(self._logits, [token_id], self._num_top)[0]


def _gather_raw_logprobs(logits: Tensor, requests: Sequence[Request]) -> list[_RowLogprobs | None]:
    return [
        None if r.params.logprobs is None else _RowLogprobs(logits[i], r.params.logprobs)
        for i, r in enumerate(requests)
    ]


def _add_bias(logits: Tensor, request: Request) -> None:
    bias = request.params.logit_bias
    logits[list(bias)] += torch.tensor(list(bias.values()), dtype=logits.dtype, device=logits.device)


def _is_filtered(request: Request) -> bool:
    params = request.params
    return params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0


def _sample_plain(logits: Tensor, requests: Sequence[Request]) -> list[int]:
    scaled = logits / _column([r.params.temperature for r in requests], logits)
    weights = scaled.softmax(dim=-1)
    return _inverse_cdf(weights, requests)[:, 0].tolist()


def _sample_filtered(
    logits: Tensor, requests: Sequence[Request], num_candidates: int = _NUM_CANDIDATES
) -> list[int]:
    """Keep the top k, of those the nucleus, of those what min-p allows (the order of transformers)."""
    params = [r.params for r in requests]
    vocab_size = logits.shape[-1]
    num_candidates = min(vocab_size, max(num_candidates, *(p.top_k for p in params), 0))
    scaled = logits / _column([p.temperature for p in params], logits)
    values, ids = scaled.topk(num_candidates, dim=-1)
    probs = (values - scaled.logsumexp(dim=-1, keepdim=True)).double().exp()

    top_k = _column([float(p.top_k or vocab_size) for p in params], probs)
    probs = probs * (torch.arange(num_candidates, device=probs.device) < top_k)
    cumulative = probs.cumsum(dim=-1)
    has_top_k = _column([float(p.top_k > 0) for p in params], probs)
    nucleus = _column([p.top_p for p in params], probs)
    nucleus = nucleus * torch.where(has_top_k > 0, cumulative[:, -1:], 1.0)
    floor = _column([p.min_p for p in params], probs) * probs[:, :1]

    if num_candidates < vocab_size:
        is_cut = (cumulative[:, -1:] < nucleus) & (probs[:, -1:] >= floor) & (probs[:, -1:] > 0)
        if is_cut.any():
            return _sample_filtered(logits, requests, vocab_size)
    keep = (cumulative - probs < nucleus) & (probs >= floor)
    keep[:, 0] = True
    chosen = _inverse_cdf(probs * keep, requests)
    return ids.gather(1, chosen)[:, 0].tolist()


def _inverse_cdf(weights: Tensor, requests: Sequence[Request]) -> Tensor:
    """Index [R, 1] drawn from each row of unnormalised weights [R, V] (float64 sums: V can be 256 k)."""
    cumulative = weights.cumsum(dim=-1, dtype=torch.float64)
    uniform = _column([_uniform(r.seed, r.num_output_tokens) for r in requests], cumulative)
    # right=True: the first entry above the target, so that an entry of weight 0 is never hit.
    index = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
    return index.clamp_(max=weights.shape[-1] - 1)


def _uniform(seed: int, position: int) -> float:
    """A number in [0, 1) from (seed, position): SplitMix64's finalizer (Steele et al. 2014)."""
    x = (seed * 0x9E3779B97F4A7C15 + (position + 1) * 0xD1B54A32D192ED03) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return ((x ^ (x >> 31)) >> 11) * 2.0**-53


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).unsqueeze(1)
