"""Quantizers, allocation and the whole way, on small random models."""

import itertools
import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from engine.checkpoint import open_checkpoint
from engine.errors import ParameterError, QualityError
from engine.models.layerwise import DecoderLayers, linear_name
from engine.quality.divergence import divergence
from engine.quantization.allocation import allocate, allocate_for_kl, total_bytes, total_kl
from engine.quantization.candidates import candidate_formats, quantize_all
from engine.quantization.choice import Choice, choose, rotations
from engine.quantization.pipeline import WORK_DIRECTORY, Options, quantize
from engine.quantization.quantizers import choose_scales, round_to_nearest
from engine.quantization.rotation import can_rotate, hadamard, rotate_values
from engine.quantization.search import Budget
from engine.quantization.sensitivity import Candidate, Sensitivities, SensitivityAnalysis, TensorSensitivity
from engine.quantization.workspace import Workspace
from kernels.formats import Format
from kernels.reference import rms_norm
from tests.engine.helpers import greedy, make_core, run_all, save_random_llama

TEXT = [" ".join(f"w{(i * i + j) % 190}" for i in range(600)) for j in range(3)]
OPTIONS = {"num_windows": 6, "num_validation_windows": 3, "window": 48}


def small_model(directory: Path, **overrides) -> Path:
    """A random Llama with a word-level tokenizer."""
    values = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, **overrides}
    save_random_llama(directory, **values)
    words = {f"w{i}": i for i in range(199)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(directory)
    return directory


def files_of(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(directory.iterdir()) if p.is_file()}


@pytest.mark.parametrize("name", ["w2g64", "w3g128", "w4g64-sym", "w8row-sym", "w4g32-f16"])
def test_the_chosen_scales_beat_the_plain_ones(name):
    """Searched scales lose less than scales that span minimum and maximum, weighted as asked."""
    g = torch.Generator().manual_seed(0)
    w, importance = torch.randn(24, 160, generator=g), torch.rand(160, generator=g) + 0.1
    f = Format.parse(name)
    rounded = round_to_nearest(w, choose_scales(w, importance, f)).dequantize()
    width, top = f.group_size or 160, (1 << f.bits) - 1
    plain = torch.empty_like(w)
    for begin in range(0, 160, width):
        part = w[:, begin : begin + width]
        low, high = part.amin(1, keepdim=True), part.amax(1, keepdim=True)
        if f.kind == "sym":
            high = part.abs().amax(1, keepdim=True)
            low = -high
        step = (high - low) / top
        plain[:, begin : begin + width] = ((part - low) / step).round() * step + low
    errors = [((q - w).square() * importance).sum() for q in (rounded, plain)]
    assert errors[0] < errors[1] * (1.05 if f.bits == 8 else 0.95)  # eight bits leave nothing to search


def test_error_feedback_beats_rounding_on_correlated_inputs():
    g = torch.Generator().manual_seed(1)
    x = torch.randn(2000, 96, generator=g) @ torch.randn(96, 96, generator=g)
    w, hessian = torch.randn(40, 96, generator=g), x.T @ x
    f = Format.parse("w3g32")
    ((fed,),) = quantize_all([w], hessian, [[f]])
    rounded = round_to_nearest(w, choose_scales(w, hessian.diagonal(), f))
    loss = [((q.dequantize() - w) @ x.T).square().sum() for q in (fed, rounded)]
    assert loss[0] < 0.65 * loss[1]


def test_matrices_that_share_an_input_are_quantized_as_if_alone():
    g = torch.Generator().manual_seed(2)
    x = torch.randn(500, 64, generator=g)
    hessian = x.T @ x
    a, b = torch.randn(8, 64, generator=g), torch.randn(24, 64, generator=g)
    formats = [Format.parse("w2g32"), Format.parse("w4g64-sym")]
    together = quantize_all([a, b], hessian, [formats, formats])
    for w, got in ((a, together[0]), (b, together[1])):
        for f, quantized in zip(formats, got, strict=True):
            ((alone,),) = quantize_all([w], hessian, [[f]])
            torch.testing.assert_close(quantized.dequantize(), alone.dequantize(), atol=1e-3, rtol=0)


def test_a_dead_input_column_does_no_harm():
    hessian = torch.diag(torch.tensor([0.0] * 16 + [1.0] * 16))
    ((quantized,),) = quantize_all([torch.randn(4, 32)], hessian, [[Format.parse("w4g32")]])
    assert torch.isfinite(quantized.dequantize()).all()


def some_tensors(count: int, seed: int) -> list[TensorSensitivity]:
    g = torch.Generator().manual_seed(seed)
    result = []
    for i in range(count):
        size, weight = int(torch.randint(5, 50, (), generator=g)), float(torch.rand((), generator=g))
        own = tuple(Candidate(f"w{b}g64", size * b, weight * 4.0 ** (2 - b)) for b in (2, 3, 4, 8))
        result.append(TensorSensitivity(f"t{i}", size, 8, own))
    return result


@pytest.mark.parametrize("seed", range(5))
def test_the_allocation_is_the_best_there_is(seed):
    tensors = some_tensors(5, seed)
    budget = int(3.3 * sum(t.n for t in tensors))
    got = allocate(tensors, budget)
    assert total_bytes(tensors, got) <= budget
    every = [
        {t.name: c.format for t, c in zip(tensors, chosen, strict=True)}
        for chosen in itertools.product(*(t.candidates for t in tensors))
    ]
    best = min(total_kl(tensors, a) for a in every if total_bytes(tensors, a) <= budget)
    assert total_kl(tensors, got) == pytest.approx(best, rel=1e-3)
    limit = 2 * best
    smallest = min(total_bytes(tensors, a) for a in every if total_kl(tensors, a) <= limit)
    assert total_bytes(tensors, allocate_for_kl(tensors, limit)) == smallest


def test_budgets_that_cannot_be_met_are_refused():
    tensors = some_tensors(3, 0)
    with pytest.raises(ParameterError, match="the smallest formats take"):
        allocate(tensors, 10)
    with pytest.raises(ParameterError, match="max-kl: must be at least"):
        allocate_for_kl(tensors, 1e-9)
    with pytest.raises(ParameterError, match="exactly one of"):
        Budget(bits=3.0, max_kl=0.1)
    with pytest.raises(ParameterError, match="exactly one of"):
        Budget()
    with pytest.raises(ParameterError, match="must be positive"):
        Budget(bits=-1.0)
    with pytest.raises(ParameterError, match="widths: must be some of 2, 3"):
        Options(Budget(bits=3.0), widths=(7,))


@pytest.mark.parametrize("overrides", [{}, {"tie_word_embeddings": True, "attention_bias": True}])
def test_the_layerwise_forward_pass_is_the_models(tmp_path, overrides):
    reference = save_random_llama(tmp_path, **overrides)
    tokens = torch.randint(0, 199, (2, 50), generator=torch.Generator().manual_seed(3))
    checkpoint = open_checkpoint(tmp_path)
    layers = DecoderLayers(checkpoint, 50)
    x = layers.embed(tokens, layers.embedding())
    for layer in range(3):
        x = layers.forward(layer, layers.load(layer), x)
    with torch.inference_mode():
        expected = reference.model(tokens).last_hidden_state
    got = rms_norm(x, layers.final_norm(), checkpoint.config.rms_norm_eps)
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=0)


