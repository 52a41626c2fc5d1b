"""Pictures of a panel for each shape: rates by streams and first tokens by prompts, ours and others'."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator

from deploy.bench.article import floors
from deploy.bench.article.floors import Card
from deploy.bench.article.results import Results, Row
from deploy.bench.article.subjects import SUBJECTS
from deploy.bench.article.table import label, shapes

PLAIN = FuncFormatter(lambda value, place: f"{value:,g}")
_COLUMNS = 3
_STREAMS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_PROMPTS = (128, 512, 2048)
_OURS = (("http", "o-C0", "over HTTP"), ("engine", "s--C1", "engine alone"))
_PEER_STYLES = ("x:C3", "v:C4", "^:C5", "D:C6")


def measured_card(results: Results, shape: str) -> Card:
    """With the read rate of the shape's run; the best known where it was not measured."""
    row, card = next(results.of("memory", shape), {}), floors.card_of(results)
    return dataclasses.replace(card, read_bytes_s=1e9 * row["read_gb_s"]) if "read_gb_s" in row else card


def streams(results: Results, others: Sequence[Row]) -> Any:
    """Tokens a second of all streams; None without rows."""
    measured = [s for s in shapes(results) if any(results.of("decode", s))]
    if not measured:
        return None
    figure, panels = _panels(measured)
    for axes, shape in zip(panels, measured, strict=False):
        model, bits = SUBJECTS[shape].shape, SUBJECTS[shape].bits
        if model is not None and bits is not None:
            card = measured_card(results, shape)
            roof = [floors.batch_tok_s(model, bits, n, card) for n in _STREAMS]
            axes.plot(_STREAMS, roof, "-", color="black", alpha=0.5, label="roof of memory and products")
        for path, style, name in _OURS:
            _line(axes, results.of("decode", shape, path), ("streams", "tok_s"), style, name)
        _peers(axes, others, shape, ("batch", "tok_s"))
        axes.set(xlabel="streams", ylabel="tokens/s", xscale="log", yscale="log")
        axes.set_xticks([1, 4, 16, 64, 256], ["1", "4", "16", "64", "256"])
        _plain_logarithm(axes)
    _legend(figure, panels)
    return figure


def first_tokens(results: Results, others: Sequence[Row]) -> Any:
    """Of one request alone; None without rows."""
    measured = [s for s in shapes(results) if any(results.of("ttft", s))]
    if not measured:
        return None
    flop_s = floors.card_of(results).fp8_flop_s
    figure, panels = _panels(measured)
    for axes, shape in zip(panels, measured, strict=False):
        if (model := SUBJECTS[shape].shape) is not None:
            floor = [1e3 * floors.prompt_s(model, n, flop_s) for n in _PROMPTS]
            axes.plot(_PROMPTS, floor, "-", color="black", alpha=0.5, label="floor of e4m3 products")
        for path, style, name in _OURS:
            _line(axes, results.of("ttft", shape, path), ("prompt_tokens", "ttft_ms"), style, name)
        _peers(axes, others, shape, ("prompt_tokens", "ttft_ms"))
        axes.set(xlabel="prompt tokens", ylabel="first token, ms", xscale="log", yscale="log")
        axes.set_xticks(_PROMPTS, [f"{n:,}" for n in _PROMPTS])
        _plain_logarithm(axes)
    _legend(figure, panels)
    return figure


def peer_name(row: Row) -> str:
    return f"{row['engine']}, {row['kernel'].replace('_', ' ')}"


def _panels(names: Sequence[str]) -> tuple[Any, list[Any]]:
    columns = min(_COLUMNS, len(names))
    lines = -(-len(names) // columns)
    size = (3.5 * max(columns, 2), 3.0 * lines + 0.5)
    figure, axes = plt.subplots(lines, columns, figsize=size, layout="constrained", squeeze=False)
    flat = list(axes.flat)
    for panel, name in zip(flat, names, strict=False):
        panel.set_title(label(name), fontsize=10)
    for spare in flat[len(names) :]:
        spare.set_visible(False)
    return figure, flat


def _line(axes: Any, rows: Iterable[Row], keys: tuple[str, str], style: str, name: str) -> None:
    points = sorted((r[keys[0]], r[keys[1]]) for r in rows)
    if points:
        axes.plot(*zip(*points, strict=True), style, label=name, markersize=5)


def _peers(axes: Any, others: Sequence[Row], shape: str, keys: tuple[str, str]) -> None:
    """A kernel has one style in all panels."""
    of_kind = [r for r in others if all(k in r for k in keys)]
    names = list(dict.fromkeys(peer_name(r) for r in of_kind))
    for name, style in zip(names, _PEER_STYLES, strict=False):
        rows = (r for r in of_kind if r["shape"] == shape and peer_name(r) == name)
        _line(axes, rows, keys, style, f"{name} (engine alone)")


def _legend(figure: Any, panels: Iterable[Any]) -> None:
    """One for all panels, above them: it hides no point."""
    found: dict[str, Any] = {}
    for axes in panels:
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(name, handle)
    figure.legend(found.values(), found.keys(), loc="outside upper center", ncols=3, fontsize=8)


def _plain_logarithm(axes: Any) -> None:
    """Numbers at 1, 2 and 5 of each decade: a panel may span less than one."""
    axes.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(PLAIN)
