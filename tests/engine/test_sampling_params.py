"""Every parameter's range, and the name in its error."""

import math
import pickle

import pytest

from engine import ParameterError, SamplingParams


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", math.nan),
        ("temperature", "1"),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("top_k", 1.5),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.inf),
        ("presence_penalty", 2.5),
        ("frequency_penalty", -2.5),
        ("seed", 1.0),
        ("seed", 2**63),
        ("stop", ("",)),
        ("stop", ("x",) * 17),
        ("stop_token_ids", (-1,)),
        ("max_tokens", 0),
        ("max_tokens", True),
        ("n", 0),
        ("n", 65),
        ("logprobs", -1),
        ("logprobs", 21),
        ("prompt_logprobs", 21),
        ("logit_bias", {-1: 0.0}),
        ("logit_bias", {1: 101.0}),
    ],
)
def test_out_of_range_names_the_field(field, value):
    with pytest.raises(ParameterError) as error:
        SamplingParams(**{field: value})
    assert error.value.field == field


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 0},
        {"temperature": 2.0, "top_p": 1.0, "min_p": 1.0},
        {"seed": -(2**63)},
        {"logit_bias": {0: -100.0, 5: 100.0}, "logprobs": 0, "n": 64},
    ],
)
def test_limits_are_allowed_and_survive_the_way_to_another_process(values):
    params = SamplingParams(**values)
    assert pickle.loads(pickle.dumps(params)) == params


def test_too_many_biases_are_refused() -> None:
    with pytest.raises(ParameterError, match="logit_bias"):
        SamplingParams(logit_bias=dict.fromkeys(range(301), 1.0))
