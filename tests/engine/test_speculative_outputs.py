"""The engine says the same with and without speculative decoding."""

import dataclasses
import random
from pathlib import Path

import pytest
import torch

import kernels
from engine import EngineConfig, SamplingParams, speculation
from engine.async_engine import AsyncEngine
from engine.checkpoint import open_checkpoint
from engine.messages import AbortRequests, AddRequest, TokenOutput
from tests.engine.helpers import collect, greedy, make_core, save_random_llama


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    """A model whose next token follows mostly from the last one, so that its outputs run into loops."""
    directory = tmp_path_factory.mktemp("llama")
    model = save_random_llama(directory, vocab_size=60, num_hidden_layers=2)
    with torch.no_grad():
        model.get_input_embeddings().weight *= 20.0
        model.get_output_embeddings().weight *= 3.0
    model.save_pretrained(directory)
    return directory


@pytest.fixture
def free_drafts(monkeypatch):
    """Whatever can be drafted is drafted, so that many drafts are rejected too."""
    monkeypatch.setitem(speculation._TOKEN_COST, "cpu", 0.0)


@pytest.fixture(autouse=True)
def one_thread():
    """Threads only get into each other's way at this size."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def repetitive_prompts(num: int) -> list[list[int]]:
    """Phrases that come again, so that there is something to draft from the first step on."""
    rng = random.Random(5)
    prompts = []
    for _ in range(num):
        phrase = [rng.randrange(2, 60) for _ in range(rng.randrange(3, 12))]
        prompts.append((phrase * 12)[: rng.randrange(20, 70)])
    return prompts


SAMPLINGS = {
    "greedy": {"temperature": 0.0},
    "greedy-penalties": {"temperature": 0.0, "frequency_penalty": 0.3, "repetition_penalty": 1.1},
    "seeded": {"temperature": 0.4},
    "seeded-filters": {"temperature": 0.6, "top_p": 0.8, "top_k": 20, "min_p": 0.02},
    "seeded-penalties": {"temperature": 0.4, "presence_penalty": 0.5, "repetition_penalty": 1.05},
    "logprobs-and-bias": {"temperature": 0.3, "logprobs": 2, "logit_bias": {7: 1.5}},
}


def same(outputs: list[TokenOutput], expected: list[TokenOutput]) -> bool:
    """Equal but for times, and for logprobs in the last bits (a float32 matmul's sums depend on its rows)."""
    for a, b in zip(outputs, expected, strict=True):
        if (a.token_id, a.finish_reason, a.stop_reason) != (b.token_id, b.finish_reason, b.stop_reason):
            return False
        for (i, p), (j, q) in zip(a.logprobs or (), b.logprobs or (), strict=True):
            if i != j or p != pytest.approx(q, abs=1e-4):
                return False
    return True


@pytest.mark.parametrize("name", SAMPLINGS)
@pytest.mark.parametrize(
    "overrides",
    [{}, {"token_budget": 9, "max_num_seqs": 4}, {"num_blocks": 10, "max_model_len": 128}],
    ids=["roomy", "chunked", "preempted"],
)
def test_outputs_are_the_same_with_and_without(model_dir, free_drafts, name, overrides):
    params = SamplingParams(max_tokens=48, ignore_eos=True, **SAMPLINGS[name])
    requests = {
        f"r{i}": (p, dataclasses.replace(params, seed=i)) for i, p in enumerate(repetitive_prompts(6))
    }
    expected = collect(make_core(model_dir, speculative_tokens=0), requests)
    core = make_core(model_dir, speculative_tokens=5, **overrides)
    got = collect(core, requests)
    assert all(same(got[k], expected[k]) for k in requests)
    stats = core.stats()
    assert 0 < stats.total_accepted_tokens < stats.total_draft_tokens
    assert stats.total_output_tokens == sum(map(len, expected.values()))
    assert (stats.num_running, stats.num_free_blocks) == (0, stats.num_blocks)
    if "num_blocks" in overrides:
        assert stats.total_preemptions > 0


def test_fewer_steps_where_the_output_repeats_itself(model_dir):
    prompt = repetitive_prompts(1)[0]
    steps = {}
    for num in (0, 5):
        core = make_core(model_dir, speculative_tokens=num)
        collect(core, {"r": (prompt, greedy(120))})
        steps[num] = core.stats().total_steps
    assert steps[0] == 120
    assert steps[5] < 90
    stats = core.stats()
    assert stats.total_steps + stats.total_accepted_tokens == 120
    assert stats.total_accepted_tokens > 0.5 * stats.total_draft_tokens


def test_every_end_is_the_same_in_the_middle_of_accepted_drafts(model_dir, free_drafts):
    """Each possible max_tokens and stop token of an output whose drafts are accepted."""
    prompt = repetitive_prompts(1)[0]
    full = [o.token_id for o in collect(make_core(model_dir), {"r": (prompt, greedy(60))})["r"]]
    core = make_core(model_dir, speculative_tokens=5)
    requests = {f"max{n}": (prompt, greedy(n)) for n in range(1, 60, 3)}
    requests |= {f"stop{t}": (prompt, greedy(60, stop_token_ids=(t,))) for t in sorted(set(full))}
    got = collect(core, requests)
    for request_id, (_, params) in requests.items():
        tokens = [o.token_id for o in got[request_id]]
        end = params.max_tokens
        if params.stop_token_ids:
            end = full.index(params.stop_token_ids[0]) + 1
            assert got[request_id][-1].stop_reason == params.stop_token_ids[0]
        assert tokens == full[:end]
        reasons = [o.finish_reason for o in got[request_id]]
        assert reasons == [None] * (end - 1) + ["stop" if params.stop_token_ids else "length"]
    assert core.stats().total_accepted_tokens > 0


def test_the_context_ends_a_request_at_the_same_token(model_dir):
    prompt = repetitive_prompts(1)[0]
    outputs = []
    for num in (0, 5):
        core = make_core(model_dir, speculative_tokens=num, max_model_len=96)
        outputs.append(collect(core, {"r": (prompt, greedy(1000))})["r"])
    assert same(*outputs)
    assert len(prompt) + len(outputs[0]) == 96


def test_a_prefix_hit_on_speculated_blocks_changes_nothing(model_dir):
    prompt = repetitive_prompts(1)[0]
    core = make_core(model_dir, speculative_tokens=5)
    first = [o.token_id for o in collect(core, {"a": (prompt, greedy(60))})["a"]]
    longer = prompt + first[:50]
    got = collect(core, {"b": (longer, greedy(30))})["b"]
    assert got[0].num_cached_tokens == (len(longer) - 1) // 16 * 16
    assert same(got, collect(make_core(model_dir), {"b": (longer, greedy(30))})["b"])


def test_abort_between_steps_frees_everything(model_dir):
    core = make_core(model_dir, speculative_tokens=5)
    for i, prompt in enumerate(repetitive_prompts(3)):
        core.add_request(AddRequest(f"r{i}", tuple(prompt), greedy(50), 0.0))
    for _ in range(6):
        core.step()
    assert len(core.abort(AbortRequests(("r0", "r1", "r2")))) == 3
    assert core.stats().num_free_blocks == core.stats().num_blocks
    assert not core.has_work


# SmolLM2. Packed weights give a token the same bits in any batch, so equality here is exact.

LIST = "Write the numbers from one to five as a list. Then write the same list again, twice."
native_only = pytest.mark.skipif(kernels.backend_name() != "native", reason="too slow on the reference")


@pytest.fixture(scope="module")
def chat_ids(smollm2) -> list[list[int]]:
    tokenizer = open_checkpoint(smollm2).load_tokenizer()
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
        )
        for text in (LIST, "Name five European rivers.", "def fibonacci(n):")
    ]


