"""llama.cpp's quantization of the same weights, through llama-cpp-python, with an importance matrix."""

import ctypes
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from engine.models.layerwise import DecoderLayers, shared_inputs
from kernels.reference import rms_norm

_GGUF_NAMES = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}
_COPIED_TYPES = frozenset(gguf.GGUFValueType)


def export_float(source: Path, target: Path) -> None:
    """Write the GGUF file `source` with every tensor in float32: what all methods start from."""
    reader = gguf.GGUFReader(str(source))
    writer = gguf.GGUFWriter(str(target), reader.get_field("general.architecture").contents())
    for name, entry in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        kind = entry.types[0]
        assert kind in _COPIED_TYPES
        sub = entry.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, entry.contents(), kind, sub)
    for tensor in reader.tensors:
        dense = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        writer.add_tensor(tensor.name, dense.reshape([int(n) for n in reversed(tensor.shape)]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@torch.inference_mode()
def importance_matrix(layers: DecoderLayers, tokens: Tensor) -> dict[str, np.ndarray]:
    """Mean square of every linear's input columns, float32 [K], by GGUF tensor name."""
    x = layers.embed(tokens, layers.embedding())
    result: dict[str, np.ndarray] = {}
    leaders = {names[0]: names for names in shared_inputs(layers.config)}
    for layer in range(layers.config.num_layers):
        weights = layers.load(layer)

        def linear(
            name: str, value: Tensor, layer: int = layer, own: Mapping[str, Tensor] = weights.linears
        ) -> Tensor:
            for member in leaders.get(name, ()):
                squares = value.square().flatten(0, 1).mean(0)
                result[f"blk.{layer}.{_GGUF_NAMES[member]}.weight"] = squares.numpy().copy()
            return functional.linear(value, own[name])

        x = layers.forward(layer, weights, x, linear)
    normed = rms_norm(x, layers.final_norm(), layers.config.rms_norm_eps).flatten(0, 1)
    result["token_embd.weight"] = result["output.weight"] = normed.square().mean(0).numpy().copy()
    return result


def quantize(
    source: Path,
    target: Path,
    kind: str,
    table: str | None,
    importance: Mapping[str, np.ndarray],
    threads: int,
) -> None:
    """Quantize the float GGUF `source` as llama.cpp's type `kind`, e.g. Q3_K_M.

    table: type of embedding and head, e.g. IQ4_NL; None leaves it to llama.cpp.
    Raises RuntimeError when llama.cpp refuses.
    """
    from llama_cpp import llama_cpp as lib

    params = lib.llama_model_quantize_default_params()
    params.ftype = getattr(lib, f"LLAMA_FTYPE_MOSTLY_{kind}")
    params.nthread = threads
    if table is not None:
        params.token_embedding_type = params.output_tensor_type = gguf.GGMLQuantizationType[table].value
    entries = (lib.llama_model_imatrix_data * (len(importance) + 1))()
    kept = []  # the library reads these while it runs
    for entry, (name, values) in zip(entries, importance.items(), strict=False):
        column = np.ascontiguousarray(values, dtype=np.float32)
        kept.append(column)
        entry.name = name.encode()
        entry.data = column.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        entry.size = column.size
    params.imatrix = entries  # ends with an entry without a name
    if lib.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params)) != 0:
        raise RuntimeError(f"llama.cpp could not quantize to {kind}")


def tensor_bits(path: Path) -> tuple[int, int]:
    """Bytes of all tensors, and their number of weights."""
    tensors = gguf.GGUFReader(str(path)).tensors
    return sum(int(t.n_bytes) for t in tensors), sum(int(t.n_elements) for t in tensors)
