"""What belongs to the machine and to no shape: its description, the kernels, counts, and when it is quiet."""

import concurrent.futures
import json
import multiprocessing
import os
import time
from pathlib import Path

import psutil

from deploy.bench import report
from deploy.bench.article import launches, processes
from deploy.bench.article.gpu_meter import open_meter
from deploy.bench.article.plan import Options
from deploy.bench.article.results import Results, Row
from deploy.bench.article.subjects import SUBJECTS

_DESCRIBE_S = 120.0
_BUILD_S = 600.0
_FREE_BYTES, _FREE_S = 2e9, 15.0  # in use on the GPU when the last server has gone; how long that may take
_QUIET_CORES, _QUIET_S = 1.5, 8.0  # in use when nothing is measured yet, and how long that may take
_POLL_S = 0.05


def describe() -> Row:
    """By a process of its own: naming the GPU makes a context there, whose memory the server is to have."""
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(report.machine).result(_DESCRIBE_S)


def compile_kernels(options: Options, results: Results) -> None:
    """The CUDA kernels, where that has not been done: minutes that belong to no shape."""
    if "KERNELS_CUDA_LIBRARY" in os.environ:  # built elsewhere
        return
    results.replace("any", "kernels")
    try:
        processes.run("kernels.cuda.build", [], options.out / "logs" / "build.log", _BUILD_S)
    except processes.ChildError as error:  # the shapes will say what it means for them
        results.add("any", "kernels", {"failed": str(error)})


def count_unfused(options: Options, results: Results, directory: Path) -> dict[int, float]:
    """Launches a token of plain torch operations, by depth of the model; empty where that failed.

    An earlier run into the same directory has counted them already.
    """
    found = {row["layers"]: row["per_token"] for row in results.of("launches", "any")}
    if found:
        return found
    rows, log = directory / "launches.jsonl", options.out / "logs" / "launches.log"
    results.replace("any", "launches")
    try:
        processes.run("deploy.bench.article.launches", [str(rows)], log, options.plan.part_s)
    except processes.ChildError as error:
        results.add("any", "launches", {"kind": "unfused", "failed": str(error)})
        return {}
    for row in map(json.loads, processes.lines(rows)):
        found[row["layers"]] = row["per_token"]
        results.add("any", row.pop("part"), row)
    return found


def add_unfused(results: Results, name: str, unfused: dict[int, float]) -> None:
    """Launches of plain torch operations, where they were counted and the shape has no such row yet."""
    if not unfused or (shape := SUBJECTS[name].shape) is None:
        return
    if not any(row["kind"] == "unfused" for row in results.of("launches", name)):
        count = round(launches.of_depth(unfused, shape.num_layers), 1)
        row = {"path": "engine", "bits": SUBJECTS[name].bits, "kind": "unfused", "per_token": count}
        results.add(name, "launches", row)


def wait_until_quiet() -> None:
    """What else was started with the server (proxy, routers) may still import. Another's load never ends."""
    deadline = time.monotonic() + _QUIET_S
    while psutil.cpu_percent(0.5) / 100 * (psutil.cpu_count() or 1) > _QUIET_CORES:
        if time.monotonic() > deadline:
            return


def wait_for_free_memory() -> None:
    """The last server's process may still be giving it back, of which the KV cache takes what is free."""
    meter, deadline = open_meter(), time.monotonic() + _FREE_S
    while meter is not None and time.monotonic() < deadline:
        if (used := meter.used_bytes()) is None or used < _FREE_BYTES:
            return
        time.sleep(_POLL_S)
