"""`peregrine bench`: measurements. Heavy imports wait until a command needs them."""

from pathlib import Path
from typing import Annotated, Any

import typer

from deploy.terminal import console, fail

app = typer.Typer(no_args_is_help=True, help="Measurements; each can write its rows as JSON.")
JsonPath = Annotated[Path | None, typer.Option("--json", help="Write the result here.")]


@app.command("interchange")
def bench_interchange(
    checkpoint: Annotated[Path, typer.Argument(help="Directory of `peregrine quantize`.")],
    json_path: JsonPath = None,
) -> None:
    """Logits of a quantized checkpoint in transformers, and its exports: what of its values they keep."""
    from deploy.bench import interchange, report

    report.publish(interchange.rows(checkpoint), "Interchange", json_path)


@app.command("cpu")
def bench_cpu(
    json_path: JsonPath = None,
    model: Annotated[str | None, typer.Option(help="Default model's name or a GGUF file.")] = None,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    batches: Annotated[str, typer.Option(help="Comma-separated batch sizes.")] = "1,8",
    runtimes: Annotated[str | None, typer.Option(help="Comma-separated; all by default.")] = None,
    quantized: Annotated[
        Path | None, typer.Option(help="Directory of `peregrine quantize`, measured as well.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Medians are taken over so many runs.")] = 3,
) -> None:
    """CPU decoding beside transformers and llama.cpp on the same weights."""
    from deploy.bench import cpu, report
    from deploy.config import DEFAULT_MODEL
    from deploy.models import resolve_model

    chosen = runtimes.split(",") if runtimes else list(cpu.RUNTIMES)
    if unknown := [name for name in chosen if name not in cpu.RUNTIMES]:
        raise fail(f"--runtimes: unknown {unknown[0]!r} (known: {', '.join(cpu.RUNTIMES)})")
    sizes = [int(b) for b in batches.split(",")]
    rows = cpu.run(resolve_model(model or DEFAULT_MODEL), threads, sizes, chosen, rounds, quantized)
    report.publish(rows, "CPU decoding", json_path)


@app.command("serve")
def bench_serve(
    json_path: JsonPath = None,
    model: Annotated[str | None, typer.Option(help="As for `serve`.")] = None,
    concurrencies: Annotated[str, typer.Option(help="Comma-separated.")] = "1,4,8",
    requests: Annotated[int, typer.Option(min=1, help="Requests a round.")] = 16,
    rounds: Annotated[int, typer.Option(min=1)] = 4,
    port: Annotated[int, typer.Option()] = 8765,
) -> None:
    """The bare engine and the whole serving path, in one run."""
    from deploy.bench import report
    from deploy.bench import serve as serve_bench
    from deploy.config import load_config

    overrides: dict[str, dict[str, Any]] = {
        "cluster": {"port": port},
        "engine": {"model": model} if model else {},
    }
    sizes = [int(c) for c in concurrencies.split(",")]
    rows = serve_bench.run(load_config(None, overrides), sizes, requests, rounds)
    report.publish(rows, "Serving path", json_path)


@app.command("quantization")
def bench_quantization(
    model: Annotated[str, typer.Argument(help="Default model's name or a GGUF file.")],
    json_path: JsonPath = None,
    methods: Annotated[str | None, typer.Option(help="Comma-separated; all by default.")] = None,
    widths: Annotated[str, typer.Option(help="Widths that Peregrine's allocation may use.")] = "2,3,4,5,6,8",
    text: Annotated[Path | None, typer.Option(help="Held-out text; Python's own by default.")] = None,
    work: Annotated[Path | None, typer.Option(help="Keeps the analysis and llama.cpp's files.")] = None,
    threads: Annotated[int, typer.Option(min=1)] = 2,
) -> None:
    """Peregrine's quantization beside rounding, GPTQ, HQQ and llama.cpp on one text."""
    from deploy.bench import quantization, report
    from deploy.models import resolve_model

    chosen = methods.split(",") if methods else list(quantization.METHODS)
    if unknown := [name for name in chosen if name not in quantization.ALL_METHODS]:
        raise fail(f"--methods: unknown {unknown[0]!r} (known: {', '.join(quantization.ALL_METHODS)})")
    sizes = [int(w) for w in widths.split(",")]
    rows = quantization.run(resolve_model(model), work, sizes, chosen, threads, text)
    report.publish(rows, "Quantization", json_path)


@app.command("sensitivity")
def bench_sensitivity(
    json_path: JsonPath = None,
    layers: Annotated[str, typer.Option(help="Comma-separated depths.")] = "8,16,32,64",
    rounds: Annotated[int, typer.Option(min=1)] = 3,
) -> None:
    """Time of the sensitivity analysis against depth."""
    from deploy.bench import report, sensitivity

    rows = sensitivity.run([int(n) for n in layers.split(",")], rounds)
    report.publish(rows, "Sensitivity analysis", json_path)