def test_a_hadamard_matrix_undoes_itself():
    for size in (1, 2, 64, 256):
        torch.testing.assert_close(hadamard(size) @ hadamard(size), torch.eye(size), atol=1e-5, rtol=0)
    assert [n for n in (32, 48, 64, 96, 256) if can_rotate(n)] == [32, 64, 256]


def test_rotated_values_leave_the_model_as_it_was(tmp_path):
    """With grouped heads and biases: the layer's output moves by float rounding alone."""
    save_random_llama(tmp_path, attention_bias=True)
    layers = DecoderLayers(open_checkpoint(tmp_path), 50)
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2, 50, 64, generator=generator)
    weights = layers.load(1)
    weights.vectors["v_proj.bias"] = torch.randn(32, generator=generator)
    rotated = rotate_values(weights, layers.config.head_dim)
    assert not torch.allclose(rotated.linears["v_proj"], weights.linears["v_proj"])
    assert not torch.allclose(rotated.vectors["v_proj.bias"], weights.vectors["v_proj.bias"])
    expected, got = layers.forward(1, weights, x), layers.forward(1, rotated, x)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def spiky_model(directory: Path) -> Path:
    """Layer 1's values have one strong channel a head, which a rotation spreads; head_dim 16, with biases."""
    small_model(directory, attention_bias=True)
    file = directory / "model.safetensors"
    tensors = load_file(file)
    tensors[linear_name(1, "o_proj")].view(64, 4, 16)[:, :, 3] *= 30
    for layer in range(3):
        tensors[f"model.layers.{layer}.self_attn.v_proj.bias"].normal_(
            generator=torch.Generator().manual_seed(6)
        )
    save_file(tensors, file, {"format": "pt"})
    return directory


