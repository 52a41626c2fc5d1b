"""Constraints: refused by name, and held on every way a token can take; small random models."""

import json
import random
import re
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from engine import Constraint, ParameterError, SamplingParams, speculation
from engine.checkpoint import open_checkpoint
from engine.core import EngineCore
from engine.messages import AbortRequests, AddRequest, TokenOutput
from engine.structured import GrammarCompiler, GrammarState, GrammarsUnavailableError, fill_masks
from kernels.sampling import mask_bias, num_mask_words
from tests.engine.byte_models import EOS, VOCAB_SIZE, byte_llama
from tests.engine.emulated_cuda import emulate
from tests.engine.helpers import collect, greedy, make_core, save_random_llama
from tests.engine.test_cuda_runner import ON_GPU

SCHEMA = {
    "type": "object",
    "properties": {
        "ok": {"type": "boolean"},
        "n": {"type": "array", "items": {"enum": [1, 12]}, "maxItems": 4},
    },
    "required": ["ok", "n"],
    "additionalProperties": False,
}
PATTERN = "[a-c]{3,9}-[0-9]{2}"
CHOICES = ["yes", "no", "yellow", 'é\n"x"']
ARITHMETIC = 'root ::= term ("+" term){1,3}\nterm ::= [0-9] | "(" term "*" term ")"'


def is_of_schema(text: str) -> bool:
    value = json.loads(text)
    return (
        list(value) == ["ok", "n"]
        and isinstance(value["ok"], bool)
        and len(value["n"]) <= 4
        and set(value["n"]) <= {1, 12}
    )


CASES: dict[str, tuple[Constraint, Callable[[str], object]]] = {
    "json_schema": (Constraint("json_schema", json.dumps(SCHEMA)), is_of_schema),
    "regex": (Constraint("regex", PATTERN), lambda text: re.fullmatch(PATTERN, text)),
    "choice": (Constraint("choice", json.dumps(CHOICES)), lambda text: text in CHOICES),
    "grammar": (
        Constraint("grammar", ARITHMETIC),
        lambda text: re.fullmatch("[0-9(*)]+([+][0-9(*)]+){1,3}", text) and eval(text) is not None,
    ),
}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    return byte_llama(tmp_path_factory.mktemp("bytes"))


@pytest.fixture(scope="module")
def packed_dir(tmp_path_factory) -> Path:
    return byte_llama(tmp_path_factory.mktemp("packed-bytes"), is_packed=True)


@pytest.fixture(scope="module")
def grammars(model_dir) -> GrammarCompiler:
    return compiler_of(model_dir)


