"""Against transformers on the same weights: logits of small random models, text of SmolLM2."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig

import kernels
from engine.checkpoint import open_checkpoint
from engine.models.build import build_model
from engine.models.llama import KVCache
from tests.engine.helpers import greedy, make_core, run_all, save_random_llama
from tests.kernels.helpers import step

LENGTH = 200
LONG_FACTORS = [1.0 + 0.5 * i for i in range(8)]

CONFIGS = {
    "mha": {"num_key_value_heads": 4},
    "gqa-2": {"num_key_value_heads": 2},
    "mqa": {"num_key_value_heads": 1},
    "gqa-3": {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16, "hidden_size": 96},
    "wide-heads": {"head_dim": 32},
    "odd-head-dim": {"head_dim": 24},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    "dynamic": {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}},
    "llama3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
            "rope_theta": 10000.0,
        }
    },
    "yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "rope_theta": 10000.0,
        }
    },
    "longrope": {
        "rope_parameters": {
            "rope_type": "longrope",
            "short_factor": [1.0] * 8,
            "long_factor": LONG_FACTORS,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "rope_theta": 10000.0,
        },
        "original_max_position_embeddings": 64,
    },
}


def our_logits(path: Path, token_ids: torch.Tensor) -> torch.Tensor:
    checkpoint = open_checkpoint(path)
    model = build_model(
        checkpoint,
        max_model_len=256,
        dtype=torch.float32,
        device=torch.device("cpu"),
        keep_packed=False,
    )
    num_blocks = 16
    cache = KVCache.allocate(checkpoint.config, num_blocks, 16, torch.float32, torch.device("cpu"))
    hidden = model.forward(token_ids, cache, step([(0, len(token_ids))], num_blocks))
    return model.logits(hidden)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_match_transformers(tmp_path, name):
    reference = save_random_llama(tmp_path, **CONFIGS[name])
    token_ids = torch.randint(0, 199, (LENGTH,), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = reference(token_ids.unsqueeze(0)).logits[0]
        got = our_logits(tmp_path, token_ids)
    assert float(expected.std()) > 0.3  # a model that says nothing would match anything
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=0)


GEMMA3 = {
    "vocab_size": 199,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "sliding_window": 32,
    "query_pre_attn_scalar": 24,
    "initializer_range": 0.15,
}


@pytest.mark.parametrize("is_legacy", [False, True])
def test_gemma3_logits_match_transformers(tmp_path, is_legacy):
    """Local and global layers, two rotary bases, norms around each block, offset norms, gelu."""
    torch.manual_seed(0)
    reference = Gemma3ForCausalLM(Gemma3TextConfig(**GEMMA3)).float().eval()
    for name, parameter in reference.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    reference.save_pretrained(tmp_path)
    if is_legacy:
        config = json.loads((tmp_path / "config.json").read_text())
        rope = config.pop("rope_parameters")
        config["rope_theta"] = rope["full_attention"]["rope_theta"]
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        config["sliding_window_pattern"] = 6
        del config["layer_types"]
        (tmp_path / "config.json").write_text(json.dumps(config))
    token_ids = torch.randint(0, 199, (LENGTH,), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = reference(token_ids.unsqueeze(0)).logits[0]
        got = our_logits(tmp_path, token_ids)
    assert float(expected.std()) > 0.3
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=0)


def test_legacy_rope_scaling_is_read(tmp_path):
    reference = save_random_llama(tmp_path, **CONFIGS["llama3"])
    config = json.loads((tmp_path / "config.json").read_text())
    config["rope_scaling"] = config.pop("rope_parameters")
    config["rope_theta"] = config["rope_scaling"].pop("rope_theta")
    (tmp_path / "config.json").write_text(json.dumps(config))
    token_ids = torch.arange(100)
    with torch.inference_mode():
        expected = reference(token_ids.unsqueeze(0)).logits[0]
        torch.testing.assert_close(our_logits(tmp_path, token_ids), expected, atol=1e-3, rtol=0)


PROMPTS = [
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Explain photosynthesis to a child.",
    "def fibonacci(n):",
    "List three uses of copper.",
    "Translate 'good morning' into Spanish.",
    "Why is the sky blue?",
    "Give me a recipe for pancakes.",
    "Who wrote Romeo and Juliet?",
    "What is 17 times 23?",
    "Summarize the plot of Hamlet in two sentences.",
    "Describe a rainy day in Paris.",
    "How do vaccines work?",
    "Name five European rivers.",
    "What is a black hole?",
    "Write a short poem about autumn leaves.",
    "How can I learn to play the guitar?",
    "What is the difference between a list and a tuple in Python?",
    "Tell me a joke about computers.",
    "What causes earthquakes?",
    "Write a polite email to decline a meeting.",
    "Explain the rules of chess briefly.",
    "What is machine learning?",
    "How far is the moon from the earth?",
    "Suggest a name for a grey cat.",
    "What are the primary colors?",
    "Write a SQL query that counts the rows of a table.",
    "How do I boil an egg?",
    "What is the boiling point of water at high altitude?",
    "Describe your favorite book.",
]


@pytest.fixture(scope="module")
def prompt_ids(smollm2) -> list[list[int]]:
    tokenizer = open_checkpoint(smollm2).load_tokenizer()
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": p}], add_generation_prompt=True, return_dict=False
        )
        for p in PROMPTS
    ]


@pytest.fixture(scope="module")
def reference_model(smollm2):
    return AutoModelForCausalLM.from_pretrained(
        str(smollm2.parent), gguf_file=smollm2.name, dtype=torch.float32, local_files_only=True
    ).eval()


def greedy_disagreements(
    model, prompt_ids: list[list[int]], outputs: list[list[int]]
) -> list[tuple[int, int]]:
    """(prompt, position) pairs where transformers, given all before, would have chosen another token.

    Without any, the outputs are exactly its greedy outputs (by induction over the positions), for a
    fraction of the time that generating them takes.
    """
    found = []
    with torch.inference_mode():
        for i, (prompt, output) in enumerate(zip(prompt_ids, outputs, strict=True)):
            logits = model(torch.tensor([prompt + output])).logits[0, len(prompt) - 1 : -1]
            chosen = logits.argmax(dim=-1).tolist()
            found += [(i, j) for j, (a, b) in enumerate(zip(chosen, output, strict=True)) if a != b]
    return found


def greedy_outputs(path: Path, dtype: str, prompt_ids: list[list[int]]) -> list[list[int]]:
    core = make_core(path, num_blocks=600, dtype=dtype)
    got = run_all(core, {f"r{i}": (ids, greedy(64)) for i, ids in enumerate(prompt_ids)})
    return [got[f"r{i}"] for i in range(len(prompt_ids))]


@pytest.mark.model
def test_greedy_text_of_smollm2_equals_transformers(smollm2, prompt_ids, reference_model):
    """30 prompts x 64 tokens in float32, all in one batch."""
    outputs = greedy_outputs(smollm2, "float32", prompt_ids)
    assert [len(o) for o in outputs] == [64] * 30
    assert greedy_disagreements(reference_model, prompt_ids, outputs) == []


@pytest.mark.model
@pytest.mark.skipif(
    kernels.backend_name() != "native", reason="the reference computes packed weights in float32"
)
def test_packed_weights_give_the_same_text(smollm2, prompt_ids, reference_model):
    """The Q4_1 weights as they are: 16-bit activations leave greedy decoding where float32 has it."""
    outputs = greedy_outputs(smollm2, "auto", prompt_ids)
    assert greedy_disagreements(reference_model, prompt_ids, outputs) == []


def test_the_tokenizer_is_the_checkpoints(smollm2):
    ours = open_checkpoint(smollm2).load_tokenizer()
    theirs = AutoTokenizer.from_pretrained(str(smollm2.parent), gguf_file=smollm2.name, local_files_only=True)
    text = "Grüße, <|im_start|> 世界 🎉!\n\tdef f(x): return x"
    assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    assert ours.chat_template == theirs.chat_template
