"""Claims beside floors, and the score."""

import pytest

from deploy.bench.article import score
from deploy.bench.article.claims import Claim, claims, stream_claim
from deploy.bench.article.floors import H100, H200
from deploy.bench.article.results import Results
from tests.deploy.article.rows import filled


def claim(value: float | None, floor: float | None, better="lower") -> Claim:
    return Claim("a system", "a figure", value, "s", better, floor, "why")


def test_a_claim_beyond_the_floor_cannot_be_met():
    assert claim(1.2, 2.4).can_be_met is False
    assert claim(1.2, 2.4).factor == pytest.approx(2.0)
    assert claim(1.2, 0.6).can_be_met is True
    assert claim(1200, 600, "higher").can_be_met is False
    assert claim(1200, 600, "higher").factor == pytest.approx(2.0)
    assert claim(600, 600, "higher").can_be_met is True


def test_without_a_figure_or_a_floor_nothing_is_said():
    assert claim(None, 1.0).can_be_met is None
    assert claim(1.0, None).factor is None


def test_every_row_of_the_article_stands_in_the_table():
    systems = " ".join(c.system for c in claims(H100))
    for name in (
        "DeepSeek V4",
        "GPT-4o",
        "Claude 3.5 Sonnet",
        "Llama 3 70B FP16",
        "Groq LPU",
        "Mistral Large 2",
    ):
        assert name in systems
    assert "Phi-3-medium" in systems


def test_which_claims_no_h100_can_meet():
    beyond = {c.what for c in claims(H100) if c.can_be_met is False}
    assert beyond == {
        "2,000 tokens of one stream, 180B at 2.125 bits",
        "2,000 tokens of one stream, 70B at 4 bits",
        "2,000 tokens of one stream, 8B at 4.25 bits",
    }
    large = stream_claim("180b", 2.125, H100)
    assert large.factor == pytest.approx(24.96, abs=0.05)
    assert "1,667 tokens/s" in large.why
    assert "allow 1.91 GB" in large.why


def test_an_h200_has_floors_of_its_own():
    faster, slower = (stream_claim("8b", 4.25, card) for card in (H200, H100))
    assert faster.floor is not None
    assert slower.floor is not None
    assert faster.floor / slower.floor == pytest.approx(3.18 / 4.6, rel=0.001)
    assert "at 4.60 TB/s allow 2.76 GB" in faster.why
    assert not [c.why for c in claims(H200) if "H100" in c.why]


def test_which_card_holds_70b_in_16_bits():
    why = {card.name: c.why for card in (H100, H200) for c in claims(card) if c.system == "Llama 3 70B FP16"}
    assert why["H100"] == "141 GB of weights, which no H100 holds; one card's rate over them"
    assert why["H200"] == "141 GB of weights; one card's rate over them"


def test_ours_stand_beside_the_claims_of_their_kind(tmp_path):
    ours = {c.what: c.ours(filled(tmp_path)) for c in claims(H100)}
    assert ours["first token of 512, 70B"] == "8.1 ms"
    assert ours["2,000 tokens of one stream, 70B at 4 bits"] == "25.20 s"
    assert ours["2,000 tokens of one stream, 180B at 2.125 bits"] == ""
    assert ours["kernel launches cut by"] == "99.4% (70B: 900 to 5)"


def test_a_row_of_other_bits_is_not_ours(tmp_path):
    results = Results(tmp_path / "article.json")
    results.add("3.8b-w2", "long", {"path": "http", "bits": 2.125, "output_tokens": 2000, "e2e_s": 1.1})
    assert stream_claim("3.8b", 3.25, H100).ours(results) == ""
    assert stream_claim("3.8b", 2.125, H100).ours(results) == "1.10 s"


def test_the_score_is_its_formula():
    found = score.score(ttft_ms=400, tok_s=1000, passed=9, asked=10, dollars_an_hour=3.6)
    assert found.latency == pytest.approx(0.5)
    assert found.dollars == pytest.approx(1.0)
    assert found.cost == pytest.approx(1.0)
    assert found.total == pytest.approx(100 * (0.4 * 0.5 + 0.4 * 1.0 + 0.2 * 0.9))
    assert score.score(1, 1e9, 1, 1, 1.0).total == pytest.approx(100)


def test_a_score_needs_its_figures(tmp_path):
    with pytest.raises(ValueError, match="above 0"):
        score.score(0, 1, 1, 1, 1)
    assert score.of_shape(Results(tmp_path / "none.json"), "8b", 3.0) is None
    of_shape = score.of_shape(filled(tmp_path), "8b", 3.0)
    assert of_shape is not None
    assert of_shape.ease == pytest.approx(0.5)
