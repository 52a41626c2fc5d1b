"""Peregrine's quantization beside other methods, on the same weights and the same held-out text.

Every method gives dequantized weights; all of them run through one float32 forward pass, so that the figures
compare weights, not runtimes. Sizes count codes, scales, embedding, head, norms.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from tqdm import tqdm

from deploy.bench import llama_cpp_quants
from engine.checkpoint.loading import Checkpoint, open_checkpoint
from engine.models.layerwise import DecoderLayers, vector_names
from engine.quality import text
from engine.quality.divergence import Divergence, compare, head_table, hidden_states
from engine.quantization.allocation import Allocation, allocate, total_bytes, total_kl
from engine.quantization.candidates import DEFAULT_BITS, candidate_formats
from engine.quantization.choice import Choice, choose
from engine.quantization.pipeline import analysis_plan
from engine.quantization.quantizers import gptq, plain_scales, round_to_nearest
from engine.quantization.sensitivity import (
    Sensitivities,
    SensitivityAnalysis,
    TensorSensitivity,
    weighted_moment,
)
from engine.quantization.trial import Trial
from engine.quantization.workspace import Workspace
from kernels.formats import Format
from kernels.reference import rms_norm

BUDGETS = (4.25, 3.5, 3.0)
# Uniform integer formats of about these sizes: 16-bit scale and offset a group.
UNIFORM = {4.25: "w4g128-f16", 3.5: "w3g64-f16", 3.0: "w2g32-f16"}
# llama.cpp's types, and the type of embedding and head (None: as llama.cpp chooses). Rows of 576 or 640
# columns are no multiple of its super-blocks' 256, so that it falls back to wider types and 8-bit tables; a
# 4-bit table takes it as near to the budgets as it goes.
LLAMA_CPP_TYPES = (
    ("Q4_K_M", None),
    ("IQ4_XS", None),
    ("Q2_K", None),
    ("IQ4_XS", "IQ4_NL"),
    ("Q2_K", "IQ4_NL"),
)
_FEW_WIDTHS = (2, 3, 4, 8)
_WINDOW, _CALIBRATION, _HELD_OUT, _MICRO_BATCH = 512, 24, 16, 4
Quantize = Callable[[Tensor, Tensor], Tensor]
"""Dequantized weights from weights [N, K] and second moments of the input [K, K]."""


class Bench:
    """One model, its reference outputs, and the analysis that all of Peregrine's rows share."""

    def __init__(self, path: Path, work: Path, widths: Sequence[int], held_out: Path | None) -> None:
        self.path, self.work = path, work
        self.name = path.name.removesuffix(".gguf")
        self.checkpoint: Checkpoint = open_checkpoint(path)
        tokenizer = self.checkpoint.load_tokenizer()
        self.tokens = text.token_windows(tokenizer, text.calibration_documents(), _CALIBRATION, _WINDOW)
        documents = text.documents_of_file(held_out) if held_out else text.heldout_documents()
        self.held_out = text.token_windows(tokenizer, documents, _HELD_OUT, _WINDOW)
        self.layers = DecoderLayers(self.checkpoint, _WINDOW)
        self.softcap = self.checkpoint.config.final_softcap
        self.reference, self.table = (
            hidden_states(self.checkpoint, self.held_out),
            head_table(self.checkpoint),
        )
        widths = tuple(widths)
        plan = analysis_plan(path, self.tokens, widths)
        analysed = Workspace(work / "analysis", plan, "work")
        self.analysis = SensitivityAnalysis(self.layers, self.tokens, candidate_formats(widths), analysed)
        self.trials = Workspace(work / "trials", {**plan, "text": text.content_sha256(documents)}, "work")
        self.found = Sensitivities([], {})
        self.tensors: list[TensorSensitivity] = []
        self.vector_bytes = self._vector_bytes()
        self.num_weights = 0

    def analyse(self) -> None:
        with tqdm(total=self.analysis.num_steps(), desc="sensitivity", unit="step") as bar:
            self.analysis.progress = lambda: _advance(bar)
            self.found = self.analysis.run()
        self.tensors = self.found.plain
        self.num_weights = sum(t.n * t.k for t in self.tensors)

    def peregrine(self, bits: float, may_rotate: bool = True) -> dict[str, Any]:
        """The choice under `bits`, quantized the way `peregrine quantize` does."""
        method = "peregrine" if may_rotate else "peregrine-unrotated"
        max_bytes = self._matrix_bytes(bits)
        choice = choose(self.found, lambda tensors: allocate(tensors, max_bytes), may_rotate)
        return self.carried_out(method, f"{method}-{bits}", choice)

    def estimate(self, bits: float, widths: Sequence[int], may_rotate: bool) -> dict[str, Any]:
        """What the analysis expects of fewer widths or of no rotation; nothing is carried out."""
        found = self.found.restricted(widths)
        max_bytes = self._matrix_bytes(bits)
        choice = choose(found, lambda tensors: allocate(tensors, max_bytes), may_rotate)
        tensors = found.tensors(choice.rotated_layers)
        return {
            "model": self.name,
            "method": "estimate",
            "bits": bits,
            "widths": ",".join(map(str, widths)),
            "rotated_layers": len(choice.rotated_layers) if may_rotate else None,
            "estimated_kl": round(total_kl(tensors, choice.formats), 5),
        }

    def _matrix_bytes(self, bits: float) -> int:
        total = self.num_weights + self.vector_bytes // 4
        return int(bits * total / 8) - self.vector_bytes

    def carried_out(self, method: str, directory: str, choice: Choice) -> dict[str, Any]:
        trial = Trial(directory, self.analysis, self.trials, choice, self.held_out)
        with tqdm(total=self.layers.config.num_layers + 1, desc=directory, unit="layer") as bar:
            trial.run(lambda: _advance(bar))
        nbytes = total_bytes(self.tensors, choice.formats)
        return self._row(
            method, nbytes, trial.quality["kl"], trial.quality["perplexity"], trial.quality["top1"]
        )

    def by_tensor(self, method: str, name: str, quantize: Quantize) -> dict[str, Any]:
        """A uniform method that looks at one tensor (and its inputs) at a time."""
        f = Format.parse(name)
        has_inputs = method == "gptq"
        final = self.analysis.final(self.analysis.hidden[self.layers.config.num_layers])
        table = quantize(self.table, weighted_moment(final, torch.ones(final.shape[:2])))
        x = self.layers.embed(self.tokens, table)
        held = self.layers.embed(self.held_out, table)
        for layer in tqdm(range(self.layers.config.num_layers), desc=f"{method} {name}", unit="layer"):
            weights = self.layers.load(layer)
            dense: dict[str, Tensor] = {}

            def linear(
                short: str,
                value: Tensor,
                own: dict[str, Tensor] = dense,
                original: dict[str, Tensor] = weights.linears,
            ) -> Tensor:
                own[short] = quantize(original[short], weighted_moment(value, torch.ones(value.shape[:2])))
                return value @ own[short].T

            if has_inputs:
                x = self.layers.forward(layer, weights, x, linear)
            else:
                dense.update({n: quantize(w, torch.empty(0)) for n, w in weights.linears.items()})
            weights.linears = dense
            held = torch.cat([self.layers.forward(layer, weights, p) for p in held.split(_MICRO_BATCH)])
        normed = rms_norm(held, self.layers.final_norm(), self.layers.config.rms_norm_eps)
        d = compare(normed, table, self.reference, self.table, self.held_out, self.softcap)
        nbytes = sum(f.nbytes(t.n, t.k) for t in self.tensors)
        return self._measured(f"{method}-{name}", nbytes, d)

    def llama_cpp(self, kind: str, table: str | None, importance: Any, threads: int) -> dict[str, Any]:
        method = llama_cpp_method(kind, table)
        source, target = self.work / "float32.gguf", self.work / f"{method}.gguf"
        if not source.exists():
            llama_cpp_quants.export_float(self.path, source)
        llama_cpp_quants.quantize(source, target, kind, table, importance, threads)
        nbytes, _ = llama_cpp_quants.tensor_bits(target)
        checkpoint = open_checkpoint(target)
        states = hidden_states(checkpoint, self.held_out)
        d = compare(states, head_table(checkpoint), self.reference, self.table, self.held_out, self.softcap)
        return self._measured(method, nbytes - self.vector_bytes, d)

    def _vector_bytes(self) -> int:
        names = [n for i in range(self.layers.config.num_layers) for n in vector_names(self.checkpoint, i)]
        return sum(4 * self.layers.tensor(n).numel() for n in ["model.norm.weight", *names])

    def _measured(self, method: str, nbytes: int, d: Divergence) -> dict[str, Any]:
        kl, ppl = float(d.kl.mean()), float(d.nll.mean().exp())
        return self._row(method, nbytes, kl, ppl, float(d.agrees.float().mean()))

    def _row(self, method: str, nbytes: int, kl: float, ppl: float, top1: float) -> dict[str, Any]:
        nbytes += self.vector_bytes
        weights = self.num_weights + self.vector_bytes // 4
        return {
            "model": self.name,
            "method": method,
            "bits": round(nbytes * 8 / weights, 4),
            "bytes": nbytes,
            "kl": round(kl, 5),
            "ppl": round(ppl, 3),
            "top1": round(top1, 4),
        }


