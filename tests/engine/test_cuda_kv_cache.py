"""Decoding over an e4m3 cache on a Hopper GPU, through EngineCore on random weights.

Every token is held against the logits that the prompt's kernels give for the whole sequence: it must be the
best one, or nearly as good. Both ways of decoding round the same, but for values on the edge of two codes.
"""

import random
import time
from dataclasses import replace

import pytest
import torch

from engine import EngineConfig, SamplingParams, speculation
from engine.core import EngineCore
from engine.cuda import runner
from engine.cuda.layers import Layers
from engine.cuda.prefill import Chunk, Prefill
from engine.cuda.random_model import RandomModel
from engine.messages import AddRequest
from engine.models.config import ModelConfig
from kernels.cuda import tables
from kernels.kv_cache import BLOCK_TOKENS, allocate
from kernels.reference import rms_norm
from tests.engine.test_cuda_prefill import CONFIG

HAS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HAS_HOPPER, reason="needs a Hopper GPU (sm_90)")]
DEVICE = torch.device("cuda")
MAX_LEN = 1024
NARROW = replace(CONFIG, num_heads=9, num_kv_heads=3, head_dim=64, hidden_size=768)
TIE, LEAST_EQUAL = 0.25, 0.8  # of the logits' standard deviation; see test_fp8_kv_cache.py


@pytest.fixture(scope="module", params=[CONFIG, NARROW], ids=["heads-of-128", "heads-of-64"])
def config(request) -> ModelConfig:
    return request.param


@pytest.fixture(params=["batch", "fused"], autouse=True)
def decoding(request, monkeypatch) -> None:
    """By the large-batch path, and by the fused kernel."""
    formats = ("bf16",) if request.param == "batch" else ("bf16", "fp8")
    monkeypatch.setattr(runner, "_FUSED_FORMATS", formats)


def core_of(config: ModelConfig, **overrides) -> EngineCore:
    values = {
        "max_num_seqs": 24,
        "token_budget": 512,
        "num_blocks": 512,
        "speculative_tokens": 0,
        **overrides,
    }
    engine = EngineConfig(
        "random",
        device="cuda",
        max_model_len=MAX_LEN,
        prefill_precision="bf16",
        kv_cache_dtype="fp8",
        **values,
    )
    return EngineCore(engine, RandomModel(config, 4.25))


def prompts(num: int, longest: int) -> dict[str, list[int]]:
    rng = random.Random(num)
    return {f"r{i}": [rng.randrange(512) for _ in range(rng.randrange(1, longest))] for i in range(num)}


def run_all(core: EngineCore, given: dict[str, list[int]], bias: dict[int, float] | None = None):
    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, logit_bias=bias or {})
    for request_id, prompt in given.items():
        core.add_request(AddRequest(request_id, tuple(prompt), params, time.monotonic()))
    got: dict[str, list[int]] = {k: [] for k in given}
    while core.has_work:
        for output in core.step().outputs:
            got[output.request_id].append(output.token_id)
    stats = core.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_free_blocks) == (0, 0, stats.num_blocks)
    return got


def check(config: ModelConfig, core: EngineCore, given, got, bias: dict[int, float] | None = None) -> None:
    weights, blocks = core.runner.weights, MAX_LEN // BLOCK_TOKENS
    of_cache = blocks, config.num_kv_heads, config.head_dim, "fp8", DEVICE
    caches = [(allocate(*of_cache), allocate(*of_cache)) for _ in weights.layers]
    table = torch.arange(blocks, dtype=torch.int32, device=DEVICE).unsqueeze(0)
    prefill = Prefill(Layers(weights, caches, DEVICE, "bf16"), config, table, DEVICE)
    head, num_equal, num_tokens = tables.dequantize(weights.head, torch.float32), 0, 0
    for request_id, prompt in given.items():
        output = got[request_id]
        with torch.inference_mode():
            hidden = prefill.forward([Chunk(0, 0, [*prompt, *output[:-1]])])[len(prompt) - 1 :]
            logits = rms_norm(hidden, weights.final_norm, config.rms_norm_eps) @ head.T
            spread = logits.std()
            for token_id, value in (bias or {}).items():
                logits[:, token_id] += value
        chosen = torch.tensor(output, device=DEVICE).unsqueeze(1)
        gaps = (logits.amax(1) - logits.gather(1, chosen).squeeze(1)) / spread
        assert float(gaps.max()) < TIE, f"{request_id}: {gaps.tolist()}"
        num_equal, num_tokens = num_equal + int((gaps == 0).sum()), num_tokens + len(output)
    assert num_equal > LEAST_EQUAL * num_tokens


@pytest.mark.parametrize(
    ("num", "longest", "overrides"),
    [
        (1, 300, {}),
        (24, 300, {}),
        (20, 200, {"token_budget": 40}),
        (8, 60, {"num_blocks": 12, "max_num_seqs": 8, "token_budget": 24}),
    ],
    ids=["one", "two-lanes", "chunked", "preempted"],
)
def test_greedy_tokens(config, num, longest, overrides):
    core, given = core_of(config, **overrides), prompts(num, longest)
    got = run_all(core, given)
    check(config, core, given, got)
    if "num_blocks" in overrides:
        assert core.stats().total_preemptions > 0


def test_after_warming_up_graphs_compute_the_same(config):
    core, given = core_of(config), prompts(6, 100)
    core.warm_up()
    got = run_all(core, given)
    check(config, core, given, got)


def test_prefix_hits(config):
    core, given = core_of(config), prompts(6, 200)
    run_all(core, given)
    before = core.stats().total_cached_tokens
    check(config, core, given, run_all(core, given))
    assert core.stats().total_cached_tokens > before


def test_drafts(config, monkeypatch):
    for device_type in ("cpu", "cuda"):
        monkeypatch.setitem(speculation._TOKEN_COST, device_type, 0.0)  # whatever can be drafted is
    phrase = [17, 5, 499, 150, 42]
    bias = dict.fromkeys(phrase, 8.0)  # a model that repeats itself
    core, given = core_of(config, speculative_tokens=5), {f"r{i}": phrase * (5 + i) for i in range(3)}
    check(config, core, given, run_all(core, given, bias), bias)
    assert core.stats().total_draft_tokens > 0
