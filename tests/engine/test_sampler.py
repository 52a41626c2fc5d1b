"""Sampler: filters against their definitions, seeds, independence of the batch."""

import math
from collections import Counter

import pytest
import torch

from engine.request import Request
from engine.sampler import SampledRow, Sampler, position_logprobs
from engine.sampling_params import SamplingParams

VOCAB = 50


def request_with(prompt=(1, 2, 3), output=(), request_id="r", **params) -> Request:
    request = Request(request_id, prompt, SamplingParams(**params), max_model_len=10_000)
    request.all_token_ids.extend(output)
    return request


def sample_one(logits: torch.Tensor, **params) -> int:
    sampler = Sampler(len(logits), torch.device("cpu"))
    return sampler.sample(logits.clone().unsqueeze(0), [SampledRow(request_with(**params))])[0].token_id


def histogram(logits: torch.Tensor, num: int = 4000, **params) -> Counter:
    sampler = Sampler(len(logits), torch.device("cpu"))
    rows = logits.expand(num, -1).clone()
    requests = [SampledRow(request_with(request_id=f"r{i}", seed=i, **params)) for i in range(num)]
    return Counter(token.token_id for token in sampler.sample(rows, requests))


def close_to(counts: Counter, probs: torch.Tensor) -> bool:
    """Chi-square of the counts against probs, over the entries that can occur."""
    num = sum(counts.values())
    expected = {i: p * num for i, p in enumerate(probs.tolist()) if p > 0}
    assert set(counts) <= set(expected)
    chi2 = sum((counts[i] - e) ** 2 / e for i, e in expected.items())
    dof = max(1, len(expected) - 1)
    return chi2 < dof + 5 * math.sqrt(2 * dof)


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(0)) * 2


def test_greedy_takes_the_largest(logits):
    assert sample_one(logits, temperature=0.0) == int(logits.argmax())


def test_plain_sampling_follows_the_distribution(logits):
    assert close_to(histogram(logits, temperature=0.7), (logits / 0.7).softmax(0))


@pytest.mark.parametrize(
    "params", [{"top_k": 5}, {"top_p": 0.6}, {"min_p": 0.2}, {"top_k": 8, "top_p": 0.7, "min_p": 0.1}]
)
def test_filters_follow_their_definitions(logits, params):
    probs = logits.softmax(0)
    order = probs.argsort(descending=True)
    keep = torch.zeros(VOCAB, dtype=torch.bool)
    keep[order[: params.get("top_k", VOCAB)]] = True
    kept = torch.where(keep, probs, 0.0)
    kept = kept / kept.sum()
    mass = 0.0
    for token_id in order.tolist():
        if mass >= params.get("top_p", 1.0):
            kept[token_id] = 0.0
        mass += float(kept[token_id])
    kept[probs < params.get("min_p", 0.0) * probs.max()] = 0.0
    assert close_to(histogram(logits, **params), kept / kept.sum())


def test_a_nucleus_wider_than_the_candidates_is_not_cut():
    flat = torch.zeros(5000)
    counts = histogram(flat, num=3000, top_p=0.9)
    # Equal logits: 4,500 tokens make up the nucleus, and draws must reach beyond the first 1,024.
    assert len(counts) > 1800


def test_top_p_of_almost_nothing_is_greedy(logits):
    assert set(histogram(logits, num=50, top_p=1e-9)) == {int(logits.argmax())}


def test_a_seed_reproduces_whatever_runs_beside_it(logits):
    sampler = Sampler(VOCAB, torch.device("cpu"))
    alone = sampler.sample(logits.clone().unsqueeze(0), [SampledRow(request_with(seed=7))])[0].token_id
    others = [
        request_with(request_id="a", seed=1, top_k=3),
        request_with(request_id="b", temperature=0.0),
        request_with(request_id="r", seed=7),
        request_with(request_id="c", seed=7, presence_penalty=2.0, output=(int(logits.argmax()),)),
    ]
    together = sampler.sample(logits.expand(4, -1).clone(), [SampledRow(r) for r in others])
    assert together[2].token_id == alone


def test_positions_draw_different_numbers(logits):
    tokens = {sample_one(torch.zeros(VOCAB), seed=3, output=(1,) * n) for n in range(20)}
    assert len(tokens) > 8


def test_penalties_and_bias():
    logits = torch.tensor([2.0, 1.9, -1.0, 0.0])
    base = {"temperature": 0.0, "prompt": (3,)}
    assert sample_one(logits, **base) == 0
    assert sample_one(logits, **base, output=(0,), presence_penalty=0.2) == 1
    assert sample_one(logits, **base, output=(0, 0), frequency_penalty=0.06) == 1
    assert sample_one(logits, **base, output=(0,), frequency_penalty=0.06) == 0
    assert sample_one(logits, **{**base, "prompt": (0,)}, repetition_penalty=1.5) == 1
    assert sample_one(logits, **{**base, "prompt": (0,)}, presence_penalty=2.0) == 0  # output tokens only
    assert sample_one(logits, **base, logit_bias={2: 100.0}) == 2
    assert sample_one(logits, **base, logit_bias={0: -100.0}) == 1


def test_counts_follow_the_output():
    sampler = Sampler(4, torch.device("cpu"))
    request = request_with(temperature=0.0, frequency_penalty=1.0)
    logits = torch.tensor([2.5, 2.0, 1.2, 0.0])
    chosen = []
    for _ in range(5):
        token_id = sampler.sample(logits.clone().unsqueeze(0), [SampledRow(request)])[0].token_id
        request.all_token_ids.append(token_id)
        chosen.append(token_id)
    assert chosen == [0, 1, 0, 2, 1]


def test_logprobs_are_the_models_own(logits):
    sampler = Sampler(VOCAB, torch.device("cpu"))
    request = request_with(temperature=0.0, logprobs=3, logit_bias={4: 100.0})
    token = sampler.sample(logits.clone().unsqueeze(0), [SampledRow(request)])[0]
    expected = logits.log_softmax(0)
    assert token.token_id == 4
    own, *top = token.logprobs
    assert own == (4, pytest.approx(float(expected[4])))
    values, ids = expected.topk(3)
    assert [t for t, _ in top] == ids.tolist()
    assert [p for _, p in top] == pytest.approx(values.tolist())
    assert position_logprobs(logits.unsqueeze(0), [9], 0) == [((9, pytest.approx(float(expected[9]))),)]
