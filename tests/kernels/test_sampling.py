"""Sampling kernels (interpreted without a GPU) and their reference against the engine's Sampler."""

import dataclasses
import itertools
import os
import random

import pytest
import torch

from engine import sampler as engine_sampler
from engine.request import Request
from engine.sampler import SampledRow
from engine.sampling_params import SamplingParams
from kernels.sampling import Mode, RowParams, Sampled, SamplingBatch, reference, sample

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytest.importorskip("triton", reason="triton is not installed")
if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no GPU, and Triton's interpreter is not chosen", allow_module_level=True)
from kernels.sampling import device  # noqa: E402

BACKENDS = {"triton": device.sample, "reference": reference.sample}
both = pytest.mark.parametrize("backend", BACKENDS)
PLAIN = [RowParams(temperature=t) for t in (0.0, 1.0, 0.3, 2.0, 1e-6)]
FILTERED = [
    RowParams(top_k=1),
    RowParams(top_k=7),
    RowParams(temperature=0.5, top_k=10**9),
    RowParams(top_p=0.9),
    RowParams(top_p=1e-9),
    RowParams(temperature=2.0, top_p=0.999),
    RowParams(min_p=0.1),
    RowParams(min_p=1.0),
    RowParams(top_k=20, top_p=0.7),
    RowParams(temperature=1.5, top_k=400, top_p=0.95, min_p=0.01),
    RowParams(top_k=3, top_p=0.999999),
    RowParams(temperature=0.0, top_k=5, top_p=0.5),
]


def make_batch(
    rows: list[RowParams], seeds: list[int] | None = None, positions: list[int] | None = None, vocab: int = 0
) -> SamplingBatch:
    """With some rows to spare, as a CUDA graph's bucket has them."""
    batch = SamplingBatch.allocate(len(rows) + 2, DEVICE)
    if any(r.has_penalties for r in rows):
        batch = batch.with_penalties(vocab)
    if any(r.logit_bias for r in rows):
        batch = batch.with_bias()
    for i, row in enumerate(rows):
        batch.set_row(i, row, seeds[i] if seeds else i, positions[i] if positions else 0)
    return batch


def random_logits(rows: int, vocab: int, scale: float = 3.0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, vocab, generator=generator) * scale).to(DEVICE)


def request_of(row: RowParams, seed: int, prompt: list[int] = [0], output: list[int] = []) -> Request:  # noqa: B006
    fields = {f.name: getattr(row, f.name) for f in dataclasses.fields(row)}
    request = Request("r", prompt, SamplingParams(**fields, seed=seed), max_model_len=1 << 20)
    request.all_token_ids += output
    return request


def engine_weights(logits: torch.Tensor, row: RowParams) -> torch.Tensor:
    """The distribution the engine's Sampler draws one row [V] from, float64 [V], unnormalised."""
    seen = {}
    original = engine_sampler._inverse_cdf

    def spy(weights, requests):
        seen["weights"] = weights.clone()
        return original(weights, requests)

    patch = pytest.MonkeyPatch()
    patch.setattr(engine_sampler, "_inverse_cdf", spy)
    try:
        engine_sampler.Sampler(len(logits), torch.device(DEVICE)).sample(
            logits.clone().unsqueeze(0), [SampledRow(request_of(row, 0))]
        )
    finally:
        patch.undo()
    weights = seen["weights"][0].double()
    if row.mode is Mode.PLAIN:
        return weights
    ids = (logits / row.temperature).topk(len(weights)).indices
    return torch.zeros(len(logits), dtype=torch.float64, device=DEVICE).scatter_(0, ids, weights)


def test_the_uniform_number_is_the_engines_to_the_bit():
    cases = [
        (0, 0),
        (1, 2),
        (-1, 3),
        (2**63 - 1, 10**6),
        (-(2**63), 5),
        (2**64 - 1, 7),
        (12345678901234567, 2**31),
    ]
    seeds, positions = zip(*cases, strict=True)
    batch = make_batch([RowParams()] * len(cases), list(seeds), list(positions))
    got = reference._uniform(batch.seed, batch.position)[: len(cases)]
    assert got.tolist() == [engine_sampler._uniform(s, p) for s, p in cases]
    # Of 2^17 equal tokens the one that is drawn tells the number's first 17 bits.
    logits = torch.zeros(len(cases), 1 << 17, device=DEVICE)
    expected = [int(u * (1 << 17)) for u in got.tolist()]
    for draw in BACKENDS.values():
        assert draw(logits, batch, mode=Mode.PLAIN).token_ids.tolist() == expected


