"""EngineCore on a small random model: however a request is run, its tokens are those it gets alone."""

import dataclasses
import random

import pytest
import torch

from engine import ModelLoadError, SamplingParams
from engine.messages import AbortRequests, AddRequest
from tests.engine.helpers import collect, greedy, make_core, run_all, save_random_llama


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("llama")
    save_random_llama(directory)
    return directory


def prompts(num: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(2, 199) for _ in range(rng.randrange(1, 70))] for _ in range(num)]


@pytest.fixture(scope="module")
def alone(model_dir) -> dict[str, list[int]]:
    """Each request by itself, in a fresh core."""
    return {
        f"r{i}": run_all(make_core(model_dir), {f"r{i}": (p, greedy(24))})[f"r{i}"]
        for i, p in enumerate(prompts(8))
    }


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"token_budget": 8, "max_num_seqs": 8},
        {"token_budget": 5, "max_num_seqs": 3},
        {"num_blocks": 16, "max_model_len": 100},
        {"num_blocks": 12, "enable_prefix_caching": False, "max_model_len": 100},
        {"num_blocks": 7, "token_budget": 16, "max_num_seqs": 8, "max_model_len": 100},
    ],
    ids=["batched", "chunked", "few-at-a-time", "tight", "preempted", "preempted-and-chunked"],
)
def test_however_it_runs_the_tokens_are_the_same(model_dir, alone, overrides):
    core = make_core(model_dir, **overrides)
    got = run_all(core, {f"r{i}": (p, greedy(24)) for i, p in enumerate(prompts(8))})
    assert got == alone
    stats = core.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_free_blocks) == (0, 0, stats.num_blocks)
    if overrides.get("num_blocks", 64) <= 12:
        assert stats.total_preemptions > 0


def test_a_prefix_hit_changes_nothing(model_dir, alone):
    core = make_core(model_dir)
    requests = {f"r{i}": (p, greedy(24)) for i, p in enumerate(prompts(8))}
    assert run_all(core, requests) == alone
    outputs = collect(core, requests)
    assert {k: [o.token_id for o in v] for k, v in outputs.items()} == alone
    for request_id, (prompt, _) in requests.items():
        assert outputs[request_id][0].num_cached_tokens == (len(prompt) - 1) // 16 * 16


def test_seeded_sampling_survives_preemption(model_dir):
    params = SamplingParams(temperature=1.0, top_p=0.9, max_tokens=24, ignore_eos=True, frequency_penalty=0.5)
    requests = {f"r{i}": (p, dataclasses.replace(params, seed=i)) for i, p in enumerate(prompts(8))}
    roomy = run_all(make_core(model_dir), requests)
    tight = make_core(model_dir, num_blocks=8, max_model_len=100)
    assert run_all(tight, requests) == roomy
    assert tight.stats().total_preemptions > 0


def test_prompt_logprobs_do_not_depend_on_chunks(model_dir):
    prompt = prompts(1, seed=3)[0]
    results = []
    for overrides in ({}, {"token_budget": 7, "max_num_seqs": 4}):
        core = make_core(model_dir, **overrides)
        first = collect(core, {"r": (prompt, greedy(2, prompt_logprobs=2, logprobs=1))})["r"][0]
        results.append(first.prompt_logprobs)
        assert len(first.prompt_logprobs) == len(prompt) - 1
        assert [entry[0][0] for entry in first.prompt_logprobs] == prompt[1:]
        assert first.logprobs[0][0] == first.token_id
    for a, b in zip(*results, strict=True):
        assert [t for t, _ in a] == [t for t, _ in b]
        assert [p for _, p in a] == pytest.approx([p for _, p in b], abs=1e-4)


def test_abort_in_any_state_frees_everything(model_dir):
    core = make_core(model_dir, num_blocks=8, max_model_len=100, max_num_seqs=2, enable_prefix_caching=False)
    for i, prompt in enumerate(prompts(4)):
        core.add_request(AddRequest(f"r{i}", tuple(prompt), greedy(50), 0.0))
    for _ in range(3):
        core.step()
    ended = core.abort(AbortRequests(("r0", "r1", "r2", "r3", "unknown")))
    assert {o.finish_reason for o in ended} == {"abort"}
    assert core.abort(AbortRequests(("r0",))) == []
    stats = core.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_free_blocks) == (0, 0, 8)
    assert not core.has_work


def test_half_precision_weights_load_as_float32(model_dir, tmp_path):
    reference = save_random_llama(tmp_path)
    reference.to(torch.bfloat16).save_pretrained(tmp_path)
    core = make_core(tmp_path)
    assert core.model.weight_format == "float32"
    assert len(run_all(core, {"r": ([5, 6, 7], greedy(4))})["r"]) == 4


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "model.safetensors").unlink(), "neither model.safetensors"),
        (lambda d: (d / "config.json").unlink(), "config.json is missing"),
        (lambda d: (d / "config.json").write_text("{"), "not readable as JSON"),
        (
            lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:999]),
            "safetensors",
        ),
        (
            lambda d: (d / "config.json").write_text(
                (d / "config.json").read_text().replace("LlamaForCausalLM", "Other")
            ),
            "architecture Other is not supported",
        ),
        (
            lambda d: (d / "config.json").write_text(
                (d / "config.json").read_text().replace('"intermediate_size": 112', '"intermediate_size": 96')
            ),
            r"has shape \(112, 64\), expected \(96, 64\)",
        ),
    ],
)
def test_a_damaged_checkpoint_says_what_is_wrong(tmp_path, damage, message):
    save_random_llama(tmp_path)
    damage(tmp_path)
    with pytest.raises(ModelLoadError, match=message):
        make_core(tmp_path)


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(ModelLoadError, match=r"not a \.gguf file"):
        make_core(tmp_path / "model.bin")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + b"\0" * 20)
    with pytest.raises(ModelLoadError, match="not a readable GGUF"):
        make_core(tmp_path / "broken.gguf")
    with pytest.raises(ModelLoadError, match="no such file"):
        make_core(tmp_path / "nothing")