@app.command("kv-cache")
def bench_kv_cache(
    model: Annotated[str, typer.Argument(help="Default model's name, a directory or a GGUF file.")],
    windows: Annotated[int, typer.Option(min=1, help="Pieces of held-out text.")] = 16,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a piece.")] = 512,
    json_path: JsonPath = None,
) -> None:
    """What a KV cache of 8 bits costs: KL, best token and perplexity against bfloat16."""
    from deploy.bench import kv_cache, report
    from deploy.models import ModelNotFoundError, resolve_model
    from engine.errors import EngineError

    try:
        rows = kv_cache.run(resolve_model(model), windows, length)
    except (EngineError, ModelNotFoundError) as error:
        raise fail(str(error)) from None
    report.publish(rows, "KV cache", json_path)


@app.command("kernels")
def bench_kernels(
    json_path: JsonPath = None,
    tokens: Annotated[str, typer.Option(help="Comma-separated rows of x.")] = "1,4,8,16",
    formats: Annotated[str | None, typer.Option(help="Comma-separated; all by default.")] = None,
    sizes: Annotated[str | None, typer.Option(help="N x K, e.g. 8192x8192,4096x14336.")] = None,
) -> None:
    """Products over packed weights on a Hopper GPU, cold, beside the read-only rate; and sampling."""
    from deploy.bench import report
    from kernels import bench as kernel_bench

    try:
        shapes = [tuple(int(v) for v in s.split("x")) for s in sizes.split(",")] if sizes else None
        names = formats.split(",") if formats else None
        counts = [int(t) for t in tokens.split(",")]
        rows = list(kernel_bench.run(counts, names, shapes or kernel_bench.SHAPES))  # type: ignore[arg-type]
        rows += kernel_bench.run_sampling()
    except ValueError as error:
        raise fail(str(error)) from None
    report.publish(rows, "Kernels", json_path)


@app.command("engine")
def bench_engine(
    shape: Annotated[str, typer.Option(help="3.8b, 8b, 14b, 70b, 123b or 180b.")] = "8b",
    bits: Annotated[float, typer.Option(help="Bits a weight of the layers.")] = 4.25,
    batch: Annotated[str, typer.Option(help="Comma-separated.")] = "1,4,16",
    prompt: Annotated[str, typer.Option(help="Comma-separated prompt lengths for TTFT.")] = "128,512",
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    long_tokens: Annotated[int, typer.Option(help="Output tokens of the end-to-end run.")] = 2000,
    kv_cache_dtype: Annotated[str, typer.Option(help="auto or fp8.")] = "auto",
    json_path: JsonPath = None,
) -> None:
    """Decoding on a Hopper GPU with random weights in a real model's shape."""
    from deploy.bench import engine, report
    from engine.errors import EngineError
    from engine.models.shapes import SHAPES

    if shape not in SHAPES:
        raise fail(f"--shape: unknown {shape!r} (known: {', '.join(SHAPES)})")
    batches, prompts = ([int(v) for v in text.split(",")] for text in (batch, prompt))
    try:
        rows = engine.run(shape, bits, batches, prompts, rounds, long_tokens, kv_cache_dtype)  # type: ignore[arg-type]
    except EngineError as error:
        raise fail(str(error)) from None
    report.publish(rows, f"Engine, {shape}", json_path)


@app.command("article")
def bench_article(
    out: Annotated[Path, typer.Option(help="Directory of article.json, .md, .html; a later run adds to it.")],
    shapes: Annotated[
        str | None,
        typer.Option(help="Comma-separated, a budget of its own behind a colon (8b:90); all but `tiny`."),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Short: one round, few rates, short answers.")
    ] = False,
    brief: Annotated[
        bool, typer.Option("--brief", help="Shorter still: one Ray for all shapes, about 100 s each.")
    ] = False,
    render: Annotated[bool, typer.Option("--render", help="Measure nothing, write the report anew.")] = False,
    budget_s: Annotated[float | None, typer.Option(min=30, help="Most seconds a shape may take.")] = None,
    gpu_price: Annotated[float, typer.Option(min=0.01, help="Dollars an hour, for the score.")] = 3.0,
    quantized: Annotated[
        Path | None, typer.Option(help="Directory of `peregrine quantize`, for the CPU row.")
    ] = None,
    peers: Annotated[Path, typer.Option(help="Other engines' rows, for the pictures.")] = Path(
        "docs/benchmarks/peer.json"
    ),
) -> None:
    """The article's table over HTTP: its own servers, an open-loop client, a report with plots."""
    from deploy.bench.article import command
    from deploy.bench.article.subjects import DEFAULT_SUBJECTS, SUBJECTS

    asked = [item.partition(":") for item in shapes.split(",")] if shapes else []
    names = [name for name, _, _ in asked] or list(DEFAULT_SUBJECTS)
    if unknown := [name for name in names if name not in SUBJECTS]:
        raise fail(f"--shapes: unknown {unknown[0]!r} (known: {', '.join(SUBJECTS)})")
    try:
        budgets = {name: float(seconds) for name, colon, seconds in asked if colon}
    except ValueError as error:
        raise fail(f"--shapes: {error}") from None
    command.run(
        command.Request(
            out,
            names,
            budgets=budgets,
            quick=quick,
            brief=brief,
            render_only=render,
            budget_s=budget_s,
            dollars_an_hour=gpu_price,
            quantized=quantized,
            peers=peers,
        ),
        console,
    )


