"""The quantization method `peregrine` of transformers: weights become floats as they are loaded.

What comes out is an ordinary model of the dtype asked for, which can be trained, saved and computed with; it
takes the memory of its floats. Importing this module registers the method.
"""

from typing import Any, ClassVar

from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

METHOD = "peregrine"


@register_quantization_config(METHOD)
class PeregrineConfig(QuantizationConfigMixin):
    """config.json's quantization_config; formats: by weight name, see `kernels.formats`."""

    def __init__(
        self, version: int = 1, formats: dict[str, str] | None = None, quant_method: str = METHOD
    ) -> None:
        if quant_method != METHOD:
            raise ValueError(f"quant_method must be {METHOD!r}, got {quant_method!r}")
        self.quant_method = METHOD
        self.version = version
        self.formats = formats or {}
        self.dequantize = True  # has transformers drop this section once the weights are floats

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": METHOD, "version": self.version, "formats": dict(self.formats)}


@register_quantizer(METHOD)
class PeregrineQuantizer(HfQuantizer):
    """Loads `<module>.packed` as `<module>.weight`."""

    requires_calibration = True  # it reads quantized checkpoints; `peregrine quantize` makes them
    serialized_names: ClassVar[dict[str, list[str]]] = {"weight": ["weight", "packed"]}
    quantization_config: PeregrineConfig

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Raises ImportError for a transformers without load operations, ValueError for a damaged section."""
        if not hasattr(HfQuantizer, "get_load_operations"):
            import transformers

            raise ImportError(
                f"peregrine checkpoints need a newer transformers than {transformers.__version__}"
            )
        from engine.checkpoint.packed_tensors import parse_formats
        from engine.errors import ModelLoadError

        try:
            self.formats = parse_formats(self.quantization_config.to_dict())
        except ModelLoadError as error:
            raise ValueError(str(error)) from None

    def get_load_operations(self) -> dict[str, Any]:
        from peregrine_transformers.dequantization import Dequantize

        return {"dequantize": Dequantize}

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Raises ValueError where the model keeps in one tensor what the checkpoint has in several."""
        names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        if strangers := sorted(set(self.formats) - names):
            raise ValueError(
                f"{strangers[0]} has no place of its own in {type(model).__name__}; "
                "peregrine export --format safetensors writes floats that transformers loads"
            )
        return model

    @property
    def is_trainable(self) -> bool:
        return True

    def is_serializable(self) -> bool:
        return True