def _advance(bar: tqdm) -> None:
    bar.update()


def article_allocation(tensors: Sequence[TensorSensitivity], num_layers: int) -> Allocation:
    """Early layers and tables in 8 bits, deep attention in 4, deep FFN in 4 and 3, by depth alone."""
    result = {}
    for t in tensors:
        layer = int(t.name.split(".")[2]) if ".layers." in t.name else -1
        if layer < num_layers // 4:
            result[t.name] = "w8row-sym"
        elif "mlp" in t.name and layer >= num_layers // 2:
            result[t.name] = "w3g64"
        else:
            result[t.name] = "w4g64"
    return result


def ends_high_allocation(tensors: Sequence[TensorSensitivity], num_layers: int, bits: float) -> Allocation:
    """Tables and the two first and last layers wider than all between: the largest such that fits `bits`."""
    ends = {0, 1, num_layers - 2, num_layers - 1}
    most = sum(t.n * t.k for t in tensors) * bits / 8
    allocations = [
        {
            t.name: high if ".layers." not in t.name or int(t.name.split(".")[2]) in ends else low
            for t in tensors
        }
        for low, *highs in (
            ("w2g64", "w3g64", "w4g64", "w5g128", "w6g128-sym", "w8row-sym"),
            ("w3g64", "w4g64", "w5g128", "w6g128-sym", "w8row-sym"),
            ("w4g64", "w5g128", "w6g128-sym", "w8row-sym"),
        )
        for high in highs
    ]
    fitting = [a for a in allocations if total_bytes(tensors, a) <= most]
    return max(fitting, key=lambda a: total_bytes(tensors, a))