def test_a_layer_is_rotated_only_where_that_loses_less(tmp_path):
    layers = DecoderLayers(open_checkpoint(spiky_model(tmp_path / "model")), 48)
    tokens = torch.randint(0, 199, (6, 48), generator=torch.Generator().manual_seed(7))
    formats = candidate_formats((2, 3, 4, 8))
    found = SensitivityAnalysis(layers, tokens, formats, Workspace(tmp_path / "work", {}, "work")).run()
    budget = int(3.5 / 8 * sum(t.n * t.k for t in found.plain))
    chosen = choose(found, lambda tensors: allocate(tensors, budget))
    plain = choose(found, lambda tensors: allocate(tensors, budget), may_rotate=False)
    assert chosen.rotated_layers
    assert not plain.rotated_layers
    for rotation in rotations(found, chosen):
        assert rotation.is_rotated == (rotation.layer in chosen.rotated_layers)
        assert rotation.is_rotated == (rotation.rotated_kl < rotation.plain_kl)
    tensors = found.tensors(chosen.rotated_layers)
    assert total_bytes(tensors, chosen.formats) <= budget
    assert total_kl(tensors, chosen.formats) < total_kl(found.plain, plain.formats)
    assert [t.name for t in tensors] == [t.name for t in found.plain]


def test_rotations_that_lose_more_are_not_made():
    """Everything ten times worse when rotated."""
    plain = [
        replace(t, name=linear_name(0, n))
        for t, n in zip(some_tensors(2, 0), ("v_proj", "o_proj"), strict=True)
    ]
    worse = [replace(t, candidates=tuple(replace(c, kl=10 * c.kl) for c in t.candidates)) for t in plain]
    choice = choose(Sensitivities(plain, {0: worse}), lambda tensors: allocate(tensors, 300))
    assert choice == Choice(allocate(plain, 300))


def test_a_rotated_checkpoint_is_written_whole(tmp_path):
    """Rotated weights and biases belong together: in 8 bits the written model is the original."""
    model = spiky_model(tmp_path / "model")
    result = quantize(model, tmp_path / "out", Options(Budget(bits=12.0), widths=(8,), **OPTIONS), TEXT)
    assert any(r.is_rotated for r in result.rotations)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [r["layer"] for r in report["rotations"]] == [0, 1, 2]
    tokens = torch.randint(0, 199, (4, 48), generator=torch.Generator().manual_seed(4))
    got = divergence(open_checkpoint(tmp_path / "out"), open_checkpoint(model), tokens)
    assert float(got.kl.mean()) < 2e-3


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """(original, quantized directory, result) at 4 bits."""
    directory = tmp_path_factory.mktemp("quantized")
    model = small_model(directory / "model")
    options = Options(Budget(bits=4.6), **OPTIONS)
    return model, directory / "out", quantize(model, directory / "out", options, TEXT)


