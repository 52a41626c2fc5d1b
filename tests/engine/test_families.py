"""Every model family against transformers, on small random models with all features of the family on."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gguf import GGUFWriter

import kernels
from deploy.bench.parity.forms import FORMS
from deploy.bench.parity.measure import NEW_TOKENS, compare, our_logits
from deploy.bench.parity.models import MODELS, ORIGINAL_LENGTH, SmallModel, save
from engine.checkpoint import open_checkpoint
from engine.cuda import UnsupportedError
from engine.cuda.weights import load_weights
from engine.errors import ModelLoadError
from engine.models.families import SUPPORTED_ARCHITECTURES
from engine.models.hf_config import from_hf_config, to_hf_config
from engine.models.layerwise import DecoderLayers, linear_name, linears
from engine.models.rope import LayerRopes
from engine.quality.divergence import head_table, hidden_states

BY_NAME = {model.name: model for model in MODELS}
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 199,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def check_parity(model: SmallModel, form: str, directory: Path) -> None:
    reference = model.build(for_gguf=form.startswith("GGUF"))
    agreement = compare(FORMS[form](reference, directory), reference)
    assert agreement.logit_std > 0.3  # a model that says nothing would match anything
    assert agreement.max_abs_diff < 1e-4
    assert agreement.num_equal == agreement.num_tokens == 2 * NEW_TOKENS
    assert agreement.num_cached >= 64


@pytest.mark.parametrize("name", BY_NAME)
def test_logits_and_greedy_tokens_are_those_of_transformers(tmp_path, name):
    """In chunks and single tokens over the paged cache, past window and first context, with prefix hits."""
    check_parity(BY_NAME[name], "safetensors", tmp_path)


@pytest.mark.parametrize("name", BY_NAME)
def test_gguf_files_give_the_same(tmp_path, name):
    check_parity(BY_NAME[name], "GGUF Q8_0", tmp_path)


@pytest.mark.parametrize("name", ["Phi-4 mini", "Qwen2", "Gemma 2", "SmolLM3"])
def test_quantized_checkpoints_give_the_same(tmp_path, name):
    """As transformers does with the dequantized weights."""
    check_parity(BY_NAME[name], "peregrine", tmp_path)


def test_experts_are_quantized_one_by_one(tmp_path):
    check_parity(BY_NAME["Mixtral"], "peregrine", tmp_path)
    config = json.loads((tmp_path / "quantized" / "config.json").read_text())
    formats = config["quantization_config"]["formats"]
    experts = [
        f"model.layers.{layer}.mlp.experts.{i}.{name}_proj.weight"
        for layer in range(2)
        for i in range(8)
        for name in ("gate", "up", "down")
    ]
    assert set(experts) <= set(formats)
    assert len({formats[name] for name in experts}) > 1  # the allocation tells them apart
    assert not any("mlp.gate." in name for name in formats)  # the router stays in floats


@pytest.mark.parametrize("name", ["Mixtral", "Phi-4 mini", "Gemma 2", "Gemma 3", "SmolLM3"])
def test_the_layerwise_forward_pass_is_the_models(tmp_path, name):
    reference = BY_NAME[name].build()
    checkpoint = open_checkpoint(save(reference, tmp_path))
    tokens = torch.randint(3, 199, (2, 80), generator=torch.Generator().manual_seed(3))
    layers = DecoderLayers(checkpoint, 80)
    got = layers.logits(hidden_states(checkpoint, tokens), head_table(checkpoint))
    with torch.inference_mode():
        torch.testing.assert_close(got, reference(tokens).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["Gemma 2", "Mixtral", "Phi-4 mini"])
def test_packed_weights_run_on_the_cpu_kernels(tmp_path, name):
    """Soft caps natively, experts with native products, partial rotation by reordered rows."""
    reference = BY_NAME[name].build()
    checkpoint = open_checkpoint(FORMS["peregrine"](reference, tmp_path))
    tokens = torch.randint(3, 199, (120,), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        expected = reference(tokens[None]).logits[0]
        got = our_logits(checkpoint, tokens, keep_packed=True)
    torch.testing.assert_close(got, expected, atol=2e-2, rtol=0)  # inputs of products have 16 bits


@pytest.mark.parametrize("name", BY_NAME)
def test_configs_survive_a_round_trip(name, tmp_path):
    config = open_checkpoint(save(BY_NAME[name].build(), tmp_path)).config
    assert from_hf_config(to_hf_config(config)) == config


def test_longrope_takes_the_short_factors_up_to_the_original_length(tmp_path):
    reference = BY_NAME["Phi-3 mini"].build()
    config = open_checkpoint(save(reference, tmp_path)).config
    positions = torch.arange(ORIGINAL_LENGTH)[None]
    cos, sin = reference.model.rotary_emb(torch.zeros(1), positions)
    half = config.head_dim // 2
    for got, expected in zip(LayerRopes(config, ORIGINAL_LENGTH).of(0), (cos, sin), strict=True):
        torch.testing.assert_close(got, expected[0, :, :half], atol=1e-5, rtol=0)
    longer, _ = LayerRopes(config, ORIGINAL_LENGTH + 1).of(0)
    assert not torch.allclose(longer[:ORIGINAL_LENGTH], cos[0, :, :half], atol=1e-2)


@pytest.mark.parametrize(("name", "what"), [("Mixtral", "experts"), ("Gemma 2", "soft caps")])
def test_the_fused_gpu_kernels_say_what_they_lack(tmp_path, name, what):
    checkpoint = open_checkpoint(save(replace(BY_NAME[name], values=wide_heads(name)).build(), tmp_path))
    with pytest.raises(UnsupportedError, match=what):
        load_weights(checkpoint, 128, torch.device("cpu"))


def wide_heads(name: str) -> dict[str, object]:
    return {**BY_NAME[name].values, "head_dim": 64}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["FalconForCausalLM"]}, r"FalconForCausalLM is not supported \(supported: Llama"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is not supported for LlamaForCausalLM"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is not supported for LlamaForCausalLM"),
        ({"num_local_experts": 8}, "num_local_experts is not supported for LlamaForCausalLM"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is not supported for LlamaForCausalLM"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention is not supported"),
        ({"hidden_act": "relu"}, r"hidden_act 'relu' is not supported \(supported: silu"),
        (
            {
                "architectures": ["Qwen2ForCausalLM"],
                "layer_types": ["full_attention", "linear_attention"] * 2,
            },
            "layer_types has .*linear_attention",
        ),
        (
            {"architectures": ["Phi3ForCausalLM"], "partial_rotary_factor": 0.2},
            "partial_rotary_factor must have an even number",
        ),
        (
            {"architectures": ["MixtralForCausalLM"], "num_experts_per_tok": 9},
            "num_experts_per_tok 9 must be 1 to num_local_experts 8",
        ),
        ({"architectures": ["Gemma2ForCausalLM"], "final_logit_softcapping": -1.0}, "must be positive"),
    ],
)
def test_what_is_not_supported_is_named(change, message):
    with pytest.raises(ModelLoadError, match=message):
        from_hf_config({**LLAMA, **change})


def test_every_declared_family_is_in_the_table_of_small_models():
    built = {type(model.build()).__name__ for model in MODELS}
    assert built == set(SUPPORTED_ARCHITECTURES)


def test_unknown_gguf_architectures_are_named(tmp_path):
    writer = GGUFWriter(str(tmp_path / "model.gguf"), "qwen2moe")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(
        ModelLoadError, match=r"GGUF architecture 'qwen2moe' is not supported \(supported: llama"
    ):
        open_checkpoint(tmp_path / "model.gguf").config  # noqa: B018


def test_routed_experts_are_the_weighted_sum_of_dense_ones():
    """The grouped computation beside a loop over tokens, an expert without tokens included."""
    g = torch.Generator().manual_seed(0)
    hidden, ffn, num_experts = 32, 64, 4

    def matrix(n: int, k: int) -> torch.Tensor:
        return torch.randn(n, k, generator=g) * k**-0.5

    experts = tuple(
        kernels.ExpertWeights(matrix(2 * ffn, hidden), matrix(hidden, ffn)) for _ in range(num_experts)
    )
    router = matrix(num_experts, hidden)
    router[3] = 0
    weights = kernels.MoEWeights(torch.ones(hidden), router, experts, 2, 1e-6)
    x = torch.randn(9, hidden, generator=g)
    got = x.clone()
    kernels.ffn_block(got, weights)
    for row, token in zip(got, x, strict=True):
        normed = token * (token.square().mean() + 1e-6).rsqrt()
        share = (router @ normed).softmax(0)
        best = share.topk(2).indices.tolist()
        expected = token.clone()
        for index in best:
            gate, up = (experts[index].gate_up @ normed).chunk(2)
            out = experts[index].down @ (torch.nn.functional.silu(gate) * up)
            expected += out * share[index] / share[best].sum()
        torch.testing.assert_close(row, expected, atol=1e-5, rtol=0)


def test_names_of_linears():
    config = replace(from_hf_config(LLAMA), num_experts=2, num_experts_per_token=1)
    assert linears(config)[4:6] == ("experts.0.gate_proj", "experts.0.up_proj")
    assert linear_name(3, "experts.1.down_proj") == "model.layers.3.mlp.experts.1.down_proj.weight"