@pytest.fixture(autouse=True)
def one_thread():
    """Threads only get into each other's way at this size."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def compiler_of(path: Path) -> GrammarCompiler:
    checkpoint = open_checkpoint(path)
    return GrammarCompiler(
        lambda: checkpoint.load_tokenizer().backend_tokenizer,
        checkpoint.config.vocab_size,
        checkpoint.eos_token_ids,
    )


def state_of(grammars: GrammarCompiler, constraint: Constraint) -> GrammarState:
    return grammars.start(grammars.compile(constraint).result(timeout=30))


def tokens_of(text: str) -> list[int]:
    return [2 + b for b in text.encode()]


def text_of(outputs: list[TokenOutput], tokenizer) -> str:
    return tokenizer.decode([o.token_id for o in outputs if o.token_id != EOS])


def allowed(state: GrammarState, drafts: list[int] | None = None) -> list[set[int]]:
    drafts = drafts or []
    masks = np.empty((1 + len(drafts), num_mask_words(VOCAB_SIZE)), dtype=np.int32)
    fill_masks([(state, drafts)], masks)
    return [
        set(row.nonzero()[:, 0].tolist()) for row in (mask_bias(torch.from_numpy(masks), VOCAB_SIZE) == 0)
    ]


def constrained(num: int = 8, **params) -> dict[str, tuple[list[int], SamplingParams]]:
    """So many requests of all kinds, greedy ones and sampled ones."""
    rng = random.Random(3)
    names, given = list(CASES), {}
    for i in range(num):
        prompt = [rng.randrange(2, 258) for _ in range(rng.randrange(1, 40))]
        chosen = SamplingParams(
            **{"temperature": float(i % 2), "seed": i, "max_tokens": 90, **params},
            constraint=CASES[names[i % len(names)]][0],
        )
        given[f"{names[i % len(names)]}-{i}"] = prompt, chosen
    return given


def check_held(path: Path, outputs: dict[str, list[TokenOutput]], expect_all: bool = True) -> None:
    tokenizer = open_checkpoint(path).load_tokenizer()
    num_complete = 0
    for request_id, tokens in outputs.items():
        text = text_of(tokens, tokenizer)
        if tokens[-1].finish_reason == "stop":
            assert tokens[-1].token_id == EOS
            assert CASES[request_id.partition("-")[0]][1](text), (request_id, text)
            num_complete += 1
        else:
            assert tokens[-1].finish_reason == "length"
    assert num_complete == len(outputs) or not expect_all


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        ("json_schema", {"not": {"type": "string"}}, "not"),
        ("json_schema", {"type": "array", "uniqueItems": True}, "uniqueItems"),
        ("json_schema", {"type": "array", "contains": {"const": 1}}, "contains"),
        ("json_schema", {"type": "object", "propertyNames": {"pattern": "a"}}, "propertyNames"),
        ("json_schema", {"if": {"type": "string"}, "x-guidance": {"lenient": True}}, "if"),
        ("json_schema", {"type": "string", "format": "iri"}, "iri"),
        ("json_schema", {"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ("json_schema", {"type": "text"}, "text"),
        ("json_schema", {"$ref": "#/$defs/nowhere"}, "nowhere"),
        ("json_schema", {"$ref": "https://example.org/schema"}, "example.org"),
        ("json_schema", {"$ref": "#"}, "cannot|stop|empty|not supported"),
        ("json_schema", {"type": "integer", "minimum": 3, "maximum": 2}, "minimum"),
        ("json_schema", {"oneOf": [{"minLength": 2}, {"maxLength": 3}]}, "oneOf"),
        ("json_schema", False, "empty"),
        ("regex", "a(", "unclosed group"),
        ("regex", r"(a)\1", "backreferences"),
        ("regex", r"\bword", "lookaround"),
        ("grammar", "start: missing", "missing"),
        ("grammar", "root ::= missing", "missing"),
        ("grammar", "neither", "."),
    ],
)
def test_what_cannot_be_held_is_refused_by_name(grammars, kind, value, message):
    text = json.dumps(value) if kind == "json_schema" else value
    with pytest.raises(ParameterError, match=message) as caught:
        grammars.compile(Constraint(kind, text, "guided")).result(timeout=30)
    assert caught.value.field == "guided"


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("xml", ""),
        ("json_object", "{}"),
        ("json_schema", ""),
        ("json_schema", "[1]"),
        ("json_schema", "[" * 100_000),
        ("choice", "[]"),
        ("choice", '["a", 1]'),
        ("choice", '[""]'),
        ("choice", '"a"'),
        ("regex", ""),
        ("grammar", "  "),
    ],
)
def test_values_of_another_form_are_refused_at_birth(kind, value):
    with pytest.raises(ParameterError, match="response_format"):
        Constraint(kind, value, "response_format")


def test_an_output_without_end_has_no_constraint():
    with pytest.raises(ParameterError, match="ignore_eos"):
        SamplingParams(ignore_eos=True, constraint=Constraint("json_object"))


def test_the_deepest_schemas_are_refused_not_followed(grammars):
    nested = '{"items":' * 900 + "{}" + "}" * 900
    with pytest.raises(ParameterError, match="recursion"):
        grammars.compile(Constraint("json_schema", nested)).result(timeout=30)


def test_a_model_without_tokenizer_or_end_has_no_grammars(tmp_path):
    save_random_llama(tmp_path)
    with pytest.raises(Exception, match=r".") as caught:
        compiler_of(tmp_path).compile(Constraint("json_object")).result(timeout=30)
    assert caught.type.__module__.startswith("engine")
    backend = open_checkpoint(byte_llama(tmp_path)).load_tokenizer().backend_tokenizer
    endless = GrammarCompiler(lambda: backend, VOCAB_SIZE, frozenset())
    with pytest.raises(GrammarsUnavailableError, match="end-of-sequence"):
        endless.compile(Constraint("json_object")).result(timeout=30)


def test_without_the_library_the_error_says_so(model_dir, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    backend = open_checkpoint(model_dir).load_tokenizer().backend_tokenizer
    grammars = GrammarCompiler(lambda: backend, VOCAB_SIZE + 1, frozenset({EOS}))
    with pytest.raises(GrammarsUnavailableError, match="llguidance, which is not installed"):
        grammars.compile(Constraint("json_object")).result(timeout=30)


def test_compiled_grammars_are_kept_and_states_are_apart(grammars):
    constraint = Constraint("regex", "ab|ba")
    assert grammars.compile(constraint) is grammars.compile(Constraint("regex", "ab|ba"))
    first, second = state_of(grammars, constraint), state_of(grammars, constraint)
    assert first.accept(tokens_of("a")[0])
    assert allowed(first) == [set(tokens_of("b"))]
    assert allowed(second) == [set(tokens_of("ab"))]


def test_masks_end_where_the_grammar_may_end(grammars):
    state = state_of(grammars, Constraint("regex", "a{1,2}"))
    a = tokens_of("a")[0]
    assert allowed(state) == [{a}]
    assert state.accept(a)
    assert allowed(state) == [{a, EOS}]
    assert state.accept(a)
    assert allowed(state) == [{EOS}]
    assert state.accept(EOS)
    assert state.error is None


def test_drafts_are_cut_to_what_is_accepted_and_masked_one_by_one(grammars):
    state = state_of(grammars, Constraint("regex", "abc"))
    a, b, c = tokens_of("abc")
    assert state.num_accepted([a, b, b]) == 2
    assert state.num_accepted([a, b, c, EOS]) == 3  # an end is no draft
    assert state.num_accepted([c]) == 0
    assert allowed(state, [a, b, c]) == [{a}, {b}, {c}, {EOS}]
    assert allowed(state) == [{a}]  # it has not moved


@pytest.mark.parametrize("num", [1, 3, 9])
def test_masks_of_many_are_those_of_each(grammars, num):
    wanted = []
    for i in range(num):
        state = state_of(grammars, CASES[list(CASES)[i % len(CASES)]][0])
        wanted.append(
            (state, [] if i % 2 else tokens_of('{"ok":')[: state.num_accepted(tokens_of('{"ok":'))])
        )
    masks = np.empty((sum(1 + len(d) for _, d in wanted), num_mask_words(VOCAB_SIZE)), dtype=np.int32)
    fill_masks(wanted, masks)
    rows = [set(r.nonzero()[:, 0].tolist()) for r in (mask_bias(torch.from_numpy(masks), VOCAB_SIZE) == 0)]
    assert rows == [row for state, drafts in wanted for row in allowed(state, drafts)]


def test_a_failed_grammar_ends_its_request(grammars):
    state = state_of(grammars, Constraint("regex", "abc"))
    assert not state.accept(tokens_of("x")[0])
    assert state.error
    assert len(allowed(state)[0]) == VOCAB_SIZE
    assert not state.accept(tokens_of("a")[0])


@pytest.mark.parametrize(
    "overrides",
    [{}, {"token_budget": 9, "max_num_seqs": 4}, {"num_blocks": 10, "max_model_len": 160}],
    ids=["roomy", "chunked", "preempted"],
)
def test_every_output_is_of_its_language(model_dir, overrides):
    core = make_core(model_dir, **overrides)
    outputs = collect(core, constrained(12))
    check_held(model_dir, outputs)
    assert (core.stats().num_running, core.stats().num_free_blocks) == (0, core.stats().num_blocks)
    assert core.stats().total_preemptions > 0 or "num_blocks" not in overrides


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1.0, "top_p": 0.5, "top_k": 3, "min_p": 0.2},
        {"repetition_penalty": 2.0, "presence_penalty": 2.0, "frequency_penalty": -2.0},
        {"logit_bias": {**dict.fromkeys(range(2, 100), -100.0), EOS: -100.0, 200: 100.0}},
        {"logprobs": 3},
    ],
    ids=lambda params: next(iter(params)),
)
def test_other_parameters_choose_among_what_is_allowed(model_dir, params):
    check_held(model_dir, collect(make_core(model_dir), constrained(**params)))


def test_an_output_that_is_cut_off_says_length(model_dir):
    outputs = collect(make_core(model_dir), constrained(4, max_tokens=2))
    assert {k: v[-1].finish_reason for k, v in outputs.items()} == dict.fromkeys(outputs, "length")


def test_the_others_are_not_touched(model_dir):
    free = {f"free{i}": ([5 + i, 9], greedy(20)) for i in range(3)}
    expected = collect(make_core(model_dir), free)
    outputs = collect(make_core(model_dir), {**constrained(4), **free})
    for request_id in free:
        assert [o.token_id for o in outputs[request_id]] == [o.token_id for o in expected[request_id]]


@pytest.mark.parametrize(
    "overrides", [{}, {"num_blocks": 12, "max_model_len": 160}], ids=["roomy", "preempted"]
)
def test_drafts_change_nothing(model_dir, overrides, monkeypatch):
    monkeypatch.setitem(speculation._TOKEN_COST, "cpu", 0.0)  # whatever can be drafted is
    phrase = tokens_of('{"ok": true, "n": [1, 12, 1, 12]} yes no aaa-12 1+2+3 ')
    requests = {k: (phrase * 2, p) for k, (_, p) in constrained(8).items()}
    expected = collect(make_core(model_dir, speculative_tokens=0), requests)
    core = make_core(model_dir, speculative_tokens=5, **overrides)
    outputs = collect(core, requests)
    assert core.stats().total_draft_tokens > 0
    for request_id in requests:
        assert [o.token_id for o in outputs[request_id]] == [o.token_id for o in expected[request_id]]
    check_held(model_dir, outputs)


def test_a_grammar_that_the_core_cannot_compile_aborts_its_request_alone(model_dir):
    core = make_core(model_dir)
    bad = SamplingParams(max_tokens=4, constraint=Constraint("regex", "a("))
    outputs = collect(core, {"bad": ([5], bad), **constrained(2)})
    [end] = outputs.pop("bad")
    assert (end.token_id, end.finish_reason) == (None, "abort")
    assert "unclosed group" in str(end.stop_reason)
    check_held(model_dir, outputs)
    assert not core.has_work


def test_a_request_that_waits_for_its_grammar_can_be_aborted(model_dir):
    core = make_core(model_dir)
    params = SamplingParams(max_tokens=4, constraint=Constraint("json_object"))
    core.add_request(AddRequest("a", (5,), params, time.monotonic()))
    assert (core.has_work, core.stats().num_waiting) == (True, 1)
    with pytest.raises(ValueError, match="in use"):
        core.add_request(AddRequest("a", (5,), params, time.monotonic()))
    [end] = core.abort(AbortRequests(("a",)))
    assert end.finish_reason == "abort"
    assert not core.has_work


@pytest.fixture(params=[pytest.param("cuda", marks=ON_GPU), "emulated"])
def device(request, monkeypatch) -> str:
    if request.param == "emulated":
        emulate(monkeypatch)
    return request.param


def device_core(path: Path, device: str, **overrides) -> EngineCore:
    values = {"dtype": "auto", "max_num_seqs": 48, "speculative_tokens": 0, "num_blocks": 512, **overrides}
    core = make_core(path, device="cuda" if device == "cuda" else "cpu", prefill_precision="bf16", **values)
    if device == "cuda":
        core.warm_up()
    return core


@pytest.mark.parametrize("num", [1, 3, 12, 40])
def test_masks_come_behind_the_launch(packed_dir, device, num, monkeypatch):
    """One lane of the fused kernel, or a large batch; others run beside the constrained ones."""
    core = device_core(packed_dir, device)
    late, sample_late = [], core.runner.sample_late
    monkeypatch.setattr(core.runner, "sample_late", lambda t: (late.append(t), sample_late(t))[1])
    free = {f"free{i}": ([5 + i, 9], greedy(30)) for i in range(3)}
    outputs = collect(core, {**constrained(num), **free})
    assert late
    assert all(len(outputs.pop(k)) == 30 for k in free)
    check_held(packed_dir, outputs)
    assert core.stats().num_free_blocks == core.stats().num_blocks


@pytest.mark.parametrize(
    "overrides",
    [
        {"token_budget": 64},
        {"num_blocks": 16, "max_model_len": 256},
        {"speculative_tokens": 7},
        {"kv_cache_dtype": "fp8"},
    ],
    ids=lambda overrides: next(iter(overrides)),
)
def test_masks_hold_beside_prompts_preemptions_drafts(packed_dir, device, overrides):
    core = device_core(packed_dir, device, **overrides)
    phrase = tokens_of('{"ok": true, "n": [1, 12, 1, 12]} yes no aaa-12 1+2+3 ')
    given = constrained(20)
    for i, request_id in enumerate(list(given)):
        prompt, params = given[request_id]
        given[request_id] = ((phrase + prompt) if i % 3 else prompt), params
    check_held(packed_dir, collect(core, given))


def test_what_the_gpus_runner_says_the_cpus_says(packed_dir, device):
    """Greedy, alone: the same weights, the same masks."""
    given = {k: (p, replace(q, temperature=0.0)) for k, (p, q) in constrained(4).items()}
    expected = collect(make_core(packed_dir, dtype="float32"), given) if device == "emulated" else None
    for request_id, request in given.items():
        got = collect(device_core(packed_dir, device), {request_id: request})[request_id]
        again = collect(device_core(packed_dir, device, speculative_tokens=7), {request_id: request})[
            request_id
        ]
        assert [o.token_id for o in again] == [o.token_id for o in got]
        if expected is not None:
            assert [o.token_id for o in got] == [o.token_id for o in expected[request_id]]