@both
@pytest.mark.parametrize("vocab", [3, 1000, 2048, 5003])
@pytest.mark.parametrize("mode", [Mode.PLAIN, Mode.FILTERED])
def test_temperature_alone_draws_the_engines_token(backend, vocab, mode):
    rows = PLAIN * 4
    seeds, positions = (
        [random.Random(7).getrandbits(62) + i for i in range(len(rows))],
        list(range(len(rows))),
    )
    logits = random_logits(len(rows), vocab)
    batch = make_batch(rows, seeds, positions)
    got = BACKENDS[backend](logits, batch, mode=mode).token_ids.tolist()
    requests = [request_of(r, s, output=[1] * p) for r, s, p in zip(rows, seeds, positions, strict=True)]
    chosen = engine_sampler.Sampler(vocab, torch.device(DEVICE)).sample(
        logits.clone(), [SampledRow(r) for r in requests]
    )
    assert got == [c.token_id for c in chosen]


@both
@pytest.mark.parametrize(("vocab", "scale"), [(300, 1.0), (2500, 3.0), (2048, 0.05)])
def test_filters_keep_what_the_engine_keeps(backend, vocab, scale):
    """The engine draws in order of likelihood, the kernels in that of ids: other draws, same distribution.

    The token drawn for a number is compared with the inverse distribution function of the engine's weights.
    """
    logits = random_logits(len(FILTERED), vocab, scale, seed=vocab)
    batch = make_batch(FILTERED)
    for trial in range(2):
        seeds = [trial * 100 + i for i in range(len(FILTERED))]
        for i, row in enumerate(FILTERED):
            batch.set_row(i, row, seeds[i], position=trial)
        got = BACKENDS[backend](logits, batch).token_ids.tolist()
        for i, row in enumerate(FILTERED):
            if row.temperature == 0:
                assert got[i] == int(logits[i].argmax())
                continue
            cumulative = engine_weights(logits[i], row).cumsum(0)
            target = engine_sampler._uniform(seeds[i], trial) * cumulative[-1:]
            assert got[i] == int(torch.searchsorted(cumulative, target, right=True)), row


@both
def test_the_kept_set_is_the_engines(backend):
    """Every token of a small vocabulary is drawn when the numbers cover [0, 1) finely, and no other."""
    # The interpreter is too slow for many draws; it was compared draw by draw above.
    is_slow = DEVICE == "cpu" and backend == "triton"
    num_draws, vocab = 6 if is_slow else 400, 40
    logits = random_logits(1, vocab, 2.0, seed=3)
    for row in FILTERED[8:11] if is_slow else FILTERED[:-1]:
        weights = engine_weights(logits[0], row)
        weights = weights / weights.sum()
        batch = make_batch([row] * num_draws)
        got = BACKENDS[backend](logits.expand(num_draws, -1).contiguous(), batch).token_ids.long()
        counts = torch.bincount(got, minlength=vocab).cpu()
        expected = (weights * num_draws).cpu()
        assert not counts[expected == 0].any()
        assert counts[expected > 12].all()
        is_counted = expected > 5
        deviation = (counts - expected)[is_counted].square() / expected[is_counted]
        freedom = int(is_counted.sum())
        assert float(deviation.sum()) < freedom + 5 * (2 * freedom) ** 0.5 + 5


@both
def test_greedy_takes_the_lowest_of_equal_ids(backend):
    logits = torch.zeros(5, 6000, device=DEVICE)
    logits[1, 5999] = logits[1, 2047] = logits[1, 2048] = 3.0
    logits[2] = float("-inf")
    logits[3] = float("-inf")
    logits[3, 4100] = -5.0
    logits[4, 1:] = -0.0
    batch = make_batch([RowParams(temperature=0.0)] * 5)
    for mode in Mode:
        assert BACKENDS[backend](logits, batch, mode=mode).token_ids.tolist() == [0, 2047, 0, 4100, 0]


