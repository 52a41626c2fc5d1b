"""Quality figures: exact small cases, generators without a give-away, suites on random models."""

import collections
import re

import numpy as np
import pytest
import torch

from engine.checkpoint import open_checkpoint
from engine.errors import QualityError
from engine.quality import bias, multi_hop, suites
from engine.quality.divergence import compare, divergence
from engine.quality.scoring import bootstrap, continuation_logprobs, row
from tests.engine.helpers import save_random_llama
from tests.engine.test_quantization import TEXT, small_model


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two random models of one vocabulary, with tokenizers."""
    return [
        open_checkpoint(small_model(tmp_path_factory.mktemp(f"m{seed}"), seed=seed, num_hidden_layers=2))
        for seed in (0, 1)
    ]


def test_divergence_of_known_distributions():
    """Two tokens, hand-made logits: KL, likelihood and agreement by hand."""
    x = torch.ones(1, 3, 1)
    p, q = torch.tensor([[np.log(3.0)], [0.0]]).float(), torch.tensor([[0.0], [0.0]])
    d = compare(x, q, x, p, torch.tensor([[0, 0, 1]]))
    expected = 0.75 * np.log(0.75 / 0.5) + 0.25 * np.log(0.25 / 0.5)
    torch.testing.assert_close(d.kl, torch.full((1, 2), expected, dtype=torch.float32))
    torch.testing.assert_close(d.nll, torch.full((1, 2), float(np.log(2))))
    torch.testing.assert_close(d.reference_nll, -torch.tensor([[0.75, 0.25]]).log())


def test_a_model_does_not_diverge_from_itself(models):
    tokens = torch.randint(0, 199, (3, 40), generator=torch.Generator().manual_seed(0))
    d = divergence(models[0], models[0], tokens)
    assert float(d.kl.abs().max()) < 1e-5
    assert bool(d.agrees.all())
    assert float(divergence(models[0], models[1], tokens).kl.mean()) > 0.1


def test_continuations_score_as_in_transformers(tmp_path):
    """Continuations of one prompt in one sequence, against a pass of its own for each."""
    reference = save_random_llama(tmp_path)
    long = list(range(10, 40))
    pairs = [([1, 2, 3], [4]), ([5], [6, 7, 8, 9]), (long, [50, 51]), (long, [50, 52, 53]), (long, [7])]
    got = continuation_logprobs(open_checkpoint(tmp_path), pairs)
    for score, (prompt, continuation) in zip(got, pairs, strict=True):
        with torch.inference_mode():
            log_p = reference(torch.tensor([prompt + continuation])).logits[0].log_softmax(-1)
        expected = sum(float(log_p[len(prompt) - 1 + i, t]) for i, t in enumerate(continuation))
        assert score == pytest.approx(expected, abs=1e-3)


def test_bootstrap_holds_the_mean_and_shrinks():
    rng = np.random.default_rng(1)
    widths = []
    for n in (20, 2000):
        values = rng.normal(3.0, 1.0, n)
        low, high = bootstrap(values)
        assert low < values.mean() < high
        widths.append(high - low)
    assert widths[1] < widths[0] / 5
    same = row("s", "m", [1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    assert (same.difference, same.ci_low, same.ci_high, same.n) == (0.0, 0.0, 0.0, 3)


@pytest.mark.parametrize("hops", multi_hop.HOPS)
def test_multi_hop_answers_follow_from_the_story_alone(hops):
    asked = multi_hop.questions(60, hops)
    assert asked == multi_hop.questions(60, hops)
    for q in asked:
        story = q.prompt.split("\n\n")[-1]
        places = dict(re.findall(r"The ([^.]+?) is in the ([^.]+?)\.", story))
        at = re.search(r"is the (\w+)\?", story)[1]
        for _ in range(hops):
            at = places[at]
        assert q.choices[q.answer] == f" {at}"
        assert len(set(q.choices)) == 4
        assert all(choice.strip() in places.values() for choice in q.choices)
    by_place = collections.Counter(q.answer for q in asked)
    assert max(by_place.values()) < 30  # where the right answer stands carries no signal


def test_bias_pairs_differ_in_the_pronoun_alone():
    pairs = bias.minimal_pairs()
    assert collections.Counter(p.majority for p in pairs) == {"men": 80, "women": 80}
    for p in pairs:
        usual, other = p.stereotypical.split(), p.contrary.split()
        assert {usual[0], other[0]} == {"he", "she"}
        assert usual[1:] == other[1:]
        assert (usual[0] == "he") == (p.majority == "men")
        assert "{" not in p.prompt + p.stereotypical
    assert "The nurse went home early because" in {p.prompt for p in pairs}


@pytest.mark.parametrize("name", ["divergence", "multi-hop", "bias"])
def test_suites_give_figures_beside_the_references(models, name, monkeypatch):
    monkeypatch.setattr(suites, "_WINDOW", 48)
    alone = suites.run(name, models[0], None, documents=TEXT, size=6)
    beside = suites.run(name, models[0], models[0], documents=TEXT, size=6)
    other = suites.run(name, models[0], models[1], documents=TEXT, size=6)
    assert all(r.reference is None and r.ci_low <= r.value <= r.ci_high for r in alone)
    assert all(r.difference == pytest.approx(0, abs=1e-6) for r in beside)
    if name == "divergence":  # to a tokenizer of 199 words the probes are all the same unknown word
        assert any(abs(r.difference) > 1e-3 for r in other)
    assert [r.metric for r in beside] == [r.metric for r in other]


def test_the_references_scores_are_kept_between_models(models):
    known: dict[str, np.ndarray] = {}
    first = suites.run("bias", models[0], models[1], documents=TEXT, known=known)
    known["bias"] = known["bias"] + 1.0  # seen by the next model: the reference is not computed again
    second = suites.run("bias", models[0], models[1], documents=TEXT, known=known)
    assert set(known) == {"bias"}
    assert [r.value for r in first] == [r.value for r in second]


def test_models_of_different_vocabularies_are_not_compared(models, tmp_path):
    other = small_model(tmp_path)
    text = (other / "tokenizer.json").read_text().replace('"w7"', '"w700"')
    (other / "tokenizer.json").write_text(text)
    with pytest.raises(QualityError, match="tokenizer is not the model's"):
        suites.run("bias", models[0], open_checkpoint(other), documents=TEXT)
