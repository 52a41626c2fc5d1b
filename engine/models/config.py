"""What a checkpoint says about its model's shape, whatever format it came in."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from engine.errors import ModelLoadError
from engine.models.families import LLAMA, Family, family_of

Activation = Literal["silu", "gelu_tanh"]


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding: base and, for `kind` other than default, the scaling's own parameters."""

    theta: float = 10_000.0
    kind: str = "default"
    params: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shape of a decoder-only Transformer with GQA, RoPE, RMSNorm and a gated FFN, or several of them.

    windows: for each layer how many tokens back it sees (None: all); layers with a window use `local_rope`
    where it is given. norm_offset: what is added to a stored norm weight. attention_scale: of the scores.
    has_qk_norm: RMSNorm over each query and key head. has_post_norms: RMSNorm behind each block. rotary_dim:
    how many of a head's first dimensions rotate (None: all). nope_layers: those that do not rotate at all.
    attention_softcap, final_softcap: c, where scores or logits x become c tanh(x / c). num_experts: FFNs of
    a layer, of which each token gets the router's best `num_experts_per_token` (0: one FFN for all).
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope: RopeConfig
    tie_word_embeddings: bool
    attention_bias: bool = False
    mlp_bias: bool = False
    windows: tuple[int | None, ...] = ()
    local_rope: RopeConfig | None = None
    activation: Activation = "silu"
    embedding_scale: float = 1.0
    norm_offset: float = 0.0
    query_scalar: float | None = None
    has_qk_norm: bool = False
    has_post_norms: bool = False
    rotary_dim: int | None = None
    nope_layers: frozenset[int] = frozenset()
    attention_softcap: float | None = None
    final_softcap: float | None = None
    num_experts: int = 0
    num_experts_per_token: int = 0

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "max_position_embeddings",
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ModelLoadError(f"config: {name} must be a positive integer, got {value!r}")
        if self.num_heads % self.num_kv_heads:
            raise ModelLoadError(
                f"config: num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}"
            )
        if self.windows and len(self.windows) != self.num_layers:
            raise ModelLoadError(
                f"config: layer_types has {len(self.windows)} entries for {self.num_layers} layers"
            )
        if any(window is not None and window < 1 for window in self.windows):
            raise ModelLoadError("config: sliding_window must be positive")
        if self.head_dim % 2:
            raise ModelLoadError(f"config: head_dim must be even for rotary embedding, got {self.head_dim}")
        if self.rotary_dim is not None and (self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_dim):
            raise ModelLoadError(
                f"config: partial_rotary_factor must have an even number of a head's {self.head_dim} "
                f"dimensions rotate, not {self.rotary_dim}"
            )
        for name in ("attention_softcap", "final_softcap"):
            cap = getattr(self, name)
            if cap is not None and not cap > 0:
                raise ModelLoadError(f"config: {name} must be positive, got {cap}")
        if not 0 <= self.num_experts_per_token <= self.num_experts or (
            self.num_experts and not self.num_experts_per_token
        ):
            raise ModelLoadError(
                f"config: num_experts_per_tok {self.num_experts_per_token} must be 1 to num_local_experts "
                f"{self.num_experts}"
            )

    @property
    def family(self) -> Family:
        """Declaration of the architecture (Llama's for shapes made up by hand)."""
        return family_of(self.architecture) or LLAMA

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def attention_scale(self) -> float:
        return float(self.query_scalar or self.head_dim) ** -0.5

    def window(self, layer: int) -> int | None:
        return self.windows[layer] if self.windows else None

    def matrix_shape(self, module: str) -> tuple[int, int] | None:
        """[N, K] of a matrix by the last part of its module's name; None where there is none of that name."""
        hidden, ffn = self.hidden_size, self.intermediate_size
        return {
            "embed_tokens": (self.vocab_size, hidden),
            "lm_head": (self.vocab_size, hidden),
            "q_proj": (self.q_size, hidden),
            "k_proj": (self.kv_size, hidden),
            "v_proj": (self.kv_size, hidden),
            "o_proj": (hidden, self.q_size),
            "gate_proj": (ffn, hidden),
            "up_proj": (ffn, hidden),
            "down_proj": (hidden, ffn),
        }.get(module.rpartition(".")[2])

    def num_kv_bytes_per_token(self, element_bytes: int) -> int:
        return 2 * self.num_layers * self.kv_size * element_bytes