@both
def test_extremes_choose_the_best_or_a_tied_one(backend):
    vocab = 2300
    logits = random_logits(8, vocab)
    rows = [
        RowParams(temperature=1e-30),
        RowParams(top_k=1),
        RowParams(top_p=1e-30),
        RowParams(min_p=1.0),
        RowParams(temperature=1e-3, top_k=40, top_p=0.9, min_p=0.5),
        RowParams(temperature=2.0, top_k=1, top_p=1e-3, min_p=1.0),
        RowParams(top_k=5),
        RowParams(top_p=0.5),
    ]
    logits[:, 2200] = 50.0
    logits[6:] = float("-inf")
    logits[6:, 17] = 1.0
    batch = make_batch(rows)
    assert BACKENDS[backend](logits, batch).token_ids.tolist() == [2200] * 6 + [17] * 2
    logits[:, 100] = logits.amax(dim=-1)  # two tied best tokens, both kept by every cut
    drawn = set()
    for position in range(6):
        batch.position.fill_(position)
        drawn |= set(enumerate(BACKENDS[backend](logits, batch).token_ids.tolist()))
    assert drawn == set(itertools.product(range(6), (100, 2200))) | set(itertools.product((6, 7), (17, 100)))


@both
def test_equal_logits_are_all_kept(backend):
    rows = [RowParams(top_k=3), RowParams(top_p=0.1), RowParams(min_p=1.0), RowParams()]
    batch = make_batch(rows, seeds=[4] * 4)
    for value in (0.0, -7.25, 1e30, float("-inf")):
        logits = torch.full((4, 2500), value, device=DEVICE)
        got = BACKENDS[backend](logits, batch).token_ids.tolist()
        assert got == [int(engine_sampler._uniform(4, 0) * 2500)] * 4


@both
def test_impossible_and_damaged_logits_give_valid_ids(backend):
    logits = random_logits(4, 3000)
    logits[0, 1000:] = float("-inf")
    logits[1] = float("inf")
    logits[2, 5] = float("inf")
    logits[3] = float("nan")
    batch = make_batch([RowParams(), RowParams(top_p=0.9), RowParams(top_k=3), RowParams(top_k=2, top_p=0.5)])
    got = BACKENDS[backend](logits, batch).token_ids
    assert ((got >= 0) & (got < 3000)).all()
    assert got[0] < 1000
    assert got[2] == 5


@both
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_penalties_and_bias(backend, temperature):
    vocab, generator = 2300, random.Random(1)
    rows = [
        RowParams(temperature, repetition_penalty=1.7),
        RowParams(temperature, presence_penalty=1.5),
        RowParams(temperature, frequency_penalty=-0.7),
        RowParams(temperature, logit_bias={5: 100.0, 2299: -100.0, 0: 3.5}),
        RowParams(temperature),
        RowParams(
            temperature, 0, 1.0, 0.0, 0.5, -1.0, 0.3, {i: generator.uniform(-5, 5) for i in range(300)}
        ),
    ]
    prompts = [[generator.randrange(vocab) for _ in range(50)] for _ in rows]
    outputs = [[generator.randrange(20) for _ in range(30)] for _ in rows]
    batch = make_batch(rows, positions=[30] * len(rows), vocab=vocab)
    for i in range(len(rows)):
        batch.set_tokens(i, *(torch.tensor(t[i], device=DEVICE) for t in (prompts, outputs)))
    logits = random_logits(len(rows), vocab)
    raw = logits.clone()
    sampler = engine_sampler.Sampler(vocab, torch.device(DEVICE))
    for step in range(3):
        requests = [
            request_of(r, i, p, o) for i, (r, p, o) in enumerate(zip(rows, prompts, outputs, strict=True))
        ]
        for i, request in enumerate(requests):
            request.request_id = str(i)
        expected = [s.token_id for s in sampler.sample(logits.clone(), [SampledRow(r) for r in requests])]
        got = BACKENDS[backend](logits, batch, num_logprobs=0, advance=True)
        assert got.token_ids.tolist() == expected
        assert torch.equal(logits, raw)
        own = raw.log_softmax(-1).gather(1, got.token_ids.long().unsqueeze(1))[:, 0]
        torch.testing.assert_close(got.logprobs, own, rtol=1e-5, atol=1e-5)
        outputs = [[*o, t] for o, t in zip(outputs, expected, strict=True)]
        assert batch.position[: len(rows)].tolist() == [31 + step] * len(rows)
        assert [int(batch.output_counts[i].sum()) for i in range(len(rows))] == [31 + step] * len(rows)


