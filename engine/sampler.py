"""From logits to tokens: penalties, bias, temperature, top-k, top-p, min-p, logprobs."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from engine.messages import RawLogprobs
from engine.request import Request
from engine.sampling_params import SamplingParams
from engine.structured import fill_masks
from kernels.sampling import mask_bias, num_mask_words

# Nearly every nucleus ends within this many candidates; a row whose does not is sorted whole.
_NUM_CANDIDATES = 1024
_MASK64 = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class SampledToken:
    token_id: int
    logprobs: RawLogprobs | None


class SampledRow(NamedTuple):
    """What one row of logits is sampled for: the token after the request's tokens and then these drafts."""

    request: Request
    draft_token_ids: tuple[int, ...] = ()

    @property
    def params(self) -> SamplingParams:
        return self.request.params

    @property
    def position(self) -> int:
        """Index of the new token in the request's output."""
        return self.request.num_output_tokens + len(self.draft_token_ids)


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
    with the same tokens, and drafts are verified with the numbers of plain decoding.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self.vocab_size = vocab_size
        self.device = device
        self._counts: dict[str, _TokenCounts] = {}

    def sample(self, logits: Tensor, rows: Sequence[SampledRow]) -> list[SampledToken]:
        """One token for each row of logits, float32 [R, vocab]; the tensor is overwritten.

        The rows of one request stand together, with one draft more each.
        """
        logprobs = _gather_raw_logprobs(logits, rows)
        for i, row in enumerate(rows):
            if row.params.has_penalties:
                self._penalize(logits[i], row)
            if row.params.logit_bias:
                _add_bias(logits[i], row.params)
        _mask(logits, rows)
        token_ids = self._choose(logits, rows)
        return [
            SampledToken(token_id, entry(token_id) if entry else None)
            for token_id, entry in zip(token_ids, logprobs, strict=True)
        ]

    def forget(self, request_id: str) -> None:
        """Drop what is kept for a request that left the batch."""
        self._counts.pop(request_id, None)

    def _choose(self, logits: Tensor, rows: Sequence[SampledRow]) -> list[int]:
        token_ids: list[int] = logits.argmax(dim=-1).tolist()
        plain = [i for i, r in enumerate(rows) if not r.params.is_greedy and not _is_filtered(r.params)]
        filtered = [i for i, r in enumerate(rows) if not r.params.is_greedy and _is_filtered(r.params)]
        for indices, choose in ((plain, _sample_plain), (filtered, _sample_filtered)):
            if indices:
                chosen = choose(
                    logits[indices] if len(indices) < len(rows) else logits, [rows[i] for i in indices]
                )
                for i, token_id in zip(indices, chosen, strict=True):
                    token_ids[i] = token_id
        return token_ids

    def _penalize(self, logits: Tensor, row: SampledRow) -> None:
        params, counts = row.params, self._counts_of(row.request)
        in_output = counts.in_output
        if row.draft_token_ids:
            # A copy: the drafts may be rejected.
            in_output = in_output.clone()
            for token_id in row.draft_token_ids:
                in_output[token_id] += 1
        if params.repetition_penalty != 1.0:
            seen = counts.in_prompt | (in_output > 0)
            penalty = params.repetition_penalty
            weakened = torch.where(logits > 0, logits / penalty, logits * penalty)
            logits.copy_(torch.where(seen, weakened, logits))
        logits.sub_(in_output, alpha=params.frequency_penalty)
        logits.sub_((in_output > 0).float(), alpha=params.presence_penalty)

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


def _gather_raw_logprobs(logits: Tensor, rows: Sequence[SampledRow]) -> list[_RowLogprobs | None]:
    return [
        None if r.params.logprobs is None else _RowLogprobs(logits[i], r.params.logprobs)
        for i, r in enumerate(rows)
    ]


def _add_bias(logits: Tensor, params: SamplingParams) -> None:
    bias = params.logit_bias
    logits[list(bias)] += torch.tensor(list(bias.values()), dtype=logits.dtype, device=logits.device)


def _mask(logits: Tensor, rows: Sequence[SampledRow]) -> None:
    """Take away what the rows' grammars do not allow."""
    masked = [i for i, row in enumerate(rows) if row.request.grammar is not None]
    if not masked:
        return
    wanted = []
    for _, own in groupby((rows[i] for i in masked), key=lambda row: row.request.request_id):
        *_, last = own  # the row behind all drafts
        assert last.request.grammar is not None
        wanted.append((last.request.grammar, last.draft_token_ids))
    vocab_size = logits.shape[1]
    masks = np.empty((len(masked), num_mask_words(vocab_size)), dtype=np.int32)
    fill_masks(wanted, masks)
    bias = mask_bias(torch.from_numpy(masks).to(logits.device), vocab_size)
    if len(masked) == len(rows):
        logits += bias
    else:
        logits[masked] += bias


def _is_filtered(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0


def _sample_plain(logits: Tensor, rows: Sequence[SampledRow]) -> list[int]:
    scaled = logits / _column([r.params.temperature for r in rows], logits)
    weights = scaled.softmax(dim=-1)
    return _inverse_cdf(weights, rows)[:, 0].tolist()


def _sample_filtered(
    logits: Tensor, rows: Sequence[SampledRow], num_candidates: int = _NUM_CANDIDATES
) -> list[int]:
    """Keep the top k, of those the nucleus, of those what min-p allows (the order of transformers)."""
    params = [r.params for r in rows]
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
            return _sample_filtered(logits, rows, vocab_size)
    keep = (cumulative - probs < nucleus) & (probs >= floor)
    keep[:, 0] = True
    chosen = _inverse_cdf(probs * keep, rows)
    return ids.gather(1, chosen)[:, 0].tolist()


def _inverse_cdf(weights: Tensor, rows: Sequence[SampledRow]) -> Tensor:
    """Index [R, 1] drawn from each row of unnormalised weights [R, V] (float64 sums: V can be 256 k)."""
    cumulative = weights.cumsum(dim=-1, dtype=torch.float64)
    uniform = _column([_uniform(r.request.seed, r.position) for r in rows], cumulative)
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
