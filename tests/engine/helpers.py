"""Small random checkpoints, and engines driven by hand."""

import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from engine import EngineConfig, SamplingParams
from engine.core import EngineCore
from engine.messages import AddRequest, TokenOutput


def save_random_llama(directory: Path, seed: int = 0, **overrides: Any) -> LlamaForCausalLM:
    """A small random Llama on disk, as a Hugging Face directory without a tokenizer; returns the model."""
    values: dict[str, Any] = {
        "vocab_size": 199,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.15,  # wide enough that the logits differ clearly
        "eos_token_id": 1,
        "tie_word_embeddings": False,
        **overrides,
    }
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**values)).float().eval()
    model.save_pretrained(directory)
    return model


def make_core(path: Path, **overrides: Any) -> EngineCore:
    values: dict[str, Any] = {"num_blocks": 64, "dtype": "float32", "device": "cpu", **overrides}
    return EngineCore(EngineConfig(model=str(path), **values))


def greedy(max_tokens: int, **params: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, **params)


def run_all(core: EngineCore, requests: dict[str, tuple[list[int], SamplingParams]]) -> dict[str, list[int]]:
    """Tokens of every request, all of them given to the core at once."""
    return {k: [o.token_id for o in v] for k, v in collect(core, requests).items()}  # type: ignore[misc]


def collect(
    core: EngineCore, requests: dict[str, tuple[list[int], SamplingParams]]
) -> dict[str, list[TokenOutput]]:
    for request_id, (prompt, params) in requests.items():
        core.add_request(AddRequest(request_id, tuple(prompt), params, time.monotonic()))
    outputs: dict[str, list[TokenOutput]] = {request_id: [] for request_id in requests}
    for _ in range(10_000):
        if not core.has_work:
            return outputs
        for output in core.step().outputs:
            outputs[output.request_id].append(output)
    raise AssertionError("the core did not finish")
