"""Speculative decoding: exact proposals and plans, and the same outputs with and without it."""

import dataclasses
import random
from pathlib import Path

import pytest
import torch

import kernels
from engine import EngineConfig, ParameterError, SamplingParams, speculation
from engine.async_engine import AsyncEngine
from engine.checkpoint import open_checkpoint
from engine.kv_cache_manager import KVCacheManager
from engine.messages import AbortRequests, AddRequest, TokenOutput
from engine.request import Request, RequestStatus
from engine.scheduler import Scheduler, SchedulerOutput
from engine.speculation import Drafter, DraftPolicy, NgramProposer, num_kept
from tests.engine.helpers import collect, greedy, make_core, save_random_llama

FREE = DraftPolicy(max_tokens=4, token_cost=0.0)  # a draft always pays
BLOCK_SIZE = 4
LOOP = [5, 6, 7, 8] * 2


# The proposer


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([1, 2, 3, 9, 1, 2], (2, (3, 9, 1))),
        ([1, 2, 3, 9, 1, 2, 4, 8, 1, 2], (2, (4, 8, 1))),  # the latest occurrence
        ([0, 1, 2, 3, 9, 5, 1, 2, 4, 9, 0, 1, 2], (3, (3, 9, 5))),  # a longer match wins over a later one
        ([7, 0, 1, 2, 3, 4, 7, 0, 1, 2], (4, (3, 4, 7))),
        ([1, 2, 3, 4, 5], (0, ())),
        ([1, 2, 3, 2], (0, ())),  # one token is no match
        ([4, 4, 4], (2, (4, 4, 4))),  # a match with itself, shifted: the loop goes on
        ([9, 1, 2, 1, 2], (2, (1, 2, 1))),
        ([1], (0, ())),
        ([1, 2], (0, ())),
    ],
)
def test_what_followed_the_longest_latest_match(tokens, expected):
    assert NgramProposer(tokens).propose(3) == expected


def test_the_index_follows_a_growing_list():
    rng = random.Random(0)
    tokens: list[int] = []
    growing = NgramProposer(tokens)
    for _ in range(300):
        tokens.extend(rng.randrange(3) for _ in range(rng.randrange(1, 4)))
        assert growing.propose(5) == NgramProposer(list(tokens)).propose(5) == searched(tokens, 5)


def searched(tokens: list[int], num: int) -> tuple[int, tuple[int, ...]]:
    """The definition, by search."""
    for n in (4, 3, 2):
        for end in range(len(tokens) - 1, n - 1, -1):
            if tokens[end - n : end] == tokens[len(tokens) - n :]:
                looped = list(tokens)
                while len(looped) < end + num:
                    looped.append(looped[len(looped) - (len(tokens) - end)])
                return n, tuple(looped[end : end + num])
    return 0, ()


def test_a_long_prompt_is_indexed_over_several_steps():
    proposer = NgramProposer(list(range(1000)) * 3)
    assert [proposer.propose(2) for _ in range(3)] == [(0, ()), (0, ()), (4, (0, 1))]


# How many drafts pay


@pytest.mark.parametrize(
    ("acceptance", "token_cost", "num_decodes", "expected"),
    [
        (0.4, 0.5, 1, 0),  # CPU: half a step for 0.4 tokens
        (0.7, 0.5, 1, 1),
        (1.0, 0.5, 1, 7),
        (0.7, 0.03, 1, 7),
        (0.1, 0.03, 1, 1),
        (0.02, 0.03, 1, 0),
        (0.9, 0.5, 16, 0),  # a large batch on a CPU is bound by arithmetic already
        (0.3, 0.03, 16, 0),
        (0.7, 0.03, 16, 3),
        (0.0, 0.0, 1, 0),
    ],
)
def test_the_number_of_drafts_follows_acceptance_cost_and_batch(
    acceptance, token_cost, num_decodes, expected
):
    assert DraftPolicy(7, token_cost).num_worthwhile(acceptance, num_decodes) == expected


def test_no_other_number_of_drafts_is_faster():
    for acceptance in (0.1, 0.3, 0.5, 0.7, 0.9, 0.99):
        for cost in (0.03, 0.1, 0.5):
            speeds = [sum(acceptance**i for i in range(k + 1)) / (1 + cost * k) for k in range(8)]
            assert speeds[DraftPolicy(7, cost).num_worthwhile(acceptance, 1)] == max(speeds)


