"""Which rows a GPU step's tokens get, and which checkpoints its kernels refuse: exact, without a GPU."""

import pytest
import torch

from engine import EngineConfig, ParameterError
from engine.checkpoint import open_checkpoint
from engine.cuda import CudaModelRunner, UnsupportedError
from engine.cuda import runner as runner_module
from engine.cuda.layout import Layout, lay_out, max_lanes
from engine.cuda.weights import load_weights
from engine.request import Request
from engine.sampling_params import SamplingParams
from engine.scheduler import ScheduledRequest
from tests.engine.helpers import save_random_llama
from tests.engine.packed_models import pack_checkpoint

CPU = torch.device("cpu")


def part(name: str, computed: int, scheduled: int, num_drafts: int = 0, **params: object) -> ScheduledRequest:
    """A chunk of a prompt of 40 tokens, or a decode behind it."""
    request = Request(name, list(range(40)), SamplingParams(**params), max_model_len=100)  # type: ignore[arg-type]
    request.all_token_ids += [7] * max(0, computed + 1 - 40)
    return ScheduledRequest(request, computed, scheduled + num_drafts, tuple(range(num_drafts)))


def names(layout: Layout) -> tuple[list[list[str]], list[str]]:
    lanes = [[p.request.request_id for p in lane] for lane in layout.lanes]
    return lanes, [p.request.request_id for p in layout.chunks]


def test_decodes_share_lanes_of_sixteen():
    layout = lay_out([part(f"r{i}", 50, 1) for i in range(18)])
    lanes, chunks = names(layout)
    assert (list(map(len, lanes)), chunks) == ([16, 2], [])
    assert layout.first_sampled_rows()["r17"] == 17


def test_a_request_and_its_drafts_stay_together():
    layout = lay_out([part("a", 50, 1, 7), part("b", 50, 1, 5), part("c", 50, 1, 7), part("d", 50, 1)])
    assert names(layout) == ([["a", "b"], ["c", "d"]], [])
    assert layout.first_sampled_rows() == {"a": 0, "b": 8, "c": 16, "d": 24}


@pytest.mark.parametrize(
    ("length", "expected"), [(15, ([["a", "b"]], [])), (16, ([["a"], ["b"]], [])), (17, ([["a"]], ["b"]))]
)
def test_chunks_of_few_tokens_go_through_the_decode_program(length, expected):
    assert names(lay_out([part("a", 50, 1), part("b", 0, length)])) == expected


def test_rows_of_chunks_come_behind_the_lanes():
    layout = lay_out([part("a", 50, 1), part("b", 0, 20), part("c", 0, 40), part("d", 16, 24)])
    assert names(layout) == ([["a"]], ["b", "c", "d"])
    assert layout.first_sampled_rows() == {"a": 0, "c": 16, "d": 17}  # b does not reach its prompt's end


def test_prompt_logprobs_need_the_residual_stream():
    assert names(lay_out([part("a", 3, 1, prompt_logprobs=1)])) == ([], ["a"])
    assert names(lay_out([part("a", 39, 1, prompt_logprobs=1)])) == ([["a"]], [])


@pytest.mark.parametrize("max_drafts", range(16))
def test_there_are_lanes_for_the_worst_step(max_drafts):
    decodes = [part(f"r{i}", 50, 1, max_drafts) for i in range(33)]
    layout = lay_out([*decodes, part("x", 0, 9), part("y", 0, 7)])
    assert len(layout.lanes) + -(-33 // 16) <= max_lanes(33, max_drafts)


@pytest.mark.parametrize(
    ("overrides", "packed", "message"),
    [
        ({"head_dim": 64}, False, "the embedding is torch.bfloat16"),
        ({"head_dim": 32}, True, "head_dim 32"),
        ({"head_dim": 64}, True, "the embedding is w6g96"),
    ],
    ids=["dense", "head-dim", "format"],
)
def test_what_the_kernels_cannot_run_is_refused(tmp_path, overrides, packed, message):
    save_random_llama(tmp_path, hidden_size=128, intermediate_size=128, **overrides)
    if packed:
        pack_checkpoint(tmp_path, lambda name: "w6g96")
    with pytest.raises(UnsupportedError, match=message):
        load_weights(open_checkpoint(tmp_path), 64, CPU)


def test_more_drafts_than_a_launch_verifies_are_refused(tmp_path, monkeypatch):
    save_random_llama(tmp_path)
    monkeypatch.setattr(runner_module, "_check_machine", lambda config, device: None)
    config = EngineConfig(model=str(tmp_path), device="cpu", speculative_tokens=16)
    with pytest.raises(ParameterError, match="at most 15"):
        CudaModelRunner(config, open_checkpoint(tmp_path))
