"""The GPU's runner through EngineCore: on a Hopper GPU, and everywhere with torch in the kernels' place.

Greedy tokens are held against the CPU's float32 model, token by token: each must be its best one, or one
whose logit is as good as equal (keys, values and products in bfloat16 shift logits a little).
"""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine import SamplingParams, speculation
from engine.checkpoint import open_checkpoint
from engine.core import EngineCore
from engine.cuda import CudaModelRunner, batch
from engine.messages import AbortRequests, AddRequest
from engine.models.build import build_model
from engine.models.llama import KVCache, LlamaModel
from tests.engine.emulated_cuda import emulate
from tests.engine.helpers import collect, greedy, make_core, run_all
from tests.engine.packed_models import packed_gemma, packed_llama
from tests.kernels.helpers import step

HAS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not HAS_HOPPER, reason="needs a Hopper GPU (sm_90)")]
TIE = 0.04  # of the logits' standard deviation
BATCH_TIE = 0.06  # of a large batch, whose products leave in bfloat16


@pytest.fixture(scope="module", params=["llama", "gemma"])
def model_dir(request, tmp_path_factory) -> Path:
    make = {"llama": packed_llama, "gemma": packed_gemma}[request.param]
    return make(tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def reference(model_dir) -> LlamaModel:
    """The same weights in float32, on the CPU."""
    cpu = torch.device("cpu")
    return build_model(
        open_checkpoint(model_dir), max_model_len=1024, dtype=torch.float32, device=cpu, keep_packed=False
    )


@pytest.fixture(autouse=True)
def one_thread():
    """Threads only get into each other's way at this size."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def test_warm_up_leaves_nothing_behind(model_dir, device):
    core = core_of(model_dir, device)
    core.warm_up()
    assert is_idle(core)
    assert run_all(core, requests(2)) == run_all(core_of(model_dir, device), requests(2))


def test_where_steps_have_a_target_chunks_are_profiled(model_dir, device):
    core = core_of(model_dir, device, step_target_s=0.01, token_budget=512)
    core.warm_up()
    profile = core.scheduler.pacer.profile
    assert (list(profile)[:9], max(profile)) == ([32, 64, 96, 128, 160, 192, 224, 256, 320], 512)
    assert is_idle(core)
    assert run_all(core, requests(2)) == run_all(core_of(model_dir, device), requests(2))


@pytest.fixture(params=[pytest.param("cuda", marks=ON_GPU), "emulated"])
def device(request, monkeypatch) -> str:
    if request.param == "emulated":
        emulate(monkeypatch)
    return request.param


def core_of(model_dir: Path, device: str, **overrides) -> EngineCore:
    values = {"dtype": "auto", "max_num_seqs": 24, "token_budget": 256, "speculative_tokens": 0, **overrides}
    # e4m3 products shift logits by more than a tie; what they cost is measured elsewhere.
    values["prefill_precision"] = "bf16"
    core = make_core(model_dir, device="cuda" if device == "cuda" else "cpu", **values)
    assert isinstance(core.runner, CudaModelRunner)
    if device == "cuda":
        core.warm_up()
    return core


def prompts(num: int, seed: int = 0, longest: int = 70) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(2, 199) for _ in range(rng.randrange(1, longest))] for _ in range(num)]


def requests(num: int = 8, params: SamplingParams | None = None, **kw):
    chosen = params or greedy(24)
    return {f"r{i}": (p, replace(chosen, seed=i)) for i, p in enumerate(prompts(num, **kw))}


def logits_after(model: LlamaModel, prompt: list[int], output: list[int]) -> torch.Tensor:
    """float32 [outputs, vocab]: what the model says before each output token."""
    tokens = [*prompt, *output]
    num_blocks = -(-len(tokens) // 16)
    cache = KVCache.allocate(model.config, num_blocks, 16, torch.float32, torch.device("cpu"))
    with torch.inference_mode():
        hidden = model.forward(torch.tensor(tokens), cache, step([(0, len(tokens))], num_blocks))
        return model.logits(hidden[len(prompt) - 1 : -1].contiguous())


def check_greedy(
    model: LlamaModel, given, got: dict[str, list[int]], tie: float = TIE, least_equal: float = 0.95
) -> None:
    num_equal = num_tokens = 0
    for request_id, (prompt, params) in given.items():
        output = got[request_id]
        assert len(output) == params.max_tokens
        logits = logits_after(model, prompt, output)
        for i, token_id in enumerate(output):
            row = logits[i].clone()
            counts = torch.bincount(torch.tensor(output[:i], dtype=torch.int64), minlength=len(row))
            is_seen = counts > 0
            is_seen[prompt] = True
            penalized = torch.where(row > 0, row / params.repetition_penalty, row * params.repetition_penalty)
            row = torch.where(is_seen, penalized, row)
            row -= params.frequency_penalty * counts + params.presence_penalty * (counts > 0)
            for biased, bias in params.logit_bias.items():
                row[biased] += bias
            gap = float(row.max() - row[token_id]) / float(logits.std())
            assert gap < tie, f"{request_id}, output {i}: {token_id} is {gap:.3f} below {int(row.argmax())}"
            num_equal += gap == 0
        num_tokens += len(output)
    assert num_equal > least_equal * num_tokens


def is_idle(core: EngineCore) -> bool:
    stats = core.stats()
    idle = (stats.num_running, stats.num_waiting, stats.num_free_blocks) == (0, 0, stats.num_blocks)
    return idle and not core.has_work


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"token_budget": 40},
        {"token_budget": 8, "max_num_seqs": 8},
        {"num_blocks": 12, "max_model_len": 100},
        {"num_blocks": 7, "token_budget": 24, "max_model_len": 100},
    ],
    ids=["batched", "chunked", "small-chunks", "preempted", "preempted-and-chunked"],
)
def test_the_tokens_are_those_of_the_cpu(model_dir, reference, device, overrides):
    core = core_of(model_dir, device, **overrides)
    given = requests()
    check_greedy(reference, given, run_all(core, given))
    assert is_idle(core)
    if overrides.get("num_blocks", 64) <= 12:
        assert core.stats().total_preemptions > 0


def test_more_than_sixteen_at_once(model_dir, reference, device):
    core = core_of(model_dir, device, num_blocks=256)
    given = requests(24)
    check_greedy(reference, given, run_all(core, given), BATCH_TIE)


def test_alone_and_in_a_batch_of_64(model_dir, reference, device):
    """The same tokens up to ties: both are held against the reference, token by token."""
    core = core_of(model_dir, device, num_blocks=512, max_num_seqs=64)
    given = requests(64, longest=40)
    check_greedy(reference, given, run_all(core, given), BATCH_TIE)
    alone = {k: given[k] for k in ("r0", "r21", "r42", "r63")}
    check_greedy(reference, alone, {k: run_all(core, {k: v})[k] for k, v in alone.items()})
    assert is_idle(core)


@pytest.mark.parametrize("lengths", [(100,), (5, 30), (12,), (250,)])
def test_decodes_beside_few_prompt_tokens_are_one_pass(model_dir, reference, device, lengths, monkeypatch):
    core = core_of(model_dir, device, enable_prefix_caching=False, num_blocks=128, token_budget=512)
    given = requests(18, longest=40)
    rng = random.Random(3)
    late = {
        f"late{n}{i}": ([rng.randrange(2, 199) for _ in range(n)], greedy(6)) for i, n in enumerate(lengths)
    }
    plans, run_jointly = [], core.runner._run_jointly
    monkeypatch.setattr(
        core.runner, "_run_jointly", lambda layout: (plans.append(layout), run_jointly(layout))
    )
    outputs: dict[str, list[int]] = {k: [] for k in given | late}

    def advance() -> None:
        for output in core.step().outputs:
            outputs[output.request_id].append(output.token_id)

    for request_id, (prompt, params) in given.items():
        core.add_request(AddRequest(request_id, tuple(prompt), params, 0.0))
    for _ in range(4):
        advance()
    for request_id, (prompt, params) in late.items():
        core.add_request(AddRequest(request_id, tuple(prompt), params, 0.0))
    while core.has_work:
        advance()
    assert [len(p.chunks) for p in plans] == ([] if sum(lengths) > 256 - 18 else [len(lengths)])
    check_greedy(reference, given | late, outputs, tie=BATCH_TIE)
    assert is_idle(core)


def test_sampling_in_a_large_batch_is_reproducible(model_dir, device):
    params = SamplingParams(temperature=0.8, top_p=0.9, frequency_penalty=0.3, logprobs=2, max_tokens=12)
    limits = {"num_blocks": 512, "max_num_seqs": 64, "token_budget": 512}  # all prompts in one step
    core = core_of(model_dir, device, enable_prefix_caching=False, **limits)
    given = requests(40, params, longest=20)
    first = run_all(core, given)
    assert first == run_all(core, given)
    assert first != run_all(core, {k: (p, replace(q, seed=q.seed + 1000)) for k, (p, q) in given.items()})


def staggered(core: EngineCore, given, others: int) -> dict[str, list[int]]:
    """Each request after the one before has its first token, so that every prompt is computed alone."""
    for i in range(others):
        prompt = [3 + i, *range(5, 30)]
        core.add_request(AddRequest(f"other{i}", tuple(prompt), greedy(300), 0.0))
        core.step()
        core.step()
    got: dict[str, list[int]] = {k: [] for k in given}
    waiting = dict(given)
    while any(len(got[k]) < p.max_tokens for k, (_, p) in given.items()):
        if waiting and core.stats().num_waiting_tokens == 0:
            request_id = next(iter(waiting))
            prompt, params = waiting.pop(request_id)
            core.add_request(AddRequest(request_id, tuple(prompt), params, 0.0))
        for output in core.step().outputs:
            if output.request_id in got:
                got[output.request_id].append(output.token_id)
    core.abort(AbortRequests(tuple(core.scheduler.requests)))
    while core.has_work:
        core.step()
    assert is_idle(core)
    return got


SAMPLINGS = {
    "greedy": greedy(20),
    "plain": SamplingParams(temperature=0.8, max_tokens=20, ignore_eos=True),
    "filtered": SamplingParams(
        temperature=0.9, top_p=0.9, top_k=40, min_p=0.01, max_tokens=20, ignore_eos=True
    ),
    "penalties": SamplingParams(
        temperature=0.7, frequency_penalty=0.4, repetition_penalty=1.1, max_tokens=20, ignore_eos=True
    ),
}


@pytest.mark.parametrize("name", SAMPLINGS)
def test_a_request_gets_its_tokens_in_any_batch_of_lanes(model_dir, device, name, monkeypatch):
    monkeypatch.setattr(batch, "MIN_ROWS", 1000)
    given = requests(3, SAMPLINGS[name], longest=40)
    alone = {}
    for request_id, one in given.items():
        core = core_of(model_dir, device, num_blocks=600, enable_prefix_caching=False)
        alone |= run_all(core, {request_id: one})
    core = core_of(model_dir, device, num_blocks=600, enable_prefix_caching=False)
    assert staggered(core, given, others=17) == alone
    if name != "greedy":
        assert alone != run_all(core_of(model_dir, device), requests(3, greedy(20), longest=40))


def test_a_prefix_hit_changes_nothing(model_dir, reference, device):
    core = core_of(model_dir, device, num_blocks=128)
    given = requests()
    run_all(core, given)
    outputs = collect(core, given)
    check_greedy(reference, given, {k: [o.token_id for o in v] for k, v in outputs.items()})
    for request_id, (prompt, _) in given.items():
        assert outputs[request_id][0].num_cached_tokens == (len(prompt) - 1) // 16 * 16


@pytest.mark.parametrize(
    "params",
    [
        {"frequency_penalty": 0.8},
        {"presence_penalty": 1.0, "repetition_penalty": 1.3},
        {"logit_bias": {7: 2.0, 9: -3.0}},
        {"frequency_penalty": 0.5, "logit_bias": {11: 1.5}},
    ],
)
@pytest.mark.parametrize("speculative_tokens", [0, 5])
def test_penalties_and_bias(model_dir, reference, device, free_drafts, params, speculative_tokens):
    core = core_of(model_dir, device, speculative_tokens=speculative_tokens)
    given = requests(4, greedy(24, **params)) | {"plain": ([5, 6, 7, 5, 6, 7, 5, 6], greedy(24))}
    check_greedy(reference, given, run_all(core, given))


def test_logprobs(model_dir, reference, device):
    params = greedy(12, logprobs=3, prompt_logprobs=2)
    for overrides in ({}, {"token_budget": 25}):
        given = requests(4, params)
        outputs = collect(core_of(model_dir, device, **overrides), given)
        for request_id, (prompt, _) in given.items():
            own = outputs[request_id]
            output = [o.token_id for o in own]
            expected = logits_after(reference, prompt[:1], [*prompt[1:], *output]).log_softmax(-1)
            entries = [*(own[0].prompt_logprobs or ()), *(o.logprobs for o in own)]
            assert len(entries) == len(expected)
            assert [e[0][0] for e in entries] == [*prompt[1:], *output]
            assert [len(e) for e in entries] == [3] * (len(prompt) - 1) + [4] * len(own)
            # The largest of some thousand deviations, not one at a place where tokens compete.
            tolerance = 4 * TIE * float(expected.std())
            for row, entry in zip(expected, entries, strict=True):
                for token_id, logprob in entry:
                    assert logprob == pytest.approx(float(row[token_id]), abs=tolerance)


def test_abort_with_a_step_in_flight(model_dir, reference, device):
    core = core_of(model_dir, device, enable_prefix_caching=False)
    given = requests(6)
    for request_id, (prompt, params) in given.items():
        core.add_request(AddRequest(request_id, tuple(prompt), params, 0.0))
    outputs = {k: [] for k in given}
    for _ in range(4):
        for output in core.step().outputs:
            outputs[output.request_id].append(output.token_id)
    assert core._in_flight is not None
    assert len(core.abort(AbortRequests(("r1", "r4")))) == 2
    assert core.abort(AbortRequests(("r1",))) == []
    core.add_request(AddRequest("r1", tuple(given["r2"][0]), greedy(24), 0.0))  # the same name once more
    outputs["r1"] = []
    while core.has_work:
        for output in core.step().outputs:
            outputs[output.request_id].append(output.token_id)
    assert len(outputs.pop("r4")) < 24
    given["r1"] = given["r2"]
    del given["r4"]
    check_greedy(reference, given, outputs)
    assert is_idle(core)
    core.add_request(AddRequest("last", tuple(given["r0"][0]), greedy(24), 0.0))
    core.step()
    assert len(core.abort(AbortRequests(("last",)))) == 1
    assert core.has_work  # its step
    assert core.step().outputs == ()
    assert is_idle(core)


@pytest.fixture
def free_drafts(monkeypatch):
    """Whatever can be drafted is drafted, so that many drafts are rejected too."""
    for device_type in ("cpu", "cuda"):
        monkeypatch.setitem(speculation._TOKEN_COST, device_type, 0.0)


def test_speculation_changes_nothing(model_dir, device, free_drafts):
    rng = random.Random(5)
    given = {}
    for i in range(4):
        phrase = [rng.randrange(2, 199) for _ in range(5)]
        bias = dict.fromkeys(phrase, 8.0)  # a model that repeats itself
        temperature = 0.0 if i < 2 else 0.8  # the one accepts nearly all, the other rejects too
        given[f"r{i}"] = (phrase * 6, replace(greedy(48, logit_bias=bias), temperature=temperature, seed=i))
    results = []
    for num in (0, 5):
        core = core_of(model_dir, device, speculative_tokens=num, enable_prefix_caching=False)
        results.append(staggered(core, given, others=0))
        if num:
            stats = core.stats()
            assert 0 < stats.total_accepted_tokens < stats.total_draft_tokens
    assert results[0] == results[1]