def test_drafts_stop_where_they_fail_and_come_back_where_they_would_have_come_true():
    tokens = [1, 2]
    drafter = Drafter(DraftPolicy(7, 0.5), tokens)
    sizes = []
    for i in range(60):  # every second token makes a known pair, that goes on differently each time
        sizes.append(len(drafter.draft(7, 1)))
        new = [100 + i] if i % 3 == 0 else [i % 3]
        drafter.observe(new)
        tokens.extend(new)
    assert sum(sizes[30:]) == 0
    for _ in range(30):  # now the pair is always followed by the same token
        new = [tokens[-3]]
        drafter.draft(7, 1)
        drafter.observe(new)
        tokens.extend(new)
    assert len(drafter.draft(7, 1)) > 0


def test_drafts_respect_the_limit():
    drafter = Drafter(FREE, list(LOOP))
    assert drafter.draft(2, 1) == (5, 6)
    assert drafter.draft(0, 1) == ()
    assert drafter.draft(-1, 1) == ()
    assert drafter.draft(9, 1) == (5, 6, 7, 8)


@pytest.mark.parametrize(
    ("drafts", "sampled", "kept"),
    [
        ((), (3,), 1),
        ((3,), (3, 4), 2),
        ((3,), (4, 4), 1),
        ((3, 4, 5), (3, 4, 6, 7), 3),
        ((3, 4), (5, 4, 6), 1),
    ],
)
def test_tokens_count_up_to_the_first_that_is_not_its_draft(drafts, sampled, kept):
    assert num_kept(drafts, sampled) == kept


def test_defaults_by_device_and_what_is_refused():
    assert DraftPolicy.for_device("cpu", None).max_tokens == 0
    assert DraftPolicy.for_device("cuda", None).max_tokens == 7
    assert DraftPolicy.for_device("cpu", 3).max_tokens == 3
    with pytest.raises(ParameterError, match="speculative_tokens"):
        EngineConfig(model="m", speculative_tokens=-1)


# The scheduler


def make_scheduler(num_blocks: int = 16, token_budget: int = 16, policy: DraftPolicy = FREE) -> Scheduler:
    return Scheduler(
        KVCacheManager(num_blocks, BLOCK_SIZE),
        max_num_seqs=4,
        token_budget=token_budget,
        max_model_len=num_blocks * BLOCK_SIZE,
        eos_token_ids=frozenset({0}),
        draft_policy=policy,
        clock=lambda: 0.0,
    )


def add(scheduler: Scheduler, request_id: str, prompt: list[int], **params: object) -> Request:
    values = {"max_tokens": 100, **params}
    request = Request(
        request_id,
        prompt,
        SamplingParams(**values),  # type: ignore[arg-type]
        max_model_len=scheduler.max_model_len,
    )
    scheduler.add_request(request)
    return request


def prefilled(scheduler: Scheduler, request_id: str = "a", **params: object) -> Request:
    """A request in a loop of 5, 6, 7, 8 whose next tokens are 6, 7, 8."""
    request = add(scheduler, request_id, list(LOOP), **params)
    scheduler.update(scheduler.schedule(), {request_id: [5]})
    return request


def drafts_of(output: SchedulerOutput) -> dict[str, tuple[int, ...]]:
    return {p.request.request_id: p.draft_token_ids for p in output.scheduled}


def test_accepted_drafts_are_tokens_and_rejected_ones_are_computed_again():
    scheduler = make_scheduler()
    request = prefilled(scheduler)
    output = scheduler.schedule()
    assert drafts_of(output) == {"a": (6, 7, 8, 5)}
    assert output.scheduled[0].num_scheduled_tokens == 5
    assert output.scheduled[0].is_sampled
    [(_, new)] = scheduler.update(output, {"a": [6, 7, 99]})
    assert list(new) == [6, 7, 99]
    # 11 of the 12 tokens: the prompt, 5, and the two accepted drafts.
    assert (request.num_tokens, request.num_computed_tokens) == (12, 11)
    assert request.is_decoding
    assert (scheduler.total_drafts, scheduler.total_draft_tokens, scheduler.total_accepted_tokens) == (
        1,
        4,
        2,
    )
    output = scheduler.schedule()
    assert drafts_of(output) == {"a": ()}  # nothing ends with 7, 99
    assert output.scheduled[0].num_computed_tokens == 11