@pytest.mark.model
@native_only
def test_smollm2_says_the_same_with_and_without(smollm2, chat_ids, free_drafts):
    samplings = [
        greedy(48),
        SamplingParams(temperature=0.7, top_p=0.9, seed=3, max_tokens=48),
        SamplingParams(temperature=0.5, seed=4, frequency_penalty=0.2, max_tokens=48, logprobs=1),
    ]
    requests = {
        f"{i}-{j}": (ids, params) for i, ids in enumerate(chat_ids) for j, params in enumerate(samplings)
    }
    outputs, accepted = [], []
    for num in (0, 7):
        core = make_core(smollm2, dtype="auto", num_blocks=200, speculative_tokens=num)
        got = collect(core, requests)
        outputs.append({k: [(o.token_id, o.logprobs, o.finish_reason) for o in v] for k, v in got.items()})
        accepted.append(core.stats().total_accepted_tokens)
    assert outputs[0] == outputs[1]
    assert accepted[0] == 0
    assert accepted[1] > 20


@pytest.mark.model
@native_only
async def test_a_stop_string_within_accepted_drafts_ends_the_text_there(smollm2, chat_ids, free_drafts):
    texts = []
    for num in (0, 7):
        config = EngineConfig(model=str(smollm2), device="cpu", num_blocks=200, speculative_tokens=num)
        engine = await AsyncEngine.start(config)
        for i, stop in enumerate((("Three", "three", "3"), ("\n\n",), ("no such text",))):
            params = SamplingParams(temperature=0.0, max_tokens=48, stop=stop)
            outputs = [o async for o in engine.generate(chat_ids[0], params, request_id=f"r{i}")]
            last = outputs[-1]
            texts.append(("".join(o.text for o in outputs), last.finish_reason, last.num_output_tokens))
        if num:
            assert engine.stats().total_accepted_tokens > 0
        await engine.shutdown()
    assert texts[:3] == texts[3:]
    assert texts[0][1] == "stop"
