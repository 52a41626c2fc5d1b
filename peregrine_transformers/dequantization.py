"""The operation that transformers runs on every weight it loads from a Peregrine checkpoint."""

from typing import Any

from torch import Tensor
from transformers.core_model_loading import ConversionOps

import kernels
from peregrine_transformers.quantizer import PeregrineQuantizer


class Dequantize(ConversionOps):
    """Packed bytes to floats of the parameter's dtype; weights that are floats already are cast alone."""

    def __init__(self, hf_quantizer: PeregrineQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(
        self,
        input_dict: dict[str, list[Tensor]],
        source_patterns: list[str],
        target_patterns: list[str],
        full_layer_name: str = "",
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        parameter = kwargs["model"].get_parameter(full_layer_name)
        if "packed" in input_dict:
            n, k = parameter.shape
            packed = kernels.PackedWeight(
                self.hf_quantizer.formats[full_layer_name], n, k, input_dict["packed"][0].contiguous()
            )
            weight = kernels.dequantize(packed)
        else:
            weight = input_dict["weight"][0]
        return {full_layer_name: weight.to(parameter.dtype)}

    @property
    def reverse_op(self) -> ConversionOps:
        return _AsItIs()


class _AsItIs(ConversionOps):
    """Saving writes the floats."""

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        return input_dict
