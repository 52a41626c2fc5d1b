"""From a checkpoint to weights in the kernels' order on the GPU, layer by layer."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import kernels
from engine.checkpoint import Checkpoint
from engine.models.build import WeightLoader
from kernels.cuda.packing import DeviceWeight, is_supported, to_device
from kernels.cuda.program import HEAD_DIMS
from kernels.sampling import MAX_VOCAB

_SHOW_PROGRESS_AFTER_S = 3.0

Layer = tuple[kernels.AttentionWeights, kernels.FFNWeights]


class UnsupportedError(Exception):
    """The fused kernels cannot run this model on this machine; the message says why."""


@dataclass(frozen=True, slots=True, eq=False)
class DeviceWeights:
    """A model as the kernels read it. The matrices of `layers` are DeviceWeight.

    qkv and gate_up hold their matrices apart: (q, k, v) and (gate, up). `head` is `embedding` where the
    embeddings are tied. final_norm: float32 [hidden].
    """

    embedding: DeviceWeight
    layers: tuple[Layer, ...]
    final_norm: Tensor
    head: DeviceWeight

    @property
    def matrices(self) -> list[DeviceWeight]:
        own = [self.embedding] if self.head is self.embedding else [self.embedding, self.head]
        return own + [matrix_of(w) for a, f in self.layers for w in (a.qkv, a.o, f.gate_up, f.down)]

    @property
    def vectors(self) -> list[Tensor]:
        found = [self.final_norm]
        for a, f in self.layers:
            found += [
                t for t in (a.norm, a.q_norm, a.k_norm, a.post_norm, f.norm, f.post_norm) if t is not None
            ]
            found += [t for t in (a.qkv_bias, a.o_bias, f.gate_up_bias, f.down_bias) if t is not None]
        return found


def matrix_of(weight: object) -> DeviceWeight:
    """The block's matrix: `kernels.Weight` does not tell that it lies on the device already."""
    assert isinstance(weight, DeviceWeight)
    return weight


def load_weights(checkpoint: Checkpoint, max_model_len: int, device: torch.device) -> DeviceWeights:
    """Read, repack and move every tensor; one layer at a time is on the host.

    Raises:
        UnsupportedError: the kernels cannot run the model.
        ModelLoadError: the checkpoint is damaged.
    """
    config = checkpoint.config
    if make := getattr(checkpoint, "device_weights", None):  # a RandomModel
        made: DeviceWeights = make(max_model_len, device)
        return made
    if config.head_dim not in HEAD_DIMS:
        raise UnsupportedError(f"head_dim {config.head_dim} is not one of {HEAD_DIMS}")
    if config.vocab_size > MAX_VOCAB:
        raise UnsupportedError(f"vocab_size {config.vocab_size} exceeds {MAX_VOCAB}")
    if config.num_experts:
        raise UnsupportedError("routed experts have no fused kernel")
    if config.attention_softcap is not None or config.final_softcap is not None:
        raise UnsupportedError("soft caps of attention scores or logits are not in the fused kernels")
    loader = WeightLoader(checkpoint, max_model_len, torch.bfloat16, device, keep_packed=True)
    embedding = _convert(loader.embedding(), device, "the embedding")
    if len(embedding.parts) != 1:
        raise UnsupportedError("the embedding is more than one matrix")
    layers = tuple(
        _convert_layer(loader.layer(i), device, f"layer {i}")
        for i in _with_progress(range(config.num_layers))
    )
    head = loader.head()
    return DeviceWeights(
        embedding=embedding,
        layers=layers,
        final_norm=loader.final_norm(),
        head=embedding if head is None else _convert(head, device, "the head"),
    )


def _convert_layer(
    layer: tuple[kernels.AttentionWeights, kernels.FeedForward], device: torch.device, name: str
) -> Layer:
    attention, ffn = layer
    assert isinstance(ffn, kernels.FFNWeights), "refused above"
    q_size, kv_size = (n * attention.head_dim for n in (attention.num_heads, attention.num_kv_heads))
    width = ffn.gate_up.shape[0] // 2 if isinstance(ffn.gate_up, Tensor) else ffn.gate_up.n // 2

    def converted(weight: kernels.Weight, rows: Sequence[int] | None = None) -> Any:
        return _convert(weight, device, name, rows)

    return (
        replace(
            attention, qkv=converted(attention.qkv, (q_size, kv_size, kv_size)), o=converted(attention.o)
        ),
        replace(ffn, gate_up=converted(ffn.gate_up, (width, width)), down=converted(ffn.down)),
    )


def _convert(
    weight: kernels.Weight, device: torch.device, name: str, rows: Sequence[int] | None = None
) -> DeviceWeight:
    if isinstance(weight, Tensor) or not is_supported(weight):
        what = weight.dtype if isinstance(weight, Tensor) else _formats(weight)
        raise UnsupportedError(f"{name} is {what}, which the kernels do not read")
    try:
        return to_device(weight, device, rows)
    except ValueError as error:
        raise UnsupportedError(f"{name}: {error}") from None


def _formats(weight: kernels.PackedWeight | kernels.StackedWeight) -> str:
    parts = weight.parts if isinstance(weight, kernels.StackedWeight) else (weight,)
    return "+".join(str(p.format) for p in parts)


def _with_progress(layers: range) -> Iterable[int]:
    """The layers, with a progress bar once it is clear that it takes a while."""
    return tqdm(layers, desc="Loading layers", unit="layer", delay=_SHOW_PROGRESS_AFTER_S)
