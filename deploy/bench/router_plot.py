"""p99 TTFT of each policy on each main trace, from the rows of `peregrine bench router`.

python -m deploy.bench.router_plot OUT.svg router.json
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from deploy.bench.router import POLICIES
from deploy.bench.router_traces import MAIN_TRACES

_WIDTH = 0.8 / len(POLICIES)


def draw(rows: Sequence[Mapping[str, Any]], target: Path) -> None:
    """One panel for each number of replicas that ran every main trace with one router; the file name says the
    format.
    """
    traces = [trace.name for trace in MAIN_TRACES]
    of_one = [r for r in rows if r["routers"] == 1]
    p99 = {(r["replicas"], r["trace"], r["policy"]): r["ttft_ms_p99"] for r in of_one}
    sizes = sorted({n for n, _, _ in p99 if all((n, t, p) in p99 for t in traces for p in POLICIES)})
    matplotlib.rcParams["svg.hashsalt"] = "peregrine"  # the same rows give the same bytes
    figure, panels = plt.subplots(
        len(sizes), 1, figsize=(10, 3.2 * len(sizes)), layout="constrained", squeeze=False, sharex=True
    )
    for axes, size in zip(panels[:, 0], sizes, strict=True):
        for i, policy in enumerate(POLICIES):
            places = [x + (i - (len(POLICIES) - 1) / 2) * _WIDTH for x in range(len(traces))]
            heights = [p99[size, trace, policy] for trace in traces]
            colour = "black" if policy == "oracle" else f"C{i}"
            axes.bar(places, heights, _WIDTH, label=policy, color=colour)
        axes.set(title=f"{size} replicas", ylabel="p99 TTFT (ms)", yscale="log", ylim=(30, 100_000))
        axes.set_xticks(range(len(traces)), [trace.replace("_", " ") for trace in traces])
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, ncols=len(POLICIES), loc="outside upper center")
    figure.savefig(target, metadata={"Date": None} if target.suffix == ".svg" else None)
    plt.close(figure)


if __name__ == "__main__":
    out, source = map(Path, sys.argv[1:])
    draw(json.loads(source.read_text())["rows"], out)
