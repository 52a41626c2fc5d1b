"""GGUF's tensor types, each in a whole file: legacy, K- and I-quants, ternary, and 4-bit floats.

The library cannot quantize to most of them, so that blocks are random bytes: any bytes are a block, if its
scales are ordinary numbers. What is tested is this project's part: q and k rows put back into Hugging Face's
order while they are packed, the packed formats, and the model on top.
"""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import kernels
from engine.checkpoint import open_checkpoint
from engine.errors import ModelLoadError
from tests.engine.test_parity import our_logits

Type = gguf.GGMLQuantizationType
HIDDEN, FFN, HEADS, KV_HEADS, LAYERS, VOCAB = 256, 512, 4, 2, 2, 199
NUM_BLOCKS = 64  # different ones
FLOATS = (Type.F32, Type.F16, Type.BF16)
PACKED = (Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0)
DEQUANTIZED = (
    *(Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.Q5_K, Type.Q6_K),
    *(Type.IQ1_S, Type.IQ1_M, Type.IQ2_XXS, Type.IQ2_XS, Type.IQ2_S, Type.IQ3_XXS, Type.IQ3_S),
    *(Type.IQ4_NL, Type.IQ4_XS, Type.TQ1_0, Type.TQ2_0, Type.MXFP4, Type.NVFP4),
)
UNKNOWN = (Type.Q8_1, Type.Q8_K, Type.I8, Type.I32)
SHAPES = {
    "attn_q": (HIDDEN, HIDDEN),
    "attn_k": (HIDDEN // 2, HIDDEN),
    "attn_v": (HIDDEN // 2, HIDDEN),
    "attn_output": (HIDDEN, HIDDEN),
    "ffn_gate": (FFN, HIDDEN),
    "ffn_up": (FFN, HIDDEN),
    "ffn_down": (HIDDEN, FFN),
}
HF_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
INTERLEAVED = {"attn_q": HEADS, "attn_k": KV_HEADS}


def random_blocks(kind: Type, shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """uint8 [N, row bytes] of some blocks whose largest value is 0.01 to 0.3."""
    size, num_bytes = gguf.GGML_QUANT_SIZES[kind]
    found: list[np.ndarray] = []
    while len(found) < NUM_BLOCKS:
        raw = rng.integers(0, 256, (8 * NUM_BLOCKS, num_bytes), dtype=np.uint8)
        with np.errstate(all="ignore"):
            largest = np.abs(gguf.quants.dequantize(raw, kind)).reshape(len(raw), -1).max(axis=1)
        found.extend(raw[(largest > 0.01) & (largest < 0.3)])
    chosen = rng.integers(0, NUM_BLOCKS, shape[0] * shape[1] // size)
    return np.stack(found)[chosen].reshape(shape[0], -1)


def deinterleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp keeps a head's rows as pairs (i, i + half); Hugging Face as two halves."""
    rows = torch.arange(len(weight)).view(heads, -1)
    return weight[torch.cat([rows[:, ::2], rows[:, 1::2]], dim=1).flatten()]


def write(path: Path, kind: Type) -> dict[str, torch.Tensor]:
    """A random Llama whose matrices are of one type; its weights under Hugging Face's names."""
    rng = np.random.default_rng(kind.value)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(256)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10_000.0)
    weights = {}

    def add(name: str, hf_name: str, values: np.ndarray) -> None:
        writer.add_tensor(name, values.astype(np.float32))
        weights[hf_name] = torch.from_numpy(values.astype(np.float32))

    add("token_embd.weight", "model.embed_tokens.weight", rng.normal(size=(VOCAB, HIDDEN)))
    add("output.weight", "lm_head.weight", rng.normal(size=(VOCAB, HIDDEN)) * 0.1)
    add("output_norm.weight", "model.norm.weight", rng.normal(size=HIDDEN) * 0.1 + 1)
    for layer in range(LAYERS):
        for name, hf_name in (("attn_norm", "input_layernorm"), ("ffn_norm", "post_attention_layernorm")):
            values = rng.normal(size=HIDDEN) * 0.1 + 1
            add(f"blk.{layer}.{name}.weight", f"model.layers.{layer}.{hf_name}.weight", values)
        for name, shape in SHAPES.items():
            if kind in FLOATS:
                raw = gguf.quants.quantize(rng.normal(size=shape).astype(np.float32) * 0.1, kind)
            else:
                raw = random_blocks(kind, shape, rng)
            writer.add_tensor(f"blk.{layer}.{name}.weight", raw, raw_dtype=kind)
            weight = torch.from_numpy(np.array(gguf.quants.dequantize(raw, kind), dtype=np.float32)).view(
                shape
            )
            if name in INTERLEAVED:
                weight = deinterleaved(weight, INTERLEAVED[name])
            weights[f"model.layers.{layer}.{HF_NAMES[name]}.weight"] = weight
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


@pytest.mark.parametrize("kind", [*FLOATS, *PACKED, *DEQUANTIZED], ids=lambda k: k.name)
def test_every_type_has_its_values_and_logits(tmp_path, kind):
    """Every value exactly, packed where there is a form for it, and logits as transformers computes them."""
    path = tmp_path / "model.gguf"
    weights = write(path, kind)
    checkpoint = open_checkpoint(path)
    for name, expected in weights.items():
        got = checkpoint.tensor(name, keep_packed=True)
        assert isinstance(got, kernels.PackedWeight) == (kind in PACKED and "proj" in name)
        if isinstance(got, kernels.PackedWeight):
            got = kernels.dequantize(got)
        assert torch.equal(got, expected), name
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        rms_norm_eps=1e-6,
        max_position_embeddings=256,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).float().eval()
    model.load_state_dict(weights)
    token_ids = torch.randint(0, VOCAB, (60,), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = model(token_ids[None]).logits[0]
        torch.testing.assert_close(our_logits(path, token_ids), expected, atol=1e-3, rtol=0)


def write_one(path: Path, kind: Type, *, has_scale: bool = False) -> None:
    """A file with nothing but an embedding and one zero matrix."""
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(1)
    writer.add_context_length(256)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tensor("token_embd.weight", np.zeros((VOCAB, HIDDEN), dtype=np.float32))
    size, num_bytes = gguf.GGML_QUANT_SIZES[kind]
    raw = np.zeros((HIDDEN, FFN // size * num_bytes), dtype=np.uint8)
    writer.add_tensor("blk.0.ffn_down.weight", raw, raw_dtype=kind)
    if has_scale:
        writer.add_tensor("blk.0.ffn_down.scale", np.ones(1, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("kind", UNKNOWN, ids=lambda k: k.name)
def test_types_that_no_weight_has_are_refused_by_name(tmp_path, kind):
    write_one(tmp_path / "model.gguf", kind)
    with pytest.raises(ModelLoadError, match=rf"blk\.0\.ffn_down\.weight.*{kind.name}"):
        open_checkpoint(tmp_path / "model.gguf").tensor(
            "model.layers.0.mlp.down_proj.weight", keep_packed=True
        )


def test_a_scale_beside_a_weight_is_not_overlooked(tmp_path):
    """llama.cpp multiplies by it; NVFP4 files have them."""
    write_one(tmp_path / "model.gguf", Type.NVFP4, has_scale=True)
    with pytest.raises(
        ModelLoadError, match=r"blk\.0\.ffn_down\.scale: scales beside a weight are not supported"
    ):
        open_checkpoint(tmp_path / "model.gguf").tensor(
            "model.layers.0.mlp.down_proj.weight", keep_packed=True
        )
