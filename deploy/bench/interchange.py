"""One quantized checkpoint in other programs: logits in transformers, and what exports keep of its values."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import kernels
import peregrine_transformers.quantizer  # noqa: F401  an editable install has no start-up file
from deploy.bench.parity.measure import our_logits
from engine.checkpoint import Checkpoint, open_checkpoint
from engine.checkpoint.export import Exported, export_compressed_tensors, export_floats
from engine.quality import text
from kernels.formats import unpack

_NUM_TOKENS = 200


def rows(checkpoint: Path) -> list[dict[str, Any]]:
    """Every way out of a directory of `peregrine quantize`: largest difference of a logit from the engine's
    reference, and how many matrices have the very values that they had."""
    ours = open_checkpoint(checkpoint)
    document = " ".join(text.calibration_documents())[: 20 * _NUM_TOKENS]
    token_ids = torch.tensor(ours.load_tokenizer()(document)["input_ids"][:_NUM_TOKENS])
    with tempfile.TemporaryDirectory() as directory, torch.inference_mode():
        expected = our_logits(ours, token_ids)

        def difference(model: PreTrainedModel) -> float:
            return float((model(token_ids[None]).logits[0] - expected).abs().max())

        def row(way: str, value: float, more: dict[str, Any]) -> dict[str, Any]:
            return {"way": way, "tokens": len(token_ids), "max_logit_difference": value, **more}

        def loaded(path: Path) -> PreTrainedModel:
            return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)

        found = [row("transformers by the registered quantizer", difference(loaded(checkpoint)), {})]
        floats, packed = Path(directory) / "floats", Path(directory) / "packed"
        written = export_floats(checkpoint, floats, "float32")
        model, size = loaded(floats), {"megabytes": written.file_bytes / 1e6}
        found.append(row("safetensors, transformers", difference(model), size))
        written = export_compressed_tensors(checkpoint, packed, "float32", "wide")
        weights = decompressed(packed)
        model.load_state_dict({name: w.float() for name, w in weights.items()}, strict=False)
        kept = _kept(ours, open_checkpoint(packed), weights, written)
        found.append(row("compressed-tensors by its decompressor", difference(model), kept))
        back = float((our_logits(open_checkpoint(packed), token_ids) - expected).abs().max())
        found.append(row("compressed-tensors read back", back, {}))
        # compressed-tensors 0.20 does not expect packed zero points when transformers loads by it.
        if not has_zero_points(packed):
            found.append(row("compressed-tensors, transformers", difference(loaded(packed)), {}))
    return found


def _kept(
    before: Checkpoint, after: Checkpoint, weights: Mapping[str, Tensor], written: Exported
) -> dict[str, Any]:
    pairs = [(name, exact_values(before.tensor(name, keep_packed=True))) for name in weights]
    return {
        "matrices": len(pairs),
        "equal_by_library": sum(torch.equal(weights[name], own) for name, own in pairs),
        "equal_read_back": sum(
            torch.equal(exact_values(after.tensor(name, keep_packed=True)), own) for name, own in pairs
        ),
        "bits": " ".join(f"{count} x W{bits}" for bits, count in written.num_matrices.items()),
        "megabytes": written.file_bytes / 1e6,
    }


def exact_values(weight: kernels.PackedWeight | Tensor) -> Tensor:
    """float64 [N, K]: float32 rounds 8-bit codes times scales of 19 bits."""
    if isinstance(weight, Tensor):
        return weight.double()
    stored, f = unpack(weight), weight.format
    scale = stored.scale.double()
    if f.kind == "affine":
        assert stored.offset is not None
        offset = stored.offset.double()
    else:
        assert stored.row_scale is not None
        scale = scale * stored.row_scale.double()[:, None] / 256
        zero = 128.0 if stored.offset is None else stored.offset.double()
        offset = -scale * zero * 2.0 ** (f.bits - 8)
    group = torch.arange(weight.k) // (f.group_size or weight.k)
    return scale[:, group] * stored.codes + offset[:, group]


def has_zero_points(directory: Path) -> bool:
    """Of a compressed-tensors checkpoint, by its config.json."""
    section = json.loads((directory / "config.json").read_text())["quantization_config"]
    return not all(group["weights"]["symmetric"] for group in section["config_groups"].values())


def decompressed(directory: Path) -> dict[str, Tensor]:
    """Every matrix of a compressed-tensors checkpoint, float64, by that library's own decompressor."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    section = json.loads((directory / "config.json").read_text())["quantization_config"]
    tensors: dict[str, Tensor] = {}
    for file in directory.glob("*.safetensors"):
        tensors |= load_file(file)
    found = {}
    for group in QuantizationConfig.model_validate(section).config_groups.values():
        library = BaseCompressor.get_value_from_registry(group.format)
        for module in group.targets:
            names = [n for n in tensors if n.startswith(f"{module}.weight")]
            own = {n.rpartition(".")[2]: tensors[n] for n in names}
            own["weight_scale"] = own["weight_scale"].double()
            found[f"{module}.weight"] = library.decompress(own, group)["weight"]
    return found
