"""Running streams beside arriving prompts, on a small random model: what is counted, not how long it took."""

import math

import pytest

from deploy.bench.mixed import Driver, Load, measure
from engine.core import EngineCore
from tests.engine.helpers import make_core, save_random_llama

LOAD = Load(streams=3, stream_prompt=5, stream_output=20, rate=20.0, prompt=40, output=3, seconds=0.5)


@pytest.fixture
def core(tmp_path) -> EngineCore:
    save_random_llama(tmp_path)
    return make_core(tmp_path, max_num_seqs=16, max_model_len=128, enable_prefix_caching=False)


def test_arrivals_repeat_and_keep_their_rate():
    load = Load(rate=5.0, seconds=200.0)
    due = list(load.arrivals())
    assert due == list(load.arrivals())
    assert due == sorted(due)
    assert len(due) == pytest.approx(1000, rel=0.1)
    assert list(Load(rate=5.0, seconds=200.0, seed=1).arrivals()) != due


def test_every_arrival_gets_its_first_token_and_every_stream_goes_on(core):
    driver = Driver(core, LOAD)
    outcome = driver.run()
    assert len(outcome.ttft) == len(list(LOAD.arrivals()))
    assert min(outcome.ttft) > 0
    assert min(outcome.gaps) >= 0
    assert driver._count > LOAD.streams + len(outcome.ttft)  # streams that ended were replaced
    assert outcome.num_tokens > len(outcome.gaps) > 0
    assert not core.has_work
    assert core.stats().num_free_blocks == core.stats().num_blocks


def test_a_row_for_each_target(core):
    rows = list(measure(core, LOAD, [None, math.inf, 0.05]))
    assert [r["step_target_ms"] for r in rows] == ["none", "none", "50"]
    assert rows[0].keys() == rows[2].keys()
    assert rows[0]["num_prompts"] == len(list(LOAD.arrivals()))
    assert rows[0]["itl_ms_p50"] <= rows[0]["itl_ms_p99"] <= rows[0]["itl_ms_max"]
