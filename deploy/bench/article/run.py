"""All shapes of a run, one after the other."""

import contextlib
import tempfile
import time
from pathlib import Path

from rich.console import Console

from deploy.bench.article import machine
from deploy.bench.article.plan import Options
from deploy.bench.article.results import Results, Row
from deploy.bench.article.shape import Shape
from deploy.bench.article.shared_cluster import SharedCluster
from deploy.bench.article.subjects import SUBJECTS


def run(options: Options, console: Console) -> Results:
    """Measure every chosen shape; article.json in options.out has the rows as they come."""
    begin = time.monotonic()

    def announce(row: Row) -> None:
        line = f"{time.monotonic() - begin:6.1f} s  {_line(row)}"
        console.print(line, highlight=False, soft_wrap=True)

    results = Results(options.out / "article.json", announce)
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="article-")))
        unfused: dict[int, float] = {}
        names = list(dict.fromkeys(options.shapes))
        shapes = [Shape(SUBJECTS[n], options, results, directory / n, unfused) for n in names]
        for shape in shapes:
            stack.callback(shape.close)
        if options.plan.is_shared and shapes:
            shapes[0].get_ready()
        found = machine.describe()
        if options.plan.is_shared:
            cluster = SharedCluster(options.out / "logs", num_gpus=int("gpu" in found))
            stack.callback(cluster.close)
            for shape in shapes:
                shape.cluster = cluster
            if shapes:
                shapes[0].begin_server()
        if "gpu" in found:
            machine.compile_kernels(options, results)
            if not options.plan.is_shared:
                unfused.update(machine.count_unfused(options, results, directory))
        for number, (name, shape) in enumerate(zip(names, shapes, strict=True), 1):
            console.print(f"[bold]{name}[/] ({number} of {len(shapes)})")
            results.begin(name, found)
            shape.run(shapes[number] if number < len(shapes) else None)
        if "gpu" in found and options.plan.is_shared:  # last, as the shapes matter more
            unfused.update(machine.count_unfused(options, results, directory))
            for name in results.runs:
                machine.add_unfused(results, name, unfused)
    return results


def _line(row: Row) -> str:
    return "  ".join(f"{k} {v}" for k, v in row.items() if k not in ("why", "answer"))
