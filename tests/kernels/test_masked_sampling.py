"""Sampling by masks: the kernels (interpreted without a GPU) and their reference."""

import pytest
import torch

from kernels.sampling import Mode, RowParams, SamplingBatch, mask_bias, num_mask_words, sample
from tests.kernels.test_sampling import BACKENDS, DEVICE, both, device, make_batch, random_logits

ROWS = [
    RowParams(temperature=0.0),
    RowParams(),
    RowParams(temperature=0.3),
    RowParams(top_k=7, top_p=0.9),
    RowParams(temperature=1.5, min_p=0.1),
    RowParams(top_k=400, top_p=0.999),
]


def random_allowed(rows: int, vocab: int, share: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(vocab)
    is_allowed = torch.rand(rows, vocab, generator=generator) < share
    is_allowed[torch.arange(rows), torch.randint(vocab, (rows,), generator=generator)] = True
    return is_allowed.to(DEVICE)


def masks_of(is_allowed: torch.Tensor) -> torch.Tensor:
    """int32 [R, words] of bool [R, V], with garbage in the bits behind the vocabulary."""
    rows, vocab = is_allowed.shape
    bits = torch.ones(rows, 32 * num_mask_words(vocab), dtype=torch.int64, device=is_allowed.device)
    bits[:, :vocab] = is_allowed.long()
    words = (bits.view(rows, -1, 32) << torch.arange(32, device=bits.device)).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def masked_batch(rows: list[RowParams], is_allowed: torch.Tensor, bound: list[int]) -> SamplingBatch:
    batch = make_batch(rows, vocab=is_allowed.shape[1]).with_masks(is_allowed.shape[1])
    assert batch.masks is not None
    assert batch.is_masked is not None
    batch.masks[: len(rows)] = masks_of(is_allowed)
    batch.is_masked[bound] = 1
    return batch


@pytest.mark.parametrize("vocab", [1, 31, 32, 33, 5003])
def test_bits_are_tokens(vocab):
    is_allowed = random_allowed(3, vocab, 0.4)
    assert torch.equal(mask_bias(masks_of(is_allowed), vocab) == 0, is_allowed)


@both
@pytest.mark.parametrize(("vocab", "share"), [(33, 0.5), (2048, 0.01), (2100, 0.0)])
@pytest.mark.parametrize("mode", Mode)
def test_a_bound_row_chooses_as_if_the_others_were_impossible(backend, vocab, share, mode):
    rows = [r for r in ROWS if r.mode <= mode]
    rows += [RowParams(0.0, repetition_penalty=1.5, logit_bias={3: 100.0, 5: -100.0})]
    logits, is_allowed = random_logits(len(rows), vocab), random_allowed(len(rows), vocab, share)
    bound = [i for i in range(len(rows)) if i % 3]
    batch = masked_batch(rows, is_allowed, bound)
    draw = BACKENDS[backend]
    got = draw(logits.clone(), batch, mode=mode, num_logprobs=1, has_masks=True)
    free = ~torch.isin(torch.arange(len(rows), device=DEVICE), torch.tensor(bound, device=DEVICE))
    impossible = torch.where(is_allowed | free.unsqueeze(1), logits, float("-inf"))
    expected = draw(impossible, make_batch(rows, vocab=vocab), mode=mode)
    assert got.token_ids.tolist() == expected.token_ids.tolist()
    assert all(is_allowed[i, got.token_ids[i]] for i in bound)
    own = logits.log_softmax(-1)
    assert got.logprobs is not None
    torch.testing.assert_close(got.logprobs, own.gather(1, got.token_ids.long().unsqueeze(1))[:, 0])
    without = draw(logits.clone(), batch, mode=mode)
    assert (
        without.token_ids.tolist()
        == draw(logits, make_batch(rows, vocab=vocab), mode=mode).token_ids.tolist()
    )


@both
@pytest.mark.parametrize("mode", Mode)
def test_a_row_that_may_choose_nothing_chooses_some_token(backend, mode):
    rows = [r for r in ROWS if r.mode <= mode]
    batch = masked_batch(
        rows, torch.zeros(len(rows), 2100, dtype=torch.bool, device=DEVICE), list(range(len(rows)))
    )
    got = BACKENDS[backend](random_logits(len(rows), 2100), batch, mode=mode, has_masks=True)
    assert all(0 <= token < 2100 for token in got.token_ids.tolist())


def test_masks_of_another_vocabulary_are_refused():
    batch = make_batch([RowParams()])
    logits = random_logits(1, 100)
    with pytest.raises(ValueError, match="no masks"):
        sample(logits, batch, has_masks=True)
    with pytest.raises(ValueError, match="no masks"):
        sample(logits, batch.with_masks(200), has_masks=True)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("mode", Mode)
def test_a_cuda_graph_reads_the_masks_of_each_replay(mode):
    vocab = 128_256
    rows = [r for r in ROWS if r.mode <= mode]
    bound = list(range(0, len(rows), 2))
    logits, is_allowed = random_logits(len(rows), vocab), random_allowed(len(rows), vocab, 0.001)
    graphed, plain = (masked_batch(rows, is_allowed, bound) for _ in range(2))
    device.sample(logits, masked_batch(rows, is_allowed, bound), mode=mode, advance=True, has_masks=True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = device.sample(logits, graphed, mode=mode, advance=True, has_masks=True)
    for step in range(5):
        logits.copy_(random_logits(len(rows), vocab, seed=step))
        is_allowed = random_allowed(len(rows), vocab, 0.001 * step)
        for batch in (graphed, plain):
            batch.masks[: len(rows)] = masks_of(is_allowed)
        graph.replay()
        expected = device.sample(logits, plain, mode=mode, advance=True, has_masks=True)
        assert torch.equal(out.token_ids, expected.token_ids)
        assert all(is_allowed[i, out.token_ids[i]] for i in bound)
