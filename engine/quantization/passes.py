"""The quantizing pass: layer by layer, each on what the layers before it, already quantized, put out."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from engine.models.layerwise import DecoderLayers, LayerWeights, linear_name, shared_inputs
from engine.quantization.candidates import quantize_all
from engine.quantization.sensitivity import weighted_moment
from kernels.formats import Format, IntegerWeight


@torch.inference_mode()
def quantize_layer(
    layers: DecoderLayers,
    layer: int,
    weights: LayerWeights,
    x: Tensor,
    importance: Mapping[str, Tensor],
    formats: Mapping[str, str],
) -> tuple[dict[str, IntegerWeight], Tensor]:
    """Quantize a layer's linears; returns them by full name, and the residual stream behind the layer.

    x: [S, T, hidden], the quantized model's stream before the layer. importance: [S, T] by first linear of
    those that share an input. formats: format by full tensor name.
    """
    followers = {names[0]: names for names in shared_inputs(layers.config)}
    quantized: dict[str, IntegerWeight] = {}
    dense: dict[str, Tensor] = {}

    def linear(name: str, value: Tensor) -> Tensor:
        if name in followers:
            names = followers[name]
            hessian = weighted_moment(value, importance[name])
            matrices = [weights.linears[n] for n in names]
            own = [[Format.parse(formats[linear_name(layer, n)])] for n in names]
            for n, (result,) in zip(names, quantize_all(matrices, hessian, own), strict=True):
                quantized[linear_name(layer, n)] = result
                dense[n] = result.dequantize()
        return functional.linear(value, dense[name])

    # The whole batch at once: a linear's Hessian wants all of its inputs before its output goes on.
    return quantized, layers.forward(layer, weights, x, linear)