def test_sizes_agree_and_keep_the_budget(quantized):
    _, out, result = quantized
    assert 0.97 * 4.6 < result.bits <= 4.6
    assert (out / "model.safetensors").stat().st_size == result.file_bytes
    info = make_core(out, dtype="auto").model
    assert info.weight_bytes == result.tensor_bytes
    assert info.num_parameters == result.num_parameters
    report = json.loads((out / "report.json").read_text())
    assert (report["tensor_bytes"], report["bits"]) == (result.tensor_bytes, result.bits)
    assert not (out / WORK_DIRECTORY).exists()


def test_the_written_model_is_the_one_that_was_measured(quantized):
    model, out, result = quantized
    tokens = torch.randint(0, 199, (4, 48), generator=torch.Generator().manual_seed(4))
    measured = divergence(open_checkpoint(out), open_checkpoint(model), tokens)
    itself = divergence(open_checkpoint(model), open_checkpoint(model), tokens)
    assert float(itself.kl.abs().max()) < 1e-5
    assert float(measured.kl.mean()) == pytest.approx(result.quality["kl"], rel=0.6)
    assert float(measured.kl.mean()) < 0.2


def test_the_engine_runs_the_packed_weights(quantized):
    """The same tokens from the native kernels, the reference on packed bytes, and dense float32."""
    _, out, _ = quantized
    prompts = {f"r{i}": ([5 * i + 1, 7, 11 + i], greedy(8)) for i in range(4)}
    packed = run_all(make_core(out, dtype="auto"), prompts)
    dense = run_all(make_core(out, dtype="float32"), prompts)
    assert packed == dense


def test_estimates_follow_the_true_divergence(quantized):
    """The KL of swapping a single tensor, measured, against the analysis: within a factor of two."""
    model, _, result = quantized
    checkpoint = open_checkpoint(model)
    tokens = checkpoint.load_tokenizer()(" ".join(TEXT))["input_ids"][: 48 * 24]
    tokens = torch.tensor(tokens).view(24, 48)
    ratios = []
    for tensor in [t for t in result.tensors if "layers.1" in t.name or "embed" in t.name]:
        candidate = next(c for c in tensor.candidates if c.format == "w4g64")
        swapped = _Swapped(checkpoint, tensor.name, candidate.format)
        ratios.append(float(divergence(swapped, checkpoint, tokens).kl.mean()) / candidate.kl)
    # Rounding without feedback loses more than the estimate's error feedback, by up to a factor of three.
    assert all(0.4 < ratio < 5 for ratio in ratios), ratios


class _Swapped:
    """A checkpoint with one tensor rounded."""

    def __init__(self, checkpoint, name: str, format_name: str) -> None:
        self._checkpoint, self._name, self._format = checkpoint, name, Format.parse(format_name)

    def __getattr__(self, attribute):
        return getattr(self._checkpoint, attribute)

    def tensor(self, name: str, *, keep_packed: bool):
        dense = self._checkpoint.tensor(name, keep_packed=False)
        if name != self._name:
            return dense
        grid = choose_scales(dense, torch.ones(dense.shape[1]), self._format)
        return round_to_nearest(dense, grid).dequantize()


def test_a_memory_budget_counts_every_byte_of_the_file(tmp_path):
    model = small_model(tmp_path / "model", tie_word_embeddings=True, vocab_size=199, hidden_size=256)
    for memory in (600_000, 900_000):
        out = tmp_path / f"out-{memory}"
        result = quantize(model, out, Options(Budget(memory_bytes=memory), **OPTIONS), TEXT)
        size = (out / "model.safetensors").stat().st_size
        assert size == result.file_bytes
        assert 0.99 * memory < size <= memory


def test_a_kl_budget_is_kept(tmp_path):
    model = small_model(tmp_path / "model")
    result = quantize(model, tmp_path / "out", Options(Budget(max_kl=0.05), **OPTIONS), TEXT)
    assert result.quality["kl"] <= 0.05
    assert result.bits < 6