def run(
    path: Path,
    work: Path | None,
    widths: Sequence[int],
    methods: Sequence[str],
    threads: int,
    held_out: Path | None,
) -> list[dict[str, Any]]:
    """Rows of the chosen methods; `work` keeps the analysis and llama.cpp's files between runs."""
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as temporary:
        bench = Bench(path, work or Path(temporary), widths, held_out)
        bench.analyse()
        rows = []
        with torch.inference_mode():
            for row in _rows(bench, methods, threads):
                console.print(row)
                rows.append(row)
        return rows


METHODS = (
    "estimates",
    "rtn",
    "gptq",
    "hqq",
    "uniform",
    "depth",
    "ends",
    "peregrine",
    "unrotated",
    "llama.cpp",
)


def llama_cpp_method(kind: str, table: str | None) -> str:
    """The name of a row, which also chooses it alone."""
    return f"llama.cpp-{kind}" + (f"-table-{table}" if table else "")


ALL_METHODS = (*METHODS, *(llama_cpp_method(*t) for t in LLAMA_CPP_TYPES))
"""That may be asked for; `llama.cpp` stands for all of its types."""


def _rows(bench: Bench, methods: Sequence[str], threads: int) -> Iterator[dict[str, Any]]:
    layers = bench.layers.config.num_layers
    if "estimates" in methods:
        for bits in (*BUDGETS, 5.0, 6.0):
            for widths in (_FEW_WIDTHS, DEFAULT_BITS):
                for may_rotate in (False, True):
                    yield bench.estimate(bits, widths, may_rotate)
    for method, make in (("rtn", _rtn), ("gptq", _gptq), ("hqq", _hqq)):
        if method in methods:
            for name in UNIFORM.values():
                yield bench.by_tensor(method, name, make(name))
    if "uniform" in methods:
        for name in ("w4g64", "w3g64", "w2g64", "w2g32"):
            if any(c.format == name for c in bench.tensors[0].candidates):
                allocation = {t.name: name for t in bench.tensors}
                yield bench.carried_out(f"peregrine-uniform-{name}", f"uniform-{name}", Choice(allocation))
    if "depth" in methods:
        allocation = article_allocation(bench.tensors, layers)
        row = bench.carried_out("early-8-deep-ffn-3", "article", Choice(allocation))
        yield row
        yield bench.peregrine(row["bits"])
    if "ends" in methods:
        for bits in BUDGETS:
            allocation = ends_high_allocation(bench.tensors, layers, bits)
            row = bench.carried_out(f"ends-high-{bits}", f"ends-{bits}", Choice(allocation))
            yield row
            yield bench.peregrine(row["bits"])
    if "peregrine" in methods:
        for bits in BUDGETS:
            yield bench.peregrine(bits)
    if "unrotated" in methods:
        yield bench.peregrine(min(BUDGETS), may_rotate=False)
    chosen = [t for t in LLAMA_CPP_TYPES if {"llama.cpp", llama_cpp_method(*t)} & set(methods)]
    if chosen:
        importance = llama_cpp_quants.importance_matrix(bench.layers, bench.tokens)
        for kind, table in chosen:
            row = bench.llama_cpp(kind, table, importance, threads)
            yield row
            yield bench.peregrine(row["bits"])


def _rtn(name: str) -> Quantize:
    f = Format.parse(name)
    return lambda w, _: round_to_nearest(w, plain_scales(w, f)).dequantize()


def _gptq(name: str) -> Quantize:
    """As published: scales from minimum and maximum, plain second moments of the inputs."""
    f = Format.parse(name)
    return lambda w, moment: gptq(w, moment, [plain_scales(w, f)])[0].dequantize()


def _hqq(name: str) -> Quantize:
    from hqq.core.quantize import Quantizer

    f = Format.parse(name)

    def quantize(w: Tensor, _: Tensor) -> Tensor:
        codes, meta = Quantizer.quantize(
            w.clone(),
            nbits=f.bits,
            group_size=f.group_size if w.shape[1] % f.group_size == 0 else 64,
            axis=1,
            device="cpu",
            compute_dtype=torch.float32,
            optimize=True,
        )
        dense: Tensor = Quantizer.dequantize(codes, meta)
        return dense

    return quantize
