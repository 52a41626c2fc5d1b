"""Shapes of well-known models, for benchmarks on random weights."""

from engine.models.config import ModelConfig, RopeConfig


def _llama(layers: int, hidden: int, ffn: int, heads: int, vocab: int) -> ModelConfig:
    return ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=8,
        head_dim=128,
        rms_norm_eps=1e-5,
        max_position_embeddings=8192,
        rope=RopeConfig(500_000.0),
        tie_word_embeddings=False,
    )


SHAPES = {
    "8b": _llama(32, 4096, 14336, 32, 128256),  # Llama 3 8B
    "70b": _llama(80, 8192, 28672, 64, 128256),  # Llama 3 70B
    "123b": _llama(88, 12288, 28672, 96, 32768),  # Mistral Large 2
    "180b": _llama(95, 12288, 41984, 96, 32768),  # a dense model of 179e9 parameters
}
