"""Random weights in a real model's shape, made on the GPU: benchmarks run them without a checkpoint."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.cuda.weights import DeviceWeights, Layer
from engine.errors import ModelLoadError
from engine.models.config import ModelConfig
from engine.models.rope import rope_tables
from kernels import AttentionWeights, FFNWeights
from kernels.cuda.packing import DeviceFormat, DeviceMatrix, DeviceWeight, random_matrix

_BITS = {
    2.125: DeviceFormat(2, 128, "zero"),
    2.25: DeviceFormat(2, 64, "zero"),
    3.125: DeviceFormat(3, 128, "zero"),
    3.25: DeviceFormat(3, 64, "zero"),
    4.125: DeviceFormat(4, 128, "zero"),
    4.25: DeviceFormat(4, 64, "zero"),
    8.0: DeviceFormat(8, 0, "zero"),
}
_HEAD = DeviceFormat(6, 128, "zero")
_TABLE = DeviceFormat(4, 64, "zero")  # rows are looked up one by one


@dataclass(frozen=True, slots=True)
class RandomModel:
    """Stands in for a Checkpoint.

    bits: of the layers' matrices on average, mixed from two formats by layer. directory: has the tokenizer.
    """

    config: ModelConfig
    bits: float
    weight_format: str = "random"
    eos_token_ids: frozenset[int] = frozenset()
    directory: Path | None = None

    def has(self, name: str) -> bool:
        return False

    def tensor(self, name: str, *, keep_packed: bool) -> Any:
        raise ModelLoadError(f"{name}: random weights are made on a Hopper GPU, there are none on disk")

    def load_tokenizer(self) -> Any:
        if self.directory is None:
            raise ModelLoadError("a random model has no tokenizer")
        from engine.checkpoint.hf_directory import load_tokenizer  # safetensors: benchmarks do without

        return load_tokenizer(self.directory)

    def device_weights(self, max_model_len: int, device: torch.device) -> DeviceWeights:
        """Weights on the GPU. Raises ModelLoadError for bits outside 2.125 to 8."""
        if self.config.num_experts:
            raise ModelLoadError("random weights of routed experts are not made")
        config, generator = self.config, torch.Generator(device=device).manual_seed(0)
        cos, sin = (t.to(device) for t in rope_tables(config, max_model_len))

        def one(n: int, k: int, f: DeviceFormat) -> DeviceMatrix:
            return random_matrix(n, k, f, device, generator)

        def ones(n: int) -> torch.Tensor:
            return torch.ones(n, device=device)

        def layer(index: int) -> Layer:
            f, hidden, ffn = self._format_of(index), config.hidden_size, config.intermediate_size
            qkv = tuple(one(n, hidden, f) for n in (config.q_size, config.kv_size, config.kv_size))
            attention = AttentionWeights(
                norm=ones(hidden),
                qkv=DeviceWeight(qkv),  # type: ignore[arg-type]
                o=DeviceWeight((one(hidden, config.q_size, f),)),  # type: ignore[arg-type]
                num_heads=config.num_heads,
                num_kv_heads=config.num_kv_heads,
                head_dim=config.head_dim,
                eps=config.rms_norm_eps,
                cos=cos,
                sin=sin,
                scale=config.attention_scale,
            )
            gate_up = DeviceWeight((one(ffn, hidden, f), one(ffn, hidden, f)))
            down = DeviceWeight((one(hidden, ffn, f),))
            return attention, FFNWeights(ones(hidden), gate_up, down, config.rms_norm_eps)  # type: ignore[arg-type]

        return DeviceWeights(
            embedding=DeviceWeight((one(config.vocab_size, config.hidden_size, _TABLE),)),
            layers=tuple(layer(i) for i in range(config.num_layers)),
            final_norm=ones(config.hidden_size),
            head=DeviceWeight((one(config.vocab_size, config.hidden_size, _HEAD),)),
        )

    def _format_of(self, layer: int) -> DeviceFormat:
        """The next narrower or wider format, so that any run of layers is near the average."""
        low = max((b for b in _BITS if b <= self.bits), default=None)
        high = min((b for b in _BITS if b >= self.bits), default=None)
        if low is None or high is None:
            raise ModelLoadError(f"bits must be in [{min(_BITS)}, {max(_BITS)}], got {self.bits}")
        share = 0.0 if low == high else (self.bits - low) / (high - low)
        is_high = int((layer + 1) * share + 1e-9) > int(layer * share + 1e-9)
        return _BITS[high if is_high else low]
