"""`peregrine export`: the choice of the format, and what is said of the result."""

from pathlib import Path

from rich.console import Console

from engine.checkpoint.export import Exported, export_compressed_tensors, export_floats
from engine.errors import ModelLoadError, ParameterError

FORMATS = ("compressed-tensors", "safetensors")


def run(checkpoint: Path, out: Path, form: str, others: str, dtype: str) -> Exported:
    """Raises ParameterError for options, ModelLoadError for the checkpoint."""
    if form not in FORMATS:
        raise ParameterError("format", f"must be one of {', '.join(FORMATS)}, got {form!r}")
    if not checkpoint.is_dir():
        raise ModelLoadError(f"{checkpoint}: no such directory (a GGUF file is quantized first)")
    if form == "safetensors":
        return export_floats(checkpoint, out, dtype)
    return export_compressed_tensors(checkpoint, out, dtype, others)


def print_result(result: Exported, out: Path, console: Console) -> None:
    matrices = [f"{count} matrices of {bits} bits" for bits, count in result.num_matrices.items()]
    kept = [f"{result.num_floats} of floats"] if result.num_floats else []
    console.print(
        f"[bold green]{out}[/]: {', '.join(matrices + kept)}, {result.file_bytes / 1e6:,.1f} MB.",
        highlight=False,
        soft_wrap=True,
    )
