"""The report's pictures as SVG. Needs matplotlib, which measuring does not."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator

from deploy.bench.article import floors
from deploy.bench.article.results import Results, Row
from deploy.bench.article.speed_tables import best_goodput
from deploy.bench.article.subjects import SUBJECTS
from deploy.bench.article.table import by, shapes
from deploy.bench.article.workloads import DEADLINES
from engine.models.shapes import SHAPES

plt.rcParams["svg.hashsalt"] = "article"  # the same rows make the same file
_PEER_HEAD_BITS = 16  # as peer.json's engines keep the output head
_PANELS = 4  # in a row
_PLAIN = FuncFormatter(lambda value, place: f"{value:,g}")
_STREAMS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def draw(results: Results, directory: Path, peers: Path | None) -> dict[str, Path]:
    """Title and file of each picture that has rows. peers: rows of other engines, as in peer.json."""
    directory.mkdir(parents=True, exist_ok=True)
    others = json.loads(peers.read_text())["rows"] if peers is not None and peers.exists() else []
    makers = {
        "One stream against the bandwidth floor": ("floor", lambda: _floor(results, others)),
        "Tokens a second against streams": ("streams", lambda: _streams(results, others)),
        "First token by length of the prompt": ("ttft", lambda: _ttft(results)),
        "Goodput under each tier's deadline": ("goodput", lambda: _goodput(results)),
        "Memory by part": ("memory", lambda: _memory(results)),
    }
    found = {}
    for title, (name, make) in makers.items():
        file = directory / f"{name}.svg"
        file.unlink(missing_ok=True)
        if (figure := make()) is not None:
            figure.savefig(file, metadata={"Date": None})
            plt.close(figure)
            found[title] = file
    return found


def _panels(count: int) -> tuple[Any, list[Any]]:
    columns = min(_PANELS, count)
    lines = -(-count // columns)
    size = (3.4 * max(columns, 2), 3.2 * lines)
    figure, axes = plt.subplots(lines, columns, figsize=size, layout="constrained", squeeze=False)
    flat = list(axes.flat)
    for spare in flat[count:]:
        spare.set_visible(False)
    return figure, flat


def _plain_logarithm(axes: Any) -> None:
    """Numbers at 1, 2 and 5 of each decade: a panel may span less than one."""
    axes.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(_PLAIN)


def _read_rate(results: Results, shape: str) -> float:
    """Of its run, bytes a second; the best known where it was not measured."""
    row = next(results.of("memory", shape), {})
    return 1e9 * row["read_gb_s"] if "read_gb_s" in row else floors.READ_BYTES_S


def _floor(results: Results, others: Sequence[Row]) -> Any:
    """Bars: what of the floor's tokens a second one stream reaches, ours and others'."""
    bars: list[tuple[str, float, str, str]] = []
    for shape in shapes(results):
        one = by(results.of("decode", shape, "http"), "streams").get(1)
        floor = next((r.get("floor_ms") for r in results.of("memory", shape)), None)
        if one and floor:
            text = f"{one['tok_s']:,.0f} of {1e3 / floor:,.0f} tokens/s"
            bars.append((f"{shape}, {one.get('bits', '')} bits", floor / one["itl_ms"], "C0", text))
        for peer in others if one and floor else ():
            if (peer["shape"], peer.get("batch")) == (shape, 1) and "tok_s" in peer:
                read = floors.step_bytes(SHAPES[shape], peer["bits"], _PEER_HEAD_BITS)
                limit = 1 / floors.decode_s(read)
                name = f"{shape}, {peer['engine']} {peer['kernel']}"
                bars.append((name, peer["tok_s"] / limit, "C7", f"{peer['tok_s']:,.0f} of {limit:,.0f}"))
    if not bars:
        return None
    figure, axes = plt.subplots(figsize=(8, 0.6 + 0.42 * len(bars)), layout="constrained")
    names, shares, colors, texts = zip(*bars, strict=True)
    axes.barh(range(len(bars)), [100 * s for s in shares], color=colors)
    for place, text in enumerate(texts):
        axes.text(102, place, text, fontsize=8, verticalalignment="center")
    axes.set_yticks(range(len(bars)), names, fontsize=8)
    axes.invert_yaxis()
    axes.axvline(100, color="black", linewidth=1)
    axes.set(xlim=(0, 135), xticks=range(0, 101, 20), xlabel="% of the tokens/s that memory's rate allows")
    return figure


def _streams(results: Results, others: Sequence[Row]) -> Any:
    measured = [s for s in shapes(results) if any(results.of("decode", s))]
    if not measured:
        return None
    figure, panels = _panels(len(measured))
    for axes, shape in zip(panels, measured, strict=False):
        model, bits = SUBJECTS[shape].shape, SUBJECTS[shape].bits
        if model is not None and bits is not None:
            rate = _read_rate(results, shape)
            roof = [floors.batch_tok_s(model, bits, n, rate) for n in _STREAMS]
            axes.plot(_STREAMS, roof, "-", color="black", alpha=0.5, label="roof of memory and products")
        for path, style in (("http", "o-C0"), ("engine", "s--C1")):
            rows = sorted(results.of("decode", shape, path), key=lambda r: r["streams"])
            label = "over HTTP" if path == "http" else "engine alone"
            axes.plot([r["streams"] for r in rows], [r["tok_s"] for r in rows], style, label=label)
        of_shape = [r for r in others if r["shape"] == shape and "tok_s" in r]
        for number, kernel in enumerate(dict.fromkeys(r["kernel"] for r in of_shape)):
            rows = [r for r in of_shape if r["kernel"] == kernel]
            places = [r["batch"] for r in rows], [r["tok_s"] for r in rows]
            axes.plot(*places, "x:", color=f"C{3 + number}", label=f"{rows[0]['engine']} {kernel}")
        axes.set(title=shape, xlabel="streams", ylabel="tokens/s", xscale="log", yscale="log")
        axes.set_xticks([1, 4, 16, 64, 256], ["1", "4", "16", "64", "256"])
        _plain_logarithm(axes)
        axes.legend(fontsize=6)
    return figure


def _ttft(results: Results) -> Any:
    measured = [s for s in shapes(results) if any(results.of("ttft", s))]
    if not measured:
        return None
    figure, panels = _panels(len(measured))
    for axes, shape in zip(panels, measured, strict=False):
        for path, style in (("http", "o-C0"), ("engine", "s--C1")):
            rows = sorted(results.of("ttft", shape, path), key=lambda r: r["prompt_tokens"])
            label = "over HTTP" if path == "http" else "engine alone"
            axes.plot([r["prompt_tokens"] for r in rows], [r["ttft_ms"] for r in rows], style, label=label)
        if (model := SUBJECTS[shape].shape) is not None:
            lengths = [128, 512, 2048]
            floor = [1e3 * floors.prompt_s(model, n) for n in lengths]
            axes.plot(lengths, floor, "-", color="black", alpha=0.5, label="floor of e4m3 products")
        axes.set(title=shape, xlabel="prompt tokens", ylabel="first token, ms", xscale="log", yscale="log")
        axes.set_xticks([128, 512, 2048], ["128", "512", "2,048"])
        _plain_logarithm(axes)
        axes.legend(fontsize=6)
    return figure


def _goodput(results: Results) -> Any:
    measured = [s for s in shapes(results) if any(results.of("goodput", s))]
    if not measured:
        return None
    figure, axes = plt.subplots(figsize=(1.5 + 1.3 * max(5, len(measured)), 3.6), layout="constrained")
    width = 0.8 / len(DEADLINES)
    for number, deadline in enumerate(DEADLINES):
        heights = []
        for shape in measured:
            rows = [r for r in results.of("goodput", shape) if r["tier"] == deadline.tier]
            heights.append(best_goodput(rows)["goodput_req_s"] if rows else 0.0)
        places = [i + (number - 1.5) * width for i in range(len(measured))]
        drawn = axes.bar(
            places, heights, width, label=f"{deadline.tier}, {deadline.ends} {deadline.seconds:g} s"
        )
        axes.bar_label(drawn, [f"{h:.3g}" for h in heights], fontsize=6)
    axes.set_xticks(range(len(measured)), measured)
    axes.set_yscale("symlog", linthresh=1)
    axes.yaxis.set_major_formatter(_PLAIN)
    axes.set(ylabel="good requests a second", ylim=(0, 1.6 * max(1.0, axes.get_ylim()[1])))
    axes.legend(fontsize=7, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return figure


def _memory(results: Results) -> Any:
    rows = [r for s in shapes(results) for r in results.of("memory", s)]
    if not rows:
        return None
    figure, axes = plt.subplots(figsize=(8, 0.9 + 0.42 * len(rows)), layout="constrained")
    start = [0.0] * len(rows)
    for part, label in (("weights_gb", "weights"), ("workspace_gb", "workspace"), ("kv_gb", "KV cache")):
        sizes = [r.get(part, 0.0) for r in rows]
        axes.barh([r["shape"] for r in rows], sizes, left=start, label=label)
        start = [a + b for a, b in zip(start, sizes, strict=True)]
    axes.invert_yaxis()
    axes.set(xlabel="GB")
    axes.legend(fontsize=7, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return figure