def test_only_blocks_of_real_tokens_become_findable():
    scheduler = make_scheduler()
    request = prefilled(scheduler)
    scheduler.update(scheduler.schedule(), {"a": [6, 9]})  # 11 tokens, 10 computed; 13 slots were written
    assert (request.num_remembered_blocks, len(request.block_hashes)) == (2, 2)
    scheduler.update(scheduler.schedule(), {"a": [1]})
    scheduler.update(scheduler.schedule(), {"a": [2]})
    assert request.num_remembered_blocks == 3
    other = add(scheduler, "b", [*LOOP, 5, 6, 9, 1, 3])
    scheduler.schedule()
    assert other.num_cached_tokens == 12


@pytest.mark.parametrize(
    ("params", "sampled", "kept", "status"),
    [
        ({"stop_token_ids": (7,)}, [6, 7, 8, 5, 6], [6, 7], RequestStatus.FINISHED_STOPPED),
        ({}, [6, 0], [6, 0], RequestStatus.FINISHED_STOPPED),
        ({"ignore_eos": True}, [6, 0], [6, 0], RequestStatus.RUNNING),
        ({"max_tokens": 3}, [6, 7], [6, 7], RequestStatus.FINISHED_LENGTH),
        ({"max_tokens": 3}, [6, 7, 8], [6, 7], RequestStatus.FINISHED_LENGTH),
        ({}, [6, 7, 8, 5, 6], [6, 7, 8, 5, 6], RequestStatus.RUNNING),
    ],
)
def test_nothing_counts_after_the_token_that_ends_a_request(params, sampled, kept, status):
    scheduler = make_scheduler()
    request = prefilled(scheduler, **params)
    [(_, new)] = scheduler.update(scheduler.schedule(), {"a": sampled})
    assert list(new) == kept
    assert request.output_token_ids == [5, *kept]
    assert request.status is status
    if status.is_finished:
        assert scheduler.kv_cache.pool.num_free_blocks == 16


def test_no_more_is_drafted_than_the_request_may_get():
    scheduler = make_scheduler(num_blocks=3)
    prefilled(scheduler)
    assert drafts_of(scheduler.schedule()) == {"a": (6, 7)}  # 9 of 12 tokens: 2 drafts and one after them
    scheduler = make_scheduler()
    prefilled(scheduler, max_tokens=2)
    assert drafts_of(scheduler.schedule()) == {"a": ()}


def test_every_decode_comes_before_any_draft():
    scheduler = make_scheduler(token_budget=24)
    for name in "abc":
        add(scheduler, name, list(LOOP))
    scheduler.update(scheduler.schedule(), {name: [5] for name in "abc"})
    scheduler.token_budget = 9
    # 9 tokens: three decodes, four drafts of the oldest and what is left, for the next.
    assert drafts_of(scheduler.schedule()) == {"a": (6, 7, 8, 5), "b": (6, 7), "c": ()}


def test_prompts_keep_at_least_half_of_what_the_decodes_leave():
    scheduler = make_scheduler(token_budget=8)
    prefilled(scheduler)
    add(scheduler, "b", list(range(100, 120)))
    output = scheduler.schedule()
    assert drafts_of(output) == {"a": (6, 7, 8), "b": ()}
    assert [p.num_scheduled_tokens for p in output.scheduled] == [4, 4]


@pytest.mark.parametrize(("num_blocks", "num_drafts"), [(5, 4), (4, 3)])
def test_drafts_take_no_block_that_a_running_request_may_need(num_blocks, num_drafts):
    scheduler = make_scheduler(num_blocks=num_blocks)
    request = prefilled(scheduler)
    # Of the 9 tokens the last lies in the third block: three drafts fit, the fourth needs another one.
    assert len(drafts_of(scheduler.schedule())["a"]) == num_drafts
    assert len(request.block_ids) == num_drafts


def test_a_step_that_preempts_has_no_drafts():
    scheduler = make_scheduler(num_blocks=5)
    for name, first in (("a", 0), ("b", 20)):
        add(scheduler, name, [first + t for t in LOOP])
    scheduler.update(scheduler.schedule(), {"a": [5], "b": [25]})
    output = scheduler.schedule()
    assert output.preempted_ids == ("b",)
    assert drafts_of(output) == {"a": ()}


def test_a_request_aborted_while_its_drafts_are_verified_is_left_alone():
    scheduler = make_scheduler()
    request = prefilled(scheduler)
    output = scheduler.schedule()
    scheduler.finish_request("a", RequestStatus.FINISHED_ABORTED)
    assert scheduler.update(output, {"a": [6, 7]}) == []
    assert request.num_tokens == 9
    assert scheduler.total_draft_tokens == 0


# The engine


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
