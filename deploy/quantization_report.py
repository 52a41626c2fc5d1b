"""report.html of a quantized checkpoint: what each tensor got, why, and what it cost."""

import base64
import io
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import matplotlib.pyplot as plt
import numpy as np

from engine.quantization.allocation import allocate, total_bytes, total_kl
from engine.quantization.pipeline import Result
from kernels.formats import Format

matplotlib.use("Agg")

_TEMPLATE = jinja2.Environment(autoescape=True).from_string("""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{{ name }} quantized</title>
<style>
 body { font: 16px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; }
 table { border-collapse: collapse; } td, th { padding: .2rem .8rem; border-bottom: 1px solid #ccc; }
 td { text-align: right; } td:first-child, th { text-align: left; } img { max-width: 100%; }
</style>
<h1>{{ name }}: {{ "%.3f"|format(bits) }} bits a weight</h1>
<table>
{% for label, value in summary %}<tr><th>{{ label }}</th><td>{{ value }}</td></tr>{% endfor %}
</table>
{% for title, note, image in figures %}
<h2>{{ title }}</h2><p>{{ note }}</p><img alt="{{ title }}" src="data:image/png;base64,{{ image }}">
{% endfor %}
<h2>Every tensor</h2>
<table><tr><th>tensor</th><th>shape</th><th>format</th><th>bytes</th><th>estimated KL</th></tr>
{% for row in tensors %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>
</html>
""")

_LAYERS = "model.layers."


def write_report(result: Result, name: str, path: Path) -> None:
    """Write a self-contained page (images inside, nothing fetched)."""
    quality = result.quality
    summary = [
        ("Parameters", f"{result.num_parameters:,}"),
        ("File size", f"{result.file_bytes:,} bytes"),
        ("Tensors", f"{result.tensor_bytes:,} bytes"),
        ("KL to the original", f"{quality['kl']:.4f} nats a token (estimated {result.estimated_kl:.4f})"),
        ("Perplexity", f"{quality['perplexity']:.3f} (original {quality['reference_perplexity']:.3f})"),
        ("Same most likely token", f"{quality['top1']:.2%}"),
    ]
    figures = [
        (
            "Bits over depth",
            "Each cell is a matrix; the number is its width in bits.",
            _bits_over_depth(result),
        ),
        ("Sensitivity", "KL per token when only this matrix is held in 3 bits.", _sensitivity(result)),
        (
            "Budget",
            "The estimated KL of the best allocation against size, and of one format for all tensors.",
            _budget_curve(result),
        ),
    ]
    rows = [
        (t.name, f"{t.n} x {t.k}", result.allocation[t.name], f"{c.nbytes:,}", f"{c.kl:.2e}")
        for t in result.tensors
        for c in t.candidates
        if c.format == result.allocation[t.name]
    ]
    html = _TEMPLATE.render(name=name, bits=result.bits, summary=summary, figures=figures, tensors=rows)
    path.write_text(html, encoding="utf-8")


def _bits_over_depth(result: Result) -> str:
    grid = _by_layer(result, lambda t: Format.parse(result.allocation[t.name]).bits)
    figure, axes = plt.subplots(figsize=(10, 2.6), layout="constrained")
    axes.imshow(grid, aspect="auto", cmap="viridis", vmin=2, vmax=8)
    for (row, column), bits in np.ndenumerate(grid):
        axes.text(column, row, f"{bits:.0f}", ha="center", va="center", color="white", fontsize=8)
    _label_layers(axes, result)
    return _as_png(figure)


def _sensitivity(result: Result) -> str:
    def kl(tensor: Any) -> float:
        middle = [c.kl for c in tensor.candidates if Format.parse(c.format).bits <= 3]
        return float(np.log10(max((middle or [tensor.candidates[0].kl])[-1], 1e-12)))

    grid = _by_layer(result, kl)
    figure, axes = plt.subplots(figsize=(10, 2.6), layout="constrained")
    image = axes.imshow(grid, aspect="auto", cmap="magma")
    figure.colorbar(image, label="log10 KL")
    _label_layers(axes, result)
    return _as_png(figure)


def _budget_curve(result: Result) -> str:
    tensors = result.tensors
    weights = sum(t.n * t.k for t in tensors)
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    low = sum(min(c.nbytes for c in t.candidates) for t in tensors) * 1.01
    high = sum(max(c.nbytes for c in t.candidates) for t in tensors)
    budgets = np.geomspace(low, high, 12)
    curve = [
        (total_bytes(tensors, a), total_kl(tensors, a)) for b in budgets if (a := allocate(tensors, int(b)))
    ]
    axes.plot([b * 8 / weights for b, _ in curve], [k for _, k in curve], marker=".", label="allocated")
    for name in [c.format for c in tensors[0].candidates]:
        uniform = {t.name: name for t in tensors}
        x, y = total_bytes(tensors, uniform) * 8 / weights, total_kl(tensors, uniform)
        axes.plot(x, y, "kx")
        axes.annotate(name, (x, y), textcoords="offset points", xytext=(4, 4), fontsize=8)
    own = total_bytes(tensors, result.allocation) * 8 / weights
    axes.plot(own, result.estimated_kl, "ro", label="this checkpoint")
    axes.set(xlabel="bits a weight", ylabel="estimated KL (nats a token)", yscale="log")
    axes.legend()
    return _as_png(figure)


def _by_layer(result: Result, value: Any) -> np.ndarray:
    """[linears, layers]."""
    by_name = {t.name: t for t in result.tensors}
    layers = range(_num_layers(result))
    return np.array([[value(by_name[f"{_LAYERS}{i}.{n}"]) for i in layers] for n in _linears(result)])


def _linears(result: Result) -> list[str]:
    """Names of a layer's matrices, without the layer's own."""
    first = f"{_LAYERS}0."
    return [t.name.removeprefix(first) for t in result.tensors if t.name.startswith(first)]


def _num_layers(result: Result) -> int:
    return sum(t.name.startswith(_LAYERS) for t in result.tensors) // len(_linears(result))


def _label_layers(axes: Any, result: Result) -> None:
    names = [name.removesuffix(".weight").partition(".")[2] for name in _linears(result)]
    num_layers = _num_layers(result)
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("layer")
    axes.set_xticks(range(0, num_layers, max(1, num_layers // 15)))


def _as_png(figure: Any) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, metadata={"Software": None})
    plt.close(figure)
    return base64.b64encode(buffer.getvalue()).decode()
