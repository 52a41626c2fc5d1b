"""The whole way from a checkpoint to a quantized one, resumable at every layer.

Sensitivity (one forward, one backward pass), allocation under the budget, one quantizing pass a trial, a
short search over trials on the true KL divergence, and the files.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.checkpoint.loading import Checkpoint, open_checkpoint
from engine.checkpoint.packed_tensors import quantization_config
from engine.checkpoint.writing import header_bytes, write_json, write_tensors
from engine.errors import ParameterError
from engine.models.hf_config import to_hf_config
from engine.models.layerwise import DecoderLayers, linear_name, vector_names
from engine.quality import text
from engine.quantization.allocation import Allocation, total_bytes, total_kl
from engine.quantization.candidates import ALLOWED_BITS, DEFAULT_BITS, candidate_formats
from engine.quantization.choice import Rotation, rotations
from engine.quantization.rotation import rotate_heads
from engine.quantization.search import MAX_TRIALS, Budget, Search
from engine.quantization.sensitivity import SensitivityAnalysis, TensorSensitivity
from engine.quantization.trial import Quality, Trial
from engine.quantization.workspace import Workspace

WORK_DIRECTORY = ".quantizing"
Progress = Callable[[str, int], None]


@dataclass(frozen=True, slots=True)
class Options:
    """How a model is quantized.

    widths: bits that a tensor may get. num_windows, num_validation_windows: calibration texts of `window`
    tokens each, and those the search measures on. num_trials: quantizing passes of the search. is_symmetric:
    no zero points, so that the result exports to formats that know whole ones alone.
    """

    budget: Budget
    widths: tuple[int, ...] = DEFAULT_BITS
    num_windows: int = 24
    num_validation_windows: int = 6
    window: int = 512
    num_trials: int = 1
    is_symmetric: bool = False

    def __post_init__(self) -> None:
        if not self.widths or set(self.widths) - set(ALLOWED_BITS):
            allowed = ", ".join(map(str, ALLOWED_BITS))
            raise ParameterError("widths", f"must be some of {allowed}, got {self.widths}")
        if not 1 <= self.num_trials <= MAX_TRIALS:
            raise ParameterError("trials", f"must be 1 to {MAX_TRIALS}, got {self.num_trials}")
        for name in ("num_windows", "num_validation_windows", "window"):
            if getattr(self, name) < 2:
                raise ParameterError(name, f"must be at least 2, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True)
class Result:
    """What was made. bits: of all stored tensors per weight; file_bytes: with the files' headers."""

    file_bytes: int
    tensor_bytes: int
    num_parameters: int
    bits: float
    estimated_kl: float
    quality: Quality
    allocation: Allocation
    tensors: list[TensorSensitivity]
    rotations: list[Rotation]
    trials: list[Quality]


def quantize(
    model: Path,
    out: Path,
    options: Options,
    documents: list[str],
    progress: Progress = lambda _s, _n: None,
    analysis_directory: Path | None = None,
) -> Result:
    """Quantize the checkpoint `model` into the directory `out`.

    `progress(stage, total)` is called after each of the `total` steps of a stage. The sensitivity analysis is
    kept in `analysis_directory`, if given, and found there by later runs of any budget.

    Raises:
        ModelLoadError: the checkpoint is damaged or not supported.
        ParameterError: the budget cannot be met, or `out` holds something else.
    """
    if out.exists() and any(p.name != WORK_DIRECTORY for p in out.iterdir()):
        raise ParameterError("out", f"{out} holds other files")
    checkpoint = open_checkpoint(model)
    _check(checkpoint)
    tokenizer = checkpoint.load_tokenizer()
    count = options.num_windows + options.num_validation_windows
    windows = text.token_windows(tokenizer, documents, count, options.window)
    tokens, validation = windows[: options.num_windows], windows[options.num_windows :]
    layers = DecoderLayers(checkpoint, options.window)
    formats_to_try = candidate_formats(options.widths, symmetric=options.is_symmetric)
    plan = analysis_plan(model, tokens, options.widths)
    if options.is_symmetric:
        plan["symmetric"] = True
    workspace = Workspace(out / WORK_DIRECTORY, {**plan, **_trial_plan(options, validation)}, "out")
    analysed = Workspace(analysis_directory or workspace.path("analysis"), plan, "analysis")
    analysis = SensitivityAnalysis(layers, tokens, formats_to_try, analysed)
    analysis.progress = lambda: progress("sensitivity", analysis.num_steps())
    found = analysis.run()

    vectors = sum(4 * layers.tensor(name).numel() for name in _vector_names(layers))
    num_tensors = len(found.plain) + sum(1 for _ in _vector_names(layers))
    num_parameters = sum(t.n * t.k for t in found.plain) + vectors // 4
    search = Search(
        options.budget, found, num_parameters, vectors, header_bytes(num_tensors), options.num_trials
    )
    trials: list[Trial] = []
    while (choice := search.next([(t.choice, t.quality) for t in trials])) is not None:
        trial = Trial(f"trial-{len(trials)}", analysis, workspace, choice, validation)
        trial.run(lambda: progress("quantization", layers.config.num_layers + 1))
        trials.append(trial)
    best = trials[search.best([t.quality for t in trials])]

    tensors, formats = found.tensors(best.choice.rotated_layers), best.choice.formats
    tensor_bytes = total_bytes(tensors, formats) + vectors
    result = Result(
        file_bytes=write_tensors(out, _groups(layers, best), tensor_bytes),
        tensor_bytes=tensor_bytes,
        num_parameters=num_parameters,
        bits=tensor_bytes * 8 / num_parameters,
        estimated_kl=total_kl(tensors, formats),
        quality=best.quality,
        allocation=formats,
        tensors=tensors,
        rotations=rotations(found, best.choice),
        trials=[t.quality for t in trials],
    )
    tokenizer.save_pretrained(str(out))
    # Without times, so that a repeated run writes the same bytes.
    write_json(out / "report.json", {"options": asdict(options), **asdict(result)})
    _write_config(checkpoint, model, out, formats)
    workspace.close()
    return result


