"""Prompts to be embedded, through the core: however they are chunked, their vectors are transformers'."""

import random
import time

import pytest
import torch

from engine import ParameterError, PoolingParams, SamplingParams
from engine.checkpoint import open_checkpoint
from engine.core import EngineCore
from engine.messages import AbortRequests, AddRequest, TokenOutput
from engine.models.build import build_model
from engine.models.llama import KVCache
from engine.request import Request, RequestStatus
from kernels.reference import rms_norm
from tests.engine.emulated_cuda import emulate
from tests.engine.helpers import greedy, make_core, run_all, save_random_llama
from tests.engine.packed_models import packed_llama
from tests.engine.test_scheduler import add, make_scheduler, plan
from tests.kernels.helpers import step

POOLINGS = ("mean", "last")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A directory with the model, and the model of transformers."""
    directory = tmp_path_factory.mktemp("llama")
    return directory, save_random_llama(directory)


def prompts(num: int, seed: int = 0) -> dict[str, list[int]]:
    rng = random.Random(seed)
    return {f"e{i}": [rng.randrange(2, 199) for _ in range(rng.randrange(1, 90))] for i in range(num)}


@torch.inference_mode()
def expected(model, token_ids: list[int], pooling: str) -> torch.Tensor:
    hidden = model.model(torch.tensor([token_ids])).last_hidden_state[0]
    vector = hidden.mean(dim=0) if pooling == "mean" else hidden[-1]
    return torch.nn.functional.normalize(vector, dim=0)


def embed_all(core: EngineCore, asked: dict[str, list[int]], pooling: str) -> dict[str, list[TokenOutput]]:
    params = PoolingParams(pooling)
    for request_id, prompt in asked.items():
        core.add_request(
            AddRequest(request_id, tuple(prompt), SamplingParams(), time.monotonic(), pooling=params)
        )
    return drain(core)


def drain(core: EngineCore) -> dict[str, list[TokenOutput]]:
    outputs: dict[str, list[TokenOutput]] = {}
    for _ in range(10_000):
        if not core.has_work:
            return outputs
        for output in core.step().outputs:
            outputs.setdefault(output.request_id, []).append(output)
    raise AssertionError("the core did not finish")


def check(outputs: dict[str, list[TokenOutput]], model, asked: dict[str, list[int]], pooling: str) -> None:
    assert set(outputs) == set(asked)
    for request_id, prompt in asked.items():
        [output] = outputs[request_id]
        assert (output.token_id, output.finish_reason) == (None, "stop")
        want = expected(model, prompt, pooling)
        torch.testing.assert_close(torch.tensor(output.embedding), want, atol=2e-5, rtol=0)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"token_budget": 7, "max_num_seqs": 4},
        {"num_blocks": 12, "max_model_len": 100, "token_budget": 24, "max_num_seqs": 8},
        {"enable_prefix_caching": False},
    ],
    ids=["batched", "chunked", "tight", "no-prefix-cache"],
)
def test_vectors_are_those_of_transformers(model, pooling, overrides):
    directory, reference = model
    core, asked = make_core(directory, **overrides), prompts(9)
    check(embed_all(core, asked, pooling), reference, asked, pooling)
    stats = core.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_free_blocks) == (0, 0, stats.num_blocks)
    assert stats.total_prompt_tokens == sum(map(len, asked.values()))
    assert stats.total_output_tokens == 0


@pytest.mark.parametrize("pooling", POOLINGS)
def test_beside_decodes_and_preempted(model, pooling):
    directory, reference = model
    asked, chats = prompts(6), {f"g{i}": (p, greedy(30)) for i, p in enumerate(prompts(4, seed=1).values())}
    alone = run_all(make_core(directory), chats)
    core = make_core(directory, num_blocks=10, max_model_len=130, token_budget=40, max_num_seqs=10)
    for request_id, (prompt, params) in chats.items():
        core.add_request(AddRequest(request_id, tuple(prompt), params, time.monotonic()))
    for _ in range(3):
        core.step()
    tokens: dict[str, list[int]] = {request_id: [] for request_id in chats}
    embedded = {}
    for request_id, outputs in embed_all(core, asked, pooling).items():
        if request_id in asked:
            embedded[request_id] = outputs
        else:
            tokens[request_id] = [o.token_id for o in outputs]
    check(embedded, reference, asked, pooling)
    assert core.stats().total_preemptions > 0
    for request_id, last in tokens.items():
        assert alone[request_id][len(alone[request_id]) - len(last) :] == last


def test_a_mean_takes_no_cached_prefix_and_the_last_token_does(model):
    directory, reference = model
    core, asked = make_core(directory), {"a": list(range(2, 82))}
    run_all(core, {"before": (asked["a"], greedy(1))})
    for pooling, num_cached in (("mean", 0), ("last", 64)):
        outputs = embed_all(core, asked, pooling)
        assert outputs["a"][0].num_cached_tokens == num_cached
        check(outputs, reference, asked, pooling)


def test_the_longest_prompt_and_one_too_long(model):
    directory, reference = model
    core = make_core(directory, max_model_len=64)
    asked = {"a": [i % 190 + 2 for i in range(64)]}
    check(embed_all(core, asked, "mean"), reference, asked, "mean")
    with pytest.raises(ValueError, match="65 prompt tokens, limit 64"):
        embed_all(core, {"b": [5] * 65}, "mean")


def test_a_prompt_whose_last_chunk_is_in_flight_is_not_planned_again():
    scheduler = make_scheduler(token_budget=4)
    request = Request(
        "a", range(6), SamplingParams(), max_model_len=scheduler.max_model_len, pooling=PoolingParams()
    )
    scheduler.add_request(request)
    add(scheduler, "b", 3)
    plans = []
    for _ in range(3):
        plans.append(scheduler.schedule())
        scheduler.run_ahead(plans[-1])
    assert [plan(output) for output in plans] == [{"a": 4}, {"a": 2, "b": 2}, {"b": 1}]
    assert not any(p.is_sampled for output in plans for p in output.scheduled if p.request is request)
    assert scheduler.update(plans[0], {}) == []
    assert scheduler.update(plans[1], {}) == [(request, ())]
    assert (request.status, request.num_output_tokens) == (RequestStatus.FINISHED_STOPPED, 0)
    assert request not in scheduler.running


def test_an_abort_frees_everything(model):
    core = make_core(model[0], token_budget=8, max_num_seqs=4)
    message = AddRequest("a", tuple([5] * 60), SamplingParams(), 0.0, pooling=PoolingParams())
    core.add_request(message)
    core.step()
    [ended] = core.abort(AbortRequests(("a",)))
    assert (ended.finish_reason, ended.embedding) == ("abort", None)
    assert not core.has_work
    assert core.stats().num_free_blocks == core.stats().num_blocks


def test_unknown_pooling_is_refused():
    with pytest.raises(ParameterError, match="must be mean or last, got 'max'"):
        PoolingParams("max")  # type: ignore[arg-type]


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("token_budget", [24, 512])
def test_the_gpus_runner_pools_over_all_chunks(tmp_path, monkeypatch, pooling, token_budget):
    """Emulated: one token, a few, and more than a chunk, with a step in flight and decodes beside them."""
    emulate(monkeypatch)
    directory = packed_llama(tmp_path)
    core = make_core(
        directory, dtype="auto", max_num_seqs=24, token_budget=token_budget, speculative_tokens=0
    )
    rng = random.Random(0)
    asked = {f"e{n}": [rng.randrange(2, 190) for _ in range(n)] for n in (1, 5, 16, 17, 70)}
    core.add_request(AddRequest("g", (3, 4, 5), greedy(12), time.monotonic()))
    core.step()
    outputs = embed_all(core, asked, pooling)
    outputs.pop("g")
    assert set(outputs) == set(asked)
    reference = build_model(
        open_checkpoint(directory),
        max_model_len=1024,
        dtype=torch.float32,
        device=torch.device("cpu"),
        keep_packed=False,
    )
    for request_id, prompt in asked.items():
        [output] = outputs[request_id]
        cache = KVCache.allocate(reference.config, 16, 16, torch.float32, torch.device("cpu"))
        hidden = reference.forward(torch.tensor(prompt), cache, step([(0, len(prompt))], 16))
        normed = rms_norm(hidden, reference.weights.final_norm, reference.config.rms_norm_eps)
        want = normed.mean(dim=0) if pooling == "mean" else normed[-1]
        similarity = torch.cosine_similarity(torch.tensor(output.embedding), want, dim=0)
        assert similarity > 0.999  # keys, values and products are bfloat16 there
    assert not core.has_work
    assert core.stats().num_free_blocks == core.stats().num_blocks
