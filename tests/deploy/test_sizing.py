"""Sizes by the engine's arithmetic, against the memory that benchmarks on an H100 found."""

import json
from pathlib import Path

import pytest
import torch

from deploy import sizing
from engine import EngineConfig, model_runner
from engine.cuda import prefill
from engine.models.shapes import SHAPES

DOCS = Path(__file__).parents[2] / "docs"
# `peregrine bench engine`: prompts of 128, 128 steps, 128 more; 4,096 tokens at least.
STREAM_TOKENS, LEAST_TOKENS = 384, 4096


def measured() -> list[dict]:
    rows = json.loads((DOCS / "benchmarks" / "engine.json").read_text())["rows"]
    return [row for row in rows if "memory_gb" in row and "date" not in row]


def test_sizes_are_those_of_the_card(monkeypatch):
    monkeypatch.setattr(prefill, "_GRAPH_TOKENS", 1024)  # as it was when the rows were measured
    runs = {(row["shape"], row["bits"], row["largest_batch"]): row["memory_gb"] for row in measured()}
    assert len(runs) >= 3
    for (shape, bits, batch), memory_gb in runs.items():
        size = sizing.size_of(
            SHAPES[shape], bits, EngineConfig("", max_num_seqs=max(16, batch), max_model_len=4096)
        )
        tokens = max(LEAST_TOKENS, STREAM_TOKENS * batch)
        total = size.weight_bytes + size.workspace_bytes + tokens * size.kv_bytes_per_token["auto"]
        assert total / 1e9 == pytest.approx(memory_gb, rel=0.02), (shape, bits)


def test_the_cache_gets_what_the_engine_would_give_it(monkeypatch):
    size = sizing.size_of(SHAPES["8b"], 4.25)
    mib = sizing.GPUS["H100 80 GB"]
    free = mib * 2**20 - sizing._CONTEXT_BYTES - size.weight_bytes
    monkeypatch.setattr(model_runner, "_available_bytes", lambda device: free)
    config = EngineConfig("")
    blocks = model_runner.size_kv_cache(
        config, 8192, size.kv_bytes_per_token["auto"], torch.device("cuda"), size.workspace_bytes
    )
    assert size.kv_tokens(mib, "auto") == blocks * config.block_size
    assert size.kv_tokens(mib, "fp8") > 1.8 * size.kv_tokens(mib, "auto")
    assert size.kv_tokens(10_000, "auto") > 0
    assert size.kv_tokens(4_000, "auto") == 0


def test_the_page_is_current():
    text = (DOCS / "sizing.md").read_text()
    assert sizing.page(text) == text, "run: python -m deploy.sizing docs/sizing.md"


def test_a_config_json_has_a_size(tmp_path):
    raw = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 32000,
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 4,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    }
    (tmp_path / "config.json").write_text(json.dumps(raw))
    (first, *_) = sizing.rows({"own": sizing.shape_of(tmp_path)}, (4.25,))
    assert first["kv_bytes_per_token"] == 2 * 4 * 4 * 64 * 2
    assert 0 < first["weight_gb"] < 0.2