def _check(checkpoint: Checkpoint) -> None:
    config = checkpoint.config
    for name in ("hidden_size", "intermediate_size", "q_size"):
        if getattr(config, name) % 32:
            raise ParameterError("model", f"{name} {getattr(config, name)} is not a multiple of 32")


def analysis_plan(model: Path, tokens: Tensor, widths: Sequence[int]) -> dict[str, Any]:
    """What makes two analyses the same; a float's last bits may differ between versions of torch."""
    digest = hashlib.sha256()
    for file in [*sorted(model.glob("*.safetensors")), model / "config.json"] if model.is_dir() else [model]:
        digest.update(f"{file.name}:{file.stat().st_size}".encode())
        with open(file, "rb") as content:  # header and first weights: reading all would take long
            digest.update(content.read(1 << 20))
    return {
        "model": digest.hexdigest(),
        "widths": list(widths),
        "tokens": _digest(tokens),
        "torch": torch.__version__,
    }


def _trial_plan(options: Options, validation: Tensor) -> dict[str, Any]:
    """What two runs on one analysis must share to write the same bytes."""
    return {
        "budget": asdict(options.budget),
        "trials": options.num_trials,
        "validation": _digest(validation),
    }


def _digest(tokens: Tensor) -> str:
    return hashlib.sha256(tokens.numpy().tobytes()).hexdigest()


def _vector_names(layers: DecoderLayers) -> Iterator[str]:
    yield "model.norm.weight"
    for layer in range(layers.config.num_layers):
        yield from vector_names(layers.checkpoint, layer)


def _groups(layers: DecoderLayers, trial: Trial) -> Iterator[Mapping[str, Tensor]]:
    """Tensors of the files: tables, then layer by layer."""
    yield {**trial.table_tensors(), "model.norm.weight": _stored_vector(layers, "model.norm.weight")}
    for layer in range(layers.config.num_layers):
        vectors = {n: _stored_vector(layers, n) for n in vector_names(layers.checkpoint, layer)}
        bias = linear_name(layer, "v_proj").removesuffix("weight") + "bias"
        if bias in vectors and layer in trial.choice.rotated_layers:
            vectors[bias] = rotate_heads(vectors[bias], layers.config.head_dim)
        yield {**trial.layer_tensors(layer), **vectors}


def _stored_vector(layers: DecoderLayers, name: str) -> Tensor:
    """Norms, biases and routers stay in float32: they are few, and every bit of theirs counts."""
    tensor = layers.tensor(name)
    if "norm" in name:  # GGUF stores them with the family's offset added
        tensor = tensor - (layers.config.family.norm_offset - layers.config.norm_offset)
    return tensor.float()


def _write_config(checkpoint: Checkpoint, model: Path, out: Path, formats: Allocation) -> None:
    if (model / "config.json").is_file():
        raw = json.loads((model / "config.json").read_text(encoding="utf-8"))
    else:
        raw = to_hf_config(checkpoint.config)
        raw["eos_token_id"] = sorted(checkpoint.eos_token_ids)
    raw["quantization_config"] = quantization_config(formats)
    write_json(out / "config.json", raw)
    if (generation := model / "generation_config.json").is_file():
        (out / "generation_config.json").write_bytes(generation.read_bytes())
