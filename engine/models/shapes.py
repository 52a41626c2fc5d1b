"""Shapes of well-known models, for benchmarks on random weights."""

from engine.models.config import ModelConfig, RopeConfig


def _llama(layers: int, hidden: int, ffn: int, heads: int, vocab: int, kv_heads: int = 8) -> ModelConfig:
    return ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=128,
        rms_norm_eps=1e-5,
        max_position_embeddings=8192,
        rope=RopeConfig(500_000.0),
        tie_word_embeddings=False,
    )


SHAPES = {
    # Phi-3 mini, with 24 heads of 128 for its 32 of 96: the same matrices and the same bytes of cache, in a
    # head size that the fused kernels have.
    "3.8b": _llama(32, 3072, 8192, 24, 32064, kv_heads=24),
    "8b": _llama(32, 4096, 14336, 32, 128256),  # Llama 3 8B
    "14b": _llama(40, 5120, 17920, 40, 32064, kv_heads=10),  # Phi-3 medium
    "70b": _llama(80, 8192, 28672, 64, 128256),  # Llama 3 70B
    "123b": _llama(88, 12288, 28672, 96, 32768),  # Mistral Large 2
    "180b": _llama(95, 12288, 41984, 96, 32768),  # a dense model of 179e9 parameters
}