@both
@pytest.mark.parametrize("vocab", [21, 5003])
def test_logprobs_are_the_models_own(backend, vocab):
    logits = random_logits(3, vocab)
    logits[1, :15] = logits[1].amax()  # equals: lower ids first
    logits[2, 2:] = float("-inf")
    batch = make_batch([RowParams(temperature=0.0), RowParams(), RowParams(top_k=2)])
    expected = logits.log_softmax(dim=-1)
    for num in (1, 20):
        got = BACKENDS[backend](logits, batch, num_logprobs=num)
        values, _ = expected.topk(num, dim=-1)
        torch.testing.assert_close(got.top_logprobs, values, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            got.top_logprobs, expected.gather(1, got.top_ids.long()), rtol=1e-5, atol=1e-5
        )
        own = expected.gather(1, got.token_ids.long().unsqueeze(1))[:, 0]
        torch.testing.assert_close(got.logprobs, own, rtol=1e-5, atol=1e-5)
        assert got.top_ids[1].tolist()[:15] == list(range(15))[:num]
        assert all(len(set(ids)) == num for ids in got.top_ids.tolist())
    none = BACKENDS[backend](logits, batch)
    assert none.logprobs is none.top_ids is none.top_logprobs is None


def test_a_row_does_not_depend_on_its_batch():
    vocab, rows = 2100, PLAIN[:2] + FILTERED
    logits = random_logits(len(rows), vocab)
    together: Sampled = device.sample(logits, make_batch(rows), num_logprobs=3)
    for i in range(len(rows)):
        alone = device.sample(logits[i : i + 1].clone(), make_batch([rows[i]], seeds=[i]), num_logprobs=3)
        for name in ("token_ids", "logprobs", "top_ids", "top_logprobs"):
            assert torch.equal(getattr(alone, name)[0], getattr(together, name)[i]), (i, name)


def test_a_large_vocabulary():
    vocab = (1 << 18) - 5 if DEVICE == "cuda" else 30_003
    rows = [RowParams(top_p=0.95), RowParams(temperature=0.7, top_k=1000, top_p=0.99)]
    logits = random_logits(len(rows), vocab, 2.5)
    batch = make_batch(rows, seeds=[11, 12])
    assert torch.equal(device.sample(logits, batch).token_ids, reference.sample(logits, batch).token_ids)


def test_wrong_arguments_are_refused():
    batch = make_batch([RowParams()])
    with pytest.raises(ValueError, match="limit 3 x"):
        sample(torch.zeros(4, 10, device=DEVICE), batch)
    with pytest.raises(ValueError, match="contiguous float32"):
        device.sample(torch.zeros(10, 2, device=DEVICE).T, batch)
    with pytest.raises(ValueError, match="num_logprobs"):
        device.sample(torch.zeros(2, 10, device=DEVICE), batch, num_logprobs=11)
    with pytest.raises(ValueError, match="with_penalties"):
        batch.set_row(0, RowParams(presence_penalty=1.0), 0)
    with pytest.raises(ValueError, match="with_bias"):
        batch.set_row(0, RowParams(logit_bias={1: 1.0}), 0)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("mode", Mode)
def test_a_cuda_graph_samples_the_same_and_advances(mode):
    vocab = 128_256
    rows = [r for r in PLAIN + FILTERED if r.mode <= mode]
    rows = [*rows, dataclasses.replace(rows[0], frequency_penalty=1.0, logit_bias={3: 9.0})]
    logits = random_logits(len(rows), vocab)
    graphed, plain = (make_batch(rows, vocab=vocab) for _ in range(2))
    device.sample(logits, make_batch(rows, vocab=vocab), num_logprobs=5, mode=mode, advance=True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = device.sample(logits, graphed, num_logprobs=5, mode=mode, advance=True)
    for step in range(5):
        logits.copy_(random_logits(len(rows), vocab, seed=step))
        graph.replay()
        expected = device.sample(logits, plain, num_logprobs=5, mode=mode, advance=True)
        assert torch.equal(out.token_ids, expected.token_ids)
        assert torch.equal(out.top_ids, expected.top_ids)
        assert torch.equal(out.logprobs, expected.logprobs)
    assert torch.equal(graphed.position, plain.position)
    assert torch.equal(graphed.output_counts, plain.output_counts)
