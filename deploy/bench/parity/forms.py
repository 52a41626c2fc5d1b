"""The forms in which a small model is stored, each a function: the model, a directory, the checkpoint's path.

Where a form rounds weights, the model's own become what the form stores, so that both compute with the same.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import gguf
import torch
from torch import Tensor
from transformers import PreTrainedModel

from deploy.bench import foreign_checkpoints
from deploy.bench.parity import gguf_files
from deploy.bench.parity.models import save
from engine.checkpoint import Checkpoint, open_checkpoint
from engine.quantization.pipeline import Options, quantize
from engine.quantization.search import Budget

Form = Callable[[PreTrainedModel, Path], Path]

_BITS, _WIDTHS = 5.0, (3, 4, 8)
_EXPERTS = ".mlp.experts."
_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def safetensors(model: PreTrainedModel, directory: Path) -> Path:
    return save(model, directory / "safetensors")


def gguf_file(model: PreTrainedModel, directory: Path, *, kind: gguf.GGMLQuantizationType) -> Path:
    path = directory / f"{kind.name}.gguf"
    gguf_files.write(model, path, kind)
    return path


def peregrine(model: PreTrainedModel, directory: Path) -> Path:
    """What `peregrine quantize` writes, matrices of 3 to 8 bits."""
    source, out = save(model, directory / "floats"), directory / "quantized"
    documents = ["".join(chr(ord("!") + (i * i + j) % 94) for i in range(400)) for j in range(3)]
    options = Options(Budget(bits=_BITS), widths=_WIDTHS, num_windows=4, num_validation_windows=2, window=32)
    quantize(source, out, options, documents)
    load_into(model, open_checkpoint(out))
    return out


@torch.no_grad()
def load_into(model: PreTrainedModel, checkpoint: Checkpoint) -> None:
    """The model's weights become the checkpoint's, dequantized, under whatever names the model has them."""
    num_experts = checkpoint.config.num_experts

    def read(name: str) -> Tensor:
        tensor = checkpoint.tensor(name, keep_packed=False)
        assert isinstance(tensor, Tensor)
        return tensor

    def fused(parent: str, module: str, kind: str) -> Tensor:
        parts = _FUSED.get(module, (module,))
        return torch.cat([read(f"{parent}.{part}.{kind}") for part in parts])

    for name, parameter in model.named_parameters():
        if _EXPERTS in name:  # all of them are one tensor
            parent, _, module = name.rpartition(".")
            parameter.copy_(
                torch.stack([fused(f"{parent}.{i}", module, "weight") for i in range(num_experts)])
            )
        else:
            module, _, kind = name.rpartition(".")
            parent, _, module = module.rpartition(".")
            parameter.copy_(fused(parent, module, kind) if parent else read(name))


FORMS: dict[str, Form] = {
    "safetensors": safetensors,
    "GGUF F32": partial(gguf_file, kind=gguf.GGMLQuantizationType.F32),
    "GGUF Q8_0": partial(gguf_file, kind=gguf.GGMLQuantizationType.Q8_0),
    "GGUF Q4_1": partial(gguf_file, kind=gguf.GGMLQuantizationType.Q4_1),
    "peregrine": peregrine,
    **foreign_checkpoints.FORMS,
}