def test_shards_are_written_and_read(tmp_path, monkeypatch):
    model = small_model(tmp_path / "model")
    options = Options(Budget(bits=4.6), **OPTIONS)
    quantize(model, tmp_path / "one", options, TEXT)
    monkeypatch.setattr("engine.checkpoint.writing.MAX_SHARD_BYTES", 40_000)
    result = quantize(model, tmp_path / "many", options, TEXT)
    shards = sorted((tmp_path / "many").glob("model-*.safetensors"))
    assert len(shards) > 1
    assert sum(s.stat().st_size for s in shards) == result.file_bytes
    tokens = torch.arange(96).view(2, 48)
    same = divergence(open_checkpoint(tmp_path / "one"), open_checkpoint(tmp_path / "many"), tokens)
    assert float(same.kl.abs().max()) == 0


_RUN = """
import sys, torch
from pathlib import Path
from engine.quantization.pipeline import Options, quantize
from engine.quantization.search import Budget
from tests.engine.test_quantization import OPTIONS, TEXT
torch.set_num_threads(1)
options = Options(Budget(bits=4.0), num_trials=2, **OPTIONS)
steps = 0
def progress(stage, total):
    global steps
    steps += 1
    if steps == int(sys.argv[3]):
        import os, signal
        os.kill(os.getpid(), signal.SIGKILL)
quantize(Path(sys.argv[1]), Path(sys.argv[2]), options, TEXT, progress)
"""


def run_until(model: Path, out: Path, steps: int) -> int:
    """A process of its own that is killed after so many steps (0: never); its exit status."""
    command = [sys.executable, "-c", _RUN, str(model), str(out), str(steps)]
    return subprocess.run(command, timeout=120, check=False).returncode


def test_a_killed_run_continues_to_the_same_bytes(tmp_path):
    model = small_model(tmp_path / "model")
    assert run_until(model, tmp_path / "whole", 0) == 0
    for steps in (2, 1, 3, 2, 4):  # kills in the forward pass, the backward pass and the trials
        assert run_until(model, tmp_path / "killed", steps) == -signal.SIGKILL
    assert run_until(model, tmp_path / "killed", 0) == 0
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")


def test_an_unfinished_run_with_other_settings_is_refused(tmp_path):
    model = small_model(tmp_path / "model")
    assert run_until(model, tmp_path / "out", 4) == -signal.SIGKILL
    with pytest.raises(ParameterError, match=r"out: .* holds a run with other settings"):
        quantize(model, tmp_path / "out", Options(Budget(bits=3.0), **OPTIONS), TEXT)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(ParameterError, match="holds other files"):
        quantize(model, tmp_path / "other", Options(Budget(bits=3.0), **OPTIONS), TEXT)


def test_one_analysis_serves_several_budgets(tmp_path):
    model = small_model(tmp_path / "model")
    stages: list[str] = []
    for bits in (4.0, 3.0):
        options = Options(Budget(bits=bits), **OPTIONS)
        quantize(model, tmp_path / f"alone-{bits}", options, TEXT)
        stages.clear()
        out, kept = tmp_path / f"shared-{bits}", tmp_path / "analysis"
        times = {p: p.stat().st_mtime_ns for p in kept.glob("sensitivity-*")}
        quantize(model, out, options, TEXT, lambda stage, _: stages.append(stage), kept)
        assert files_of(out) == files_of(tmp_path / f"alone-{bits}")
        assert all(p.stat().st_mtime_ns == before for p, before in times.items())
    assert times
    assert "sensitivity" in stages
    other = small_model(tmp_path / "other", num_hidden_layers=1)
    with pytest.raises(ParameterError, match=r"analysis: .* holds a run with other settings"):
        quantize(other, tmp_path / "out", options, TEXT, analysis_directory=tmp_path / "analysis")


def test_too_little_text_is_refused(tmp_path):
    model = small_model(tmp_path / "model")
    with pytest.raises(QualityError, match="windows of 48 tokens"):
        quantize(model, tmp_path / "out", Options(Budget(bits=4.0), **OPTIONS), ["w1 w2 w3"])


def test_widths_that_do_not_fit_the_kernels_are_refused(tmp_path):
    model = small_model(tmp_path / "model", intermediate_size=112)
    with pytest.raises(ParameterError, match="intermediate_size 112 is not a multiple of 32"):
        quantize(model, tmp_path / "out", Options(Budget(bits=4.0), **OPTIONS), TEXT)
