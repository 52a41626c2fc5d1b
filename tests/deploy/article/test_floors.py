"""The floors' arithmetic, against sizes and rates that were measured on a card."""

import pytest

from deploy.bench.article import floors
from deploy.bench.article.floors import H100, H200
from deploy.bench.article.results import Results
from deploy.sizing import size_of
from engine.models.shapes import SHAPES
from tests.deploy.article.rows import MACHINE


@pytest.mark.parametrize(
    ("gpus", "card"),
    [
        (["NVIDIA H100 80GB HBM3"], H100),
        (["NVIDIA H200"], H200),
        (["NVIDIA H200", None], H200),
        (["NVIDIA H200", "NVIDIA H100 80GB HBM3"], H100),
        ([None], H100),
        ([], H100),
    ],
)
def test_the_card_is_that_of_the_runs_on_a_gpu(tmp_path, gpus, card):
    results = Results(tmp_path / "article.json")
    for shape, gpu in zip(("8b", "70b"), gpus, strict=False):
        named = {} if gpu is None else {"gpu": gpu}
        results.begin(shape, {"cpu": MACHINE["cpu"], "cores": MACHINE["cores"], **named})
    assert floors.card_of(results) is card


@pytest.mark.parametrize(
    ("shape", "parameters"),
    [
        ("3.8b", 3.82e9),
        ("8b", 8.03e9),
        ("14b", 13.96e9),
        ("70b", 70.6e9),
        ("123b", 122.6e9),
        ("180b", 178.9e9),
    ],
)
def test_parameters_are_those_of_the_models(shape, parameters):
    assert floors.parameters(SHAPES[shape]) == pytest.approx(parameters, rel=0.002)


@pytest.mark.parametrize(
    ("shape", "bits", "gb"), [("8b", 4.25, 4.12), ("70b", 4.0, 35.0), ("180b", 2.125, 47.67)]
)
def test_a_step_reads_what_the_card_read(shape, bits, gb):
    assert floors.step_bytes(SHAPES[shape], bits) / 1e9 == pytest.approx(gb, rel=0.003)


def test_a_step_reads_less_than_there_is():
    for shape in SHAPES.values():
        assert floors.step_bytes(shape, 4.25) < size_of(shape, 4.25).weight_bytes


def test_two_thousand_tokens_in_a_second_and_a_fifth():
    allowed = floors.readable_bytes(2000, 1.2, H100)
    assert allowed == pytest.approx(1.908e9)
    fit = floors.largest_shape(allowed)
    assert fit is not None
    assert (fit.shape, fit.bits) == ("3.8b", 3.25)
    assert fit.read_bytes <= allowed < floors.step_bytes(SHAPES["3.8b"], 4.125)
    assert floors.step_bytes(SHAPES["8b"], min(floors.WIDTHS)) > allowed
    assert floors.tokens_a_read(SHAPES["8b"], 4.25, allowed) == pytest.approx(2.16, abs=0.01)


def test_no_shape_reads_next_to_nothing():
    assert floors.largest_shape(1e6) is None


def test_a_batch_is_bound_by_bytes_first_and_by_products_then():
    shape = SHAPES["180b"]
    step_s = floors.decode_s(floors.step_bytes(shape, 2.125), H100)
    assert floors.batch_tok_s(shape, 2.125, 1, H100) == pytest.approx(1 / step_s)
    assert floors.batch_tok_s(shape, 2.125, 16, H100) == pytest.approx(16 / step_s)
    most = H100.bf16_flop_s / (2 * floors.step_parameters(shape))
    assert floors.batch_tok_s(shape, 2.125, 1024, H100) == pytest.approx(most)


def test_a_prompt_of_70b_in_bf16_is_past_the_claim_and_in_e4m3_is_not():
    assert floors.prompt_s(SHAPES["70b"], 512, H100.bf16_flop_s) > 0.087
    assert floors.prompt_s(SHAPES["70b"], 512, H100.fp8_flop_s) == pytest.approx(0.0555, abs=0.0005)
