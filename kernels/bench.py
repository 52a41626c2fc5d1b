"""Products over packed weights on the GPU: microseconds, GB/s, share of the read-only rate; and sampling.

The weights of consecutive launches are different ones of more than 500 MB in all, so that none is found in
L2. `us` is a launch's share of a graph of launches, start and end included; `us_chained` the share of a phase
in one launch of many, where the next phase's weights stream in while the one before ends.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from kernels.cuda.bandwidth import device_ms, read_rate_gb_s
from kernels.cuda.packing import DEVICE_FORMATS, DeviceFormat, DeviceWeight, dequantize, random_matrix
from kernels.cuda.program import PhaseList, StepInputs, StepProgram
from kernels.sampling import Mode, RowParams, SamplingBatch, sample

_COLD_BYTES = 5e8
SHAPES = ((8192, 8192), (6144, 4096), (28672, 4096), (4096, 14336), (57344, 8192), (8192, 28672))


def name_of(f: DeviceFormat) -> str:
    return f"w{f.bits}" + (f"g{f.group}" if f.group else "row")


def run(
    tokens: Sequence[int], names: Sequence[str] | None, shapes: Sequence[tuple[int, int]]
) -> Iterator[dict[str, Any]]:
    """Rows of kernels.json. Raises ValueError for a name that is no format."""
    known = {name_of(f): f for f in DEVICE_FORMATS if f.kind == "zero"}
    if unknown := set(names or ()) - set(known):
        raise ValueError(f"unknown format {sorted(unknown)[0]!r} (known: {', '.join(known)})")
    rate = read_rate_gb_s()
    for n, k in shapes:
        for name in names or known:
            yield from _rows(n, k, known[name], tokens, rate)


def _rows(n: int, k: int, f: DeviceFormat, tokens: Sequence[int], rate: float) -> Iterator[dict[str, Any]]:
    device = torch.device("cuda")
    generator = torch.Generator(device=device).manual_seed(0)
    count = max(3, int(_COLD_BYTES / (n * k * f.bits / 8)))
    weights = [DeviceWeight((random_matrix(n, k, f, device, generator),)) for _ in range(count)]
    inputs = StepInputs.allocate(1, 1, device)
    dense = dequantize(weights[0].parts[0])
    for m in tokens:
        x = torch.randn(m, k, device=device, generator=generator)
        out = torch.full((m, n), float("nan"), device=device)
        single = []
        chain = PhaseList()
        for weight in weights:
            phases = PhaseList()
            phases.add_matmul(weight, x, out)
            single.append(StepProgram(phases, inputs))
            chain.add_matmul(weight, x, out)
        single[0].launch(m)
        expected = x.double() @ dense.double().T
        error = float((out.double() - expected).abs().max() / expected.abs().max())
        us = device_ms(_graph_of(single, m).replay) / count * 1e3
        chained = StepProgram(chain, inputs)
        us_chained = device_ms(lambda c=chained, m=m: c.launch(m)) / count * 1e3  # type: ignore[misc]
        gb_s = weights[0].nbytes / us / 1e3
        yield {
            "op": "linear",
            "format": name_of(f),
            "m": m,
            "n": n,
            "k": k,
            "us": round(us, 2),
            "us_chained": round(us_chained, 2),
            "gb_s": round(gb_s),
            "share_of_read_rate": round(gb_s / rate, 3),
            "max_rel_err": float(f"{error:.2g}"),
        }


def run_sampling(num_rows: Sequence[int] = (1, 16, 64), vocab: int = 128_256) -> Iterator[dict[str, Any]]:
    """Rows of kernels.json: a call in a graph, of logits that are spread as a model's and nearly flat."""
    device, calls = torch.device("cuda"), 20
    generator = torch.Generator(device=device).manual_seed(0)
    for m, mode, (spread, top_k) in itertools.product(num_rows, Mode, ((3.0, 50), (1.0, 0))):
        logits = spread * torch.randn(m, vocab, device=device, generator=generator)
        batch = SamplingBatch.allocate(m, "cuda")
        for i in range(m):
            batch.set_row(i, RowParams(temperature=0.8, top_k=top_k, top_p=0.95), i, 0)
        sample(logits, batch, mode=mode)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(calls):
                sample(logits, batch, mode=mode)
        us = device_ms(graph.replay) / calls * 1e3
        yield {
            "op": f"sample_{mode.name.lower()}",
            "m": m,
            "n": vocab,
            "spread": spread,
            "top_k": top_k,
            "us": round(us, 2),
        }


def _graph_of(programs: Sequence[StepProgram], tokens: int) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for program in programs:
            program.launch(tokens)
    return graph
