"""One choice carried out: every tensor quantized, the true KL divergence measured on validation text."""

from collections.abc import Callable
from typing import TypedDict

import torch
from torch import Tensor

import kernels
from engine.checkpoint.packed_tensors import packed_name
from engine.models.layerwise import DecoderLayers, LayerWeights, linear_name, linears
from engine.quality.divergence import compare
from engine.quantization.choice import Choice
from engine.quantization.passes import quantize_layer
from engine.quantization.rotation import rotate_values
from engine.quantization.sensitivity import SensitivityAnalysis
from engine.quantization.workspace import Workspace

_MICRO_BATCH = 4


class Quality(TypedDict):
    """On validation text: nats per token, perplexities, share of equal top-1 tokens."""

    kl: float
    perplexity: float
    reference_perplexity: float
    top1: float


class Trial:
    """Quantizes into a workspace under `<name>/`, one file a layer."""

    def __init__(
        self,
        name: str,
        analysis: SensitivityAnalysis,
        workspace: Workspace,
        choice: Choice,
        validation: Tensor,
    ) -> None:
        self.choice = choice
        self.quality: Quality
        self._prefix = name
        self._analysis, self._layers, self._workspace = analysis, analysis.layers, workspace
        self._validation = validation

    @torch.inference_mode()
    def run(self, progress: Callable[[], None]) -> None:
        """Continues where an interrupted run of the same choice stopped."""
        if self._workspace.has(f"{self._prefix}/quality.json"):
            for _ in range(self._layers.config.num_layers + 1):
                progress()
        else:
            self._tables()
            for layer in range(self._layers.config.num_layers):
                self._layer(layer)
                progress()
            self._measure()
            progress()
        self.quality = self._workspace.load_json(f"{self._prefix}/quality.json")

    def table_tensors(self) -> dict[str, Tensor]:
        """Packed bytes of embedding and head by their names in the checkpoint."""
        return self._workspace.load_tensors(f"{self._prefix}/tables.safetensors")

    def layer_tensors(self, layer: int) -> dict[str, Tensor]:
        """Packed bytes of a layer's linears by their names in the checkpoint."""
        return self._workspace.load_tensors(f"{self._prefix}/layer-{layer}.safetensors")

    def _tables(self) -> None:
        if self._workspace.has(f"{self._prefix}/tables.safetensors"):
            return
        tables = self._analysis.quantize_tables(self.choice.formats)
        packed = {packed_name(name): table.data for name, table in tables.items()}
        embedding = kernels.dequantize(tables["model.embed_tokens.weight"])
        self._save_streams(0, *(self._layers.embed(t, embedding) for t in self._texts()))
        self._workspace.save_tensors(f"{self._prefix}/tables.safetensors", packed)

    def _layer(self, layer: int) -> None:
        name = f"{self._prefix}/layer-{layer}.safetensors"
        if self._workspace.has(name):
            return
        streams = self._workspace.load_tensors(f"{self._prefix}/stream-{layer}.safetensors")
        weights = self._layers.load(layer)
        if layer in self.choice.rotated_layers:
            weights = rotate_values(weights, self._layers.config.head_dim)
        importance = self._analysis.importance(layer)
        quantized, x = quantize_layer(
            self._layers, layer, weights, streams["x"], importance, self.choice.formats
        )
        names = {linear: linear_name(layer, linear) for linear in linears(self._layers.config)}
        dense = {linear: quantized[name].dequantize() for linear, name in names.items()}
        validated = _run(self._layers, layer, LayerWeights(dense, weights.vectors), streams["validation"])
        self._save_streams(layer + 1, x, validated)
        packed = {packed_name(full): kernels.pack(w).data for full, w in quantized.items()}
        self._workspace.save_tensors(name, packed)
        self._workspace.remove(f"{self._prefix}/stream-{layer}.safetensors")

    def _measure(self) -> None:
        num_layers = self._layers.config.num_layers
        streams = self._workspace.load_tensors(f"{self._prefix}/stream-{num_layers}.safetensors")
        table = self._analysis.head_table()
        head_name = self._analysis.table_names()[-1]
        head = kernels.dequantize(self._analysis.quantize_tables(self.choice.formats)[head_name])
        reference = self._reference()
        softcap = self._layers.config.final_softcap
        x = self._analysis.final(streams["validation"])
        d = compare(x, head, reference, table, self._validation, softcap)
        quality = Quality(
            kl=float(d.kl.mean()),
            perplexity=float(d.nll.mean().exp()),
            reference_perplexity=float(d.reference_nll.mean().exp()),
            top1=float(d.agrees.float().mean()),
        )
        self._workspace.save_json(f"{self._prefix}/quality.json", quality)

    def _reference(self) -> Tensor:
        """The unquantized model's normed stream on the validation text, computed once."""
        name = "validation.safetensors"
        if not self._workspace.has(name):
            x = self._layers.embed(self._validation, self._layers.embedding())
            for layer in range(self._layers.config.num_layers):
                x = _run(self._layers, layer, self._layers.load(layer), x)
            self._workspace.save_tensors(name, {"x": self._analysis.final(x)})
        return self._workspace.load_tensors(name)["x"]

    def _texts(self) -> tuple[Tensor, Tensor]:
        return self._analysis.tokens, self._validation

    def _save_streams(self, layer: int, x: Tensor, validation: Tensor) -> None:
        self._workspace.save_tensors(
            f"{self._prefix}/stream-{layer}.safetensors", {"x": x, "validation": validation}
        )


def _run(layers: DecoderLayers, layer: int, weights: LayerWeights, x: Tensor) -> Tensor:
    return torch.cat([layers.forward(layer, weights, part) for part in x.split(_MICRO_BATCH)])
