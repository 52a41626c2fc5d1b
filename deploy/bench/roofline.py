"""Decoding speed against batch, under the roof that memory and tensor cores set: an SVG from engine.json.

python -m deploy.bench.roofline OUT.svg engine.json peer.json
"""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

_FP16_TFLOPS = 768  # dense matrix rate of the same card, measured
_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
# Of the matrices that a step multiplies by.
_PARAMETERS = {"8b": 7.5e9, "70b": 69.5e9, "123b": 122.2e9, "180b": 178.5e9}


def draw(target: Path, ours: list[dict[str, Any]], peer: list[dict[str, Any]]) -> None:
    """One panel a shape: roof, our points, the peer's."""
    decoded = [r for r in ours if "itl_ms" in r]
    shapes = list(dict.fromkeys(r["shape"] for r in decoded))
    figure, panels = plt.subplots(
        1, len(shapes), figsize=(4.2 * len(shapes), 3.6), layout="constrained", squeeze=False
    )
    for axes, shape in zip(panels[0], shapes, strict=True):
        own = sorted((r for r in decoded if r["shape"] == shape), key=lambda r: r["batch"])
        compute = _FP16_TFLOPS * 1e12 / (2 * _PARAMETERS[shape])
        for color, bits in enumerate(dict.fromkeys(r["bits"] for r in own)):
            rows = [r for r in own if r["bits"] == bits]
            roof = [min(b / rows[0]["floor_ms"] * 1e3, compute) for b in _BATCHES]
            axes.plot(_BATCHES, roof, "-", color=f"C{color}", alpha=0.5, label=f"roof, {bits} bits")
            places = [r["batch"] for r in rows], [r["tok_s"] for r in rows]
            axes.plot(*places, "o-", color=f"C{color}", label=f"peregrine, {bits} bits")
        for number, kernel in enumerate(dict.fromkeys(r["kernel"] for r in peer if r["shape"] == shape)):
            rows = [r for r in peer if r["shape"] == shape and r["kernel"] == kernel and "tok_s" in r]
            places = [r["batch"] for r in rows], [r["tok_s"] for r in rows]
            axes.plot(*places, "x--", color=f"C{3 + number}", label=f"vLLM {kernel}")
        axes.set(title=shape, xlabel="streams", ylabel="tokens/s", xscale="log", yscale="log")
        axes.legend(fontsize=7)
    figure.savefig(target, metadata={"Date": None})


if __name__ == "__main__":
    out, ours_path, peer_path = map(Path, sys.argv[1:])
    draw(out, json.loads(ours_path.read_text())["rows"], json.loads(peer_path.read_text())["rows"])