@app.command("metrics")
def bench_metrics(
    json_path: JsonPath = None,
    results: Annotated[
        Path, typer.Option(help="Directory of engine.json and cpu.json, whose steps are compared with.")
    ] = Path("docs/benchmarks"),
) -> None:
    """What metrics cost beside a decode step."""
    from deploy.bench import metrics_cost, report

    try:
        rows = metrics_cost.run(results / "engine.json", results / "cpu.json")
    except OSError as error:
        raise fail(f"--results: {error}") from None
    report.publish(rows, "Metrics beside a decode step", json_path)


@app.command("structured")
def bench_structured(
    json_path: JsonPath = None,
    batches: Annotated[str, typer.Option(help="Comma-separated.")] = "1,8",
) -> None:
    """What constraints (JSON schemas, patterns, grammars) cost beside a decode step of the default model."""
    from deploy.bench import report, structured
    from deploy.config import DEFAULT_MODEL
    from deploy.models import resolve_model

    rows = structured.run(str(resolve_model(DEFAULT_MODEL)), [int(b) for b in batches.split(",")])
    report.publish(rows, "Masks beside a decode step", json_path)


@app.command("tenants")
def bench_tenants(
    json_path: JsonPath = None,
    concurrencies: Annotated[str, typer.Option(help="Comma-separated.")] = "1,8",
    requests: Annotated[int, typer.Option(min=100, help="Of each row.")] = 20_000,
) -> None:
    """What a tenant's limits add to a request."""
    from deploy.bench import report, tenant_limits

    rows = tenant_limits.run([int(c) for c in concurrencies.split(",")], requests)
    report.publish(rows, "Limits of tenants", json_path)


@app.command("router")
def bench_router(
    replicas: Annotated[str, typer.Option(help="Comma-separated.")] = "4,16",
    load: Annotated[float, typer.Option(min=0.01, max=2, help="Share of the replicas' capacity.")] = 0.8,
    traces: Annotated[
        str | None, typer.Option(help="Comma-separated; the seven main ones by default.")
    ] = None,
    policies: Annotated[str | None, typer.Option(help="Comma-separated; all by default.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each case.")] = 2,
    requests: Annotated[int, typer.Option(min=100, help="Requests a run; at least 100 a replica.")] = 10_000,
    routers: Annotated[int, typer.Option(min=1, max=64, help="Asked in turn.")] = 1,
    event_lag_ms: Annotated[
        float, typer.Option(min=0, max=10_000, help="Mean delay of what several routers hear.")
    ] = 5.0,
    json_path: JsonPath = None,
) -> None:
    """The latency policy beside the usual ones, on simulated replicas with measured step times."""
    from deploy.bench import report, router
    from deploy.bench.router_traces import MAIN_TRACES, TRACES

    names = traces.split(",") if traces else [trace.name for trace in MAIN_TRACES]
    chosen = policies.split(",") if policies else list(router.POLICIES)
    for option, given, known in (("--traces", names, TRACES), ("--policies", chosen, router.POLICIES)):
        if unknown := [name for name in given if name not in known]:
            raise fail(f"{option}: unknown {unknown[0]!r} (known: {', '.join(known)})")
    try:
        sizes = [int(n) for n in replicas.split(",")]
    except ValueError:
        raise fail(f"--replicas: {replicas!r} is not a list of numbers such as 4,16") from None
    if min(sizes) < 2:
        raise fail("--replicas: at least 2")
    lag_s = event_lag_ms / 1e3 if routers > 1 else 0.0
    rows = router.run(sizes, load, names, chosen, seeds, requests, routers, lag_s)
    report.publish(rows, "Router", json_path)
