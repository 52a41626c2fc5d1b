"""KL divergence against size, drawn from the rows of `peregrine bench quantization`.

python -m deploy.bench.quantization_plot OUT.svg ROWS.json [ROWS.json ...]
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt

matplotlib.use("Agg")

_MARKERS = {"peregrine": "o", "gptq": "s", "hqq": "^", "rtn": "v", "llama.cpp": "x", "ends-high": "d"}


def plot(tables: Sequence[Sequence[Mapping[str, Any]]], target: Path) -> None:
    """One picture a model, beside each other; the format is the file name's."""
    matplotlib.rcParams["svg.hashsalt"] = "peregrine"  # the same rows give the same bytes
    figure, all_axes = plt.subplots(
        1, len(tables), figsize=(6 * len(tables), 4.5), layout="constrained", squeeze=False
    )
    for axes, rows in zip(all_axes[0], tables, strict=True):
        for i, (prefix, marker) in enumerate(_MARKERS.items()):
            points = sorted((r["bits"], r["kl"]) for r in rows if _family(r["method"]) == prefix)
            if points:
                style = "-" if prefix == "peregrine" else ""
                axes.plot(
                    *zip(*points, strict=True), marker=marker, linestyle=style, label=prefix, color=f"C{i}"
                )
        axes.set(title=rows[0]["model"], xlabel="bits a weight, all told", yscale="log")
        axes.grid(alpha=0.3)
    all_axes[0][0].set_ylabel("KL to the reference (nats a token)")
    all_axes[0][0].legend()
    figure.savefig(target, metadata={"Date": None} if target.suffix == ".svg" else None)
    plt.close(figure)


def _family(method: str) -> str:
    """ "gptq" of "gptq-w4g128-f16"; Peregrine's own variants are other methods than "peregrine"."""
    return next((p for p in _MARKERS if p != "peregrine" and method.startswith(p)), method)


if __name__ == "__main__":
    out, *files = map(Path, sys.argv[1:])
    every = [row for f in files for row in json.loads(f.read_text())["rows"]]
    models = dict.fromkeys(row["model"] for row in every)
    plot([[row for row in every if row["model"] == model] for model in models], out)
