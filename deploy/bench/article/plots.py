"""The report's pictures as SVG. Needs matplotlib, which measuring does not."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Patch

from deploy.bench.article import floors, panels
from deploy.bench.article.results import Results, Row
from deploy.bench.article.speed_tables import best_goodput
from deploy.bench.article.table import by, floor_ms, label, shapes
from deploy.bench.article.workloads import DEADLINES
from engine.models.shapes import SHAPES

plt.rcParams["svg.hashsalt"] = "article"  # the same rows make the same file
_PEER_HEAD_BITS = 16  # as peer.json's engines keep the output head
_HTTP, _ALONE, _PEER = "C0", "#a6cbe5", "0.6"


def draw(results: Results, directory: Path, peers: Path | None) -> dict[str, Path]:
    """Title and file of each picture that has rows. peers: rows of other engines, as in peer.json."""
    directory.mkdir(parents=True, exist_ok=True)
    others = _others(results, peers)
    makers = {
        "One stream against the bandwidth floor": ("floor", lambda: _floor(results, others)),
        "Tokens a second against streams": ("streams", lambda: panels.streams(results, others)),
        "First token by length of the prompt": ("ttft", lambda: panels.first_tokens(results, others)),
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


def _others(results: Results, peers: Path | None) -> Sequence[Row]:
    """None of another card than the report's, beside whose floors they do not belong."""
    if peers is None or not peers.exists():
        return []
    found = json.loads(peers.read_text())
    rows: list[Row] = found["rows"]
    return rows if floors.card_of(results).name in found["machine"]["gpu"] else []


@dataclass(frozen=True)
class _Bar:
    """limit: tokens a second that memory's rate allows."""

    name: str
    tok_s: float
    limit: float
    color: str


def _floor(results: Results, others: Sequence[Row]) -> Any:
    """Bars: what of the floor's tokens a second one stream reaches, ours and others'."""
    groups = [bars for shape in shapes(results) if (bars := list(_floor_bars(results, shape, others)))]
    if not groups:
        return None
    bars = [bar for group in groups for bar in group]
    places = [i + 0.5 * number for number, i in _numbered(groups)]
    figure, axes = plt.subplots(figsize=(8, 1.1 + 0.32 * places[-1]), layout="constrained")
    axes.barh(places, [100 * b.tok_s / b.limit for b in bars], color=[b.color for b in bars])
    for place, bar in zip(places, bars, strict=True):
        text = f"{bar.tok_s:,.0f} of {bar.limit:,.0f} tokens/s"
        axes.text(102, place, text, fontsize=8, verticalalignment="center")
    axes.set_yticks(places, [b.name for b in bars], fontsize=8)
    axes.invert_yaxis()
    axes.axvline(100, color="black", linewidth=1)
    axes.set(xlim=(0, 135), xticks=range(0, 101, 20), xlabel="% of the tokens/s that memory's rate allows")
    colors = {_HTTP: "Peregrine, over HTTP", _ALONE: "Peregrine, engine alone", _PEER: "others, engine alone"}
    used = {b.color for b in bars}
    handles = [Patch(color=color, label=name) for color, name in colors.items() if color in used]
    figure.legend(handles=handles, loc="outside upper center", ncols=3, fontsize=8)
    return figure


def _numbered(groups: Sequence[Sequence[Any]]) -> Iterator[tuple[int, int]]:
    """A group's number and its bar's, counted through."""
    place = 0
    for number, group in enumerate(groups):
        for _ in group:
            yield number, place
            place += 1


def _floor_bars(results: Results, shape: str, others: Sequence[Row]) -> Iterator[_Bar]:
    """Ours over HTTP, else the engine alone; then others', whose limit is by the read rate of our run."""
    floor = floor_ms(results, shape)
    served, alone = (by(results.of("decode", shape, path), "streams").get(1) for path in ("http", "engine"))
    if floor is None or (one := served or alone) is None:
        return
    yield _Bar(label(shape), one["tok_s"], 1e3 / floor, _HTTP if served else _ALONE)
    for peer in others:
        if (peer["shape"], peer.get("batch")) == (shape, 1) and "tok_s" in peer:
            read = floors.step_bytes(SHAPES[shape], peer["bits"], _PEER_HEAD_BITS)
            limit = 1 / floors.decode_s(read, panels.measured_card(results, shape))
            yield _Bar(panels.peer_name(peer), peer["tok_s"], limit, _PEER)


def _goodput(results: Results) -> Any:
    """A tier that was not measured has no bar, and says so: nothing is not zero."""
    measured = [s for s in shapes(results) if any(results.of("goodput", s))]
    if not measured:
        return None
    figure, axes = plt.subplots(figsize=(max(7.0, 1.5 + 2.2 * len(measured)), 3.6), layout="constrained")
    width = 0.8 / len(DEADLINES)
    for number, deadline in enumerate(DEADLINES):
        found = {}
        for place, shape in enumerate(measured):
            x = place + (number - (len(DEADLINES) - 1) / 2) * width
            rows = [r for r in results.of("goodput", shape) if r["tier"] == deadline.tier]
            if rows:
                found[x] = best_goodput(rows)["goodput_req_s"]
            else:
                axes.text(x, 0.05, "not measured", fontsize=7, rotation=90, ha="center", va="bottom")
        bars = axes.bar(list(found), list(found.values()), width, color=f"C{number}")
        axes.bar_label(bars, [f"{h:.3g}" for h in found.values()], fontsize=7)
    axes.set_xticks(range(len(measured)), [label(s) for s in measured])
    axes.set_yscale("symlog", linthresh=1)
    axes.yaxis.set_major_formatter(panels.PLAIN)
    top = 1.6 * max(1.0, axes.get_ylim()[1])
    axes.set(ylabel="good requests a second", ylim=(0, top), xlim=(-0.5, len(measured) - 0.5))
    names = [f"{d.tier}, {d.ends} in {d.seconds:g} s" for d in DEADLINES]
    handles = [Patch(color=f"C{number}", label=name) for number, name in enumerate(names)]
    figure.legend(handles=handles, fontsize=7, ncols=4, loc="outside upper center")
    return figure


def _memory(results: Results) -> Any:
    rows = [r for s in shapes(results) for r in results.of("memory", s)]
    if not rows:
        return None
    figure, axes = plt.subplots(figsize=(8, 1.1 + 0.42 * len(rows)), layout="constrained")
    start = [0.0] * len(rows)
    for part, name in (("weights_gb", "weights"), ("workspace_gb", "workspace"), ("kv_gb", "KV cache")):
        sizes = [r.get(part, 0.0) for r in rows]
        axes.barh([label(r["shape"]) for r in rows], sizes, left=start, label=name)
        start = [a + b for a, b in zip(start, sizes, strict=True)]
    axes.invert_yaxis()
    axes.set(xlabel="GB")
    figure.legend(fontsize=8, ncols=3, loc="outside upper center")
    return figure
