"""The `peregrine` command. Heavy imports wait until a command needs them."""

import json
import os
import signal
import sys
import threading
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer

from deploy import alerts, benches, dashboards, tenants
from deploy.terminal import console, fail

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Latency-first LLM serving.",
)
_STATS_TIMEOUT_S = 5.0


def main() -> None:
    app()


@app.command()
def serve(
    model: Annotated[
        str | None, typer.Argument(help="Default model's name, a directory, a GGUF file, or a Hub id.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file; options given here win over it.")] = None,
    replicas: Annotated[int | None, typer.Option(help="Number of replicas.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.")] = None,
    served_model_name: Annotated[str | None, typer.Option(help="The name that clients use.")] = None,
    max_model_len: Annotated[int | None, typer.Option(help="Prompt plus output tokens.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16.")] = None,
    kv_cache_dtype: Annotated[
        str | None, typer.Option(help="auto, or fp8: twice the tokens in a GPU's memory.")
    ] = None,
    speculative_tokens: Annotated[
        int | None, typer.Option(help="Most tokens drafted a step; 0 is off.", show_default="by device")
    ] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(help="Accepted API key; may be repeated.", envvar="PEREGRINE_API_KEY", show_envvar=True),
    ] = None,
    log_level: Annotated[
        str | None, typer.Option(help="debug, info (a line for each request), warning or error.")
    ] = None,
    log_format: Annotated[
        str | None,
        typer.Option(
            help="Of the lines on standard output: auto (text on a terminal, else json), json, text."
        ),
    ] = None,
) -> None:
    """Serve a model over the OpenAI API until Ctrl-C."""
    from deploy.config import ConfigError, load_config
    from deploy.models import ModelNotFoundError
    from serving.telemetry.tracing import check_environment

    overrides: dict[str, dict[str, Any]] = {
        "engine": {
            "model": model,
            "served_model_name": served_model_name,
            "max_model_len": max_model_len,
            "device": device,
            "dtype": dtype,
            "kv_cache_dtype": kv_cache_dtype,
            "speculative_tokens": speculative_tokens,
        },
        "serving": {"api_keys": tuple(api_key) if api_key else None},
        "cluster": {"replicas": replicas, "host": host, "port": port},
        "logs": {"level": log_level, "format": log_format},
    }
    given = {s: {k: v for k, v in values.items() if v is not None} for s, values in overrides.items()}
    try:
        settings = _with_log_format(load_config(config, given))
        check_environment(settings.traces)
    except (ConfigError, ValueError) as error:
        raise fail(str(error)) from None

    from deploy.cluster import StartError, running_cluster

    lines = sys.stdout
    stop, is_ready = threading.Event(), threading.Event()
    _stop_on_signals(stop, is_ready)
    try:
        status = console.status("Starting Ray Serve and loading the model (Ctrl-C stops)")
        # Standard output has log lines alone; what Ray prints of its processes goes to the other one.
        with redirect_stdout(sys.stderr), status, running_cluster(settings, lines) as url:
            is_ready.set()
            _stop_on_signals(stop, is_ready)  # ray.init put a handler of its own in SIGTERM's place
            status.stop()
            _print_ready(url, settings.engine.served_model_name or _name_of(settings.engine.model), settings)
            stop.wait()
            limit_s = settings.serving.request_timeout_s
            console.print(
                f"Shutting down: running answers have up to {limit_s:.0f} s to finish (again: none)."
            )
    except (StartError, ModelNotFoundError) as error:
        raise fail(str(error)) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _with_log_format(settings: Any) -> Any:
    """`auto` decided here, where the terminal is: replicas have none."""
    import dataclasses

    if settings.logs.format != "auto":
        return settings
    chosen = "text" if sys.stdout.isatty() else "json"
    return dataclasses.replace(settings, logs=settings.logs.model_copy(update={"format": chosen}))


def _name_of(model: str) -> str:
    return Path(model).name.removesuffix(".gguf")


def _print_ready(url: str, name: str, settings: Any) -> None:
    key = (
        ' -H "Authorization: Bearer $PEREGRINE_API_KEY"'
        if settings.serving.api_keys or settings.tenants.is_on
        else ""
    )
    console.print(f"[bold green]Ready[/] at {url}/v1 with {settings.cluster.replicas} replica(s) of {name}.")
    if (num_tokens := _kv_cache_tokens(url, settings.engine.block_size)) is not None:
        dtype = settings.engine.kv_cache_dtype
        console.print(f"KV cache: {num_tokens:,} tokens a replica (kv_cache_dtype {dtype}).", highlight=False)
    console.print("Try:")
    question = {"role": "user", "content": "What is the capital of France?"}
    body = json.dumps({"model": name, "temperature": 0, "messages": [question]})
    console.print(
        f"curl {url}/v1/chat/completions -H 'Content-Type: application/json'{key} -d '{body}'",
        highlight=False,
        soft_wrap=True,
        markup=False,
    )


def _kv_cache_tokens(url: str, block_size: int) -> int | None:
    """Of the replica that answers; None where none does, which the first request will find out too."""
    import httpx

    try:
        stats = httpx.get(f"{url}/stats", timeout=_STATS_TIMEOUT_S).raise_for_status().json()
    except httpx.HTTPError:
        return None
    return int(stats["num_blocks"]) * block_size


def _stop_on_signals(stop: threading.Event, is_ready: threading.Event) -> None:
    def handle(number: int, frame: object) -> None:
        if stop.is_set():  # the second one does not wait for anything
            os._exit(130)
        stop.set()
        if not is_ready.is_set():  # nothing waits for `stop` yet: leave the start-up through its clean-up
            raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)


@app.command()
def chat(
    base_url: Annotated[str, typer.Option(help="Where the server is.")] = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option(help="Model; the server's own by default.")] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Longest answer.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="PEREGRINE_API_KEY", help="API key.")] = None,
) -> None:
    """Talk to a running server. Ctrl-C stops an answer, Ctrl-D leaves."""
    from deploy.chat import ChatError, ChatSession

    try:
        ChatSession(base_url, model, system=system, max_tokens=max_tokens, api_key=api_key).run()
    except ChatError as error:
        raise fail(str(error)) from None


@app.command()
def fetch(
    model: Annotated[str | None, typer.Argument(help="Default model's name or a Hub id.")] = None,
) -> None:
    """Fetch a model into the cache and print its path."""
    from deploy.config import DEFAULT_MODEL
    from deploy.models import ModelNotFoundError, resolve_model

    try:
        print(resolve_model(model or DEFAULT_MODEL))
    except ModelNotFoundError as error:
        raise fail(str(error)) from None


@app.command("serve-config")
def print_serve_config(
    config: Annotated[Path, typer.Option(help="The YAML file that `serve --config` reads.")],
) -> None:
    """Print Ray Serve's configuration of it, for `serve deploy` on a cluster that runs already."""
    import yaml

    from deploy.application import serve_config
    from deploy.config import ConfigError, config_from, read_sections

    try:
        sections = read_sections(config)
        document = serve_config(config_from(sections), sections)
    except ConfigError as error:
        raise fail(str(error)) from None
    print(yaml.safe_dump(document, sort_keys=False), end="")


@app.command()
def node(
    command: Annotated[list[str], typer.Argument(help="Usually: ray start ...")],
    config: Annotated[
        Path, typer.Option(envvar="PEREGRINE_CONFIG", help="The YAML file that `serve --config` reads.")
    ],
) -> None:
    """Run a command in the environment that a cluster's node needs; put -- before it."""
    from deploy import node as nodes
    from deploy.config import ConfigError, load_config

    try:
        status = nodes.run(load_config(config), command)
    except (ConfigError, RuntimeError) as error:
        raise fail(str(error)) from None
    except OSError as error:
        raise fail(f"{command[0]}: {error.strerror}") from None
    raise typer.Exit(status)


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(help="Default model's name, a path, or a Hub id.")],
    out: Annotated[Path, typer.Option(help="Directory to write; a killed run continues in it.")],
    bits: Annotated[float | None, typer.Option(help="Budget: bits a weight, all told.")] = None,
    memory_gb: Annotated[float | None, typer.Option(help="Budget: size of the files, 10^9 bytes.")] = None,
    max_kl: Annotated[float | None, typer.Option(help="Budget: KL divergence, nats a token.")] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Text file; Python's own texts by default.")
    ] = None,
    widths: Annotated[str | None, typer.Option(help="Widths a tensor may get, e.g. 2,3,4,8.")] = None,
    symmetric: Annotated[
        bool, typer.Option("--symmetric", help="No zero points: all of it exports to compressed-tensors.")
    ] = False,
    trials: Annotated[int, typer.Option(help="Allocations to try on the true KL.")] = 1,
    windows: Annotated[int, typer.Option(help="Calibration texts.")] = 24,
    window: Annotated[int, typer.Option(help="Tokens of a calibration text.")] = 512,
    analysis: Annotated[
        Path | None, typer.Option(help="Keeps the sensitivity analysis here, for further budgets.")
    ] = None,
) -> None:
    """Quantize a checkpoint, each tensor to the bits it needs, under one budget."""
    from deploy import quantize as command
    from deploy.models import ModelNotFoundError, resolve_model
    from engine.errors import EngineError
    from engine.quantization.candidates import DEFAULT_BITS
    from engine.quantization.pipeline import Options
    from engine.quantization.search import Budget

    try:
        chosen = tuple(int(w) for w in widths.split(",")) if widths else DEFAULT_BITS
    except ValueError:
        raise fail(f"--widths: {widths!r} is not a list of numbers such as 2,3,4,8") from None
    try:
        budget = Budget(bits, None if memory_gb is None else int(memory_gb * 1e9), max_kl)
        options = Options(budget, chosen, windows, window=window, num_trials=trials, is_symmetric=symmetric)
        result = command.run(resolve_model(model), out, options, calibration, analysis)
    except (EngineError, ModelNotFoundError) as error:
        raise fail(str(error)) from None
    command.print_result(result, out, console)


@app.command()
def export(
    checkpoint: Annotated[
        Path, typer.Argument(help="Directory of `peregrine quantize`, or a quantized one.")
    ],
    out: Annotated[Path, typer.Option(help="Directory to write.")],
    form: Annotated[
        str, typer.Option("--format", help="compressed-tensors (vLLM reads it), or safetensors (floats).")
    ] = "compressed-tensors",
    others: Annotated[
        str, typer.Option(help="Matrices that W4A16 and W8A16 cannot hold: refuse, wide (8 bits) or floats.")
    ] = "refuse",
    dtype: Annotated[str, typer.Option(help="Of the floats: float32, bfloat16 or float16.")] = "float32",
) -> None:
    """Write a quantized checkpoint in a form that other programs read."""
    from deploy import export as command
    from engine.errors import EngineError

    try:
        result = command.run(checkpoint, out, form, others, dtype)
    except EngineError as error:
        raise fail(str(error)) from None
    command.print_result(result, out, console)


@app.command()
def sizing(
    model: Annotated[str, typer.Argument(help="3.8b, 8b, 14b, 70b, 123b, 180b, or a config.json.")],
    bits: Annotated[str, typer.Option(help="Comma-separated, of the layers' weights.")] = "2.125,3.25,4.25,8",
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the result here.")] = None,
) -> None:
    """Which GPU holds a model at which bits, and how many tokens of KV cache beside it. Needs no GPU."""
    from deploy import sizing as command
    from deploy.bench import report
    from engine.errors import EngineError
    from engine.models.shapes import SHAPES

    try:
        shape = SHAPES[model] if model in SHAPES else command.shape_of(Path(model))
        rows = command.rows({Path(model).name: shape}, tuple(float(b) for b in bits.split(",")))
    except (EngineError, OSError, ValueError) as error:
        raise fail(str(error)) from None
    report.publish(rows, "Sizing", json_path)


@app.command("eval")
def evaluate(
    models: Annotated[list[str], typer.Argument(help="Each the default model's name, a path, or a Hub id.")],
    reference: Annotated[str | None, typer.Option(help="The unquantized model.")] = None,
    text: Annotated[Path | None, typer.Option(help="Held-out text; Python's own by default.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the result here.")] = None,
    suite: Annotated[list[str] | None, typer.Option(help="May be repeated; all by default.")] = None,
    size: Annotated[int | None, typer.Option(min=2, help="Windows, questions or problems a suite.")] = None,
) -> None:
    """Quality of models beside their reference: divergence, reasoning, bias, code."""
    from deploy import evaluate as command
    from deploy.bench import report
    from deploy.models import ModelNotFoundError, resolve_model
    from engine.errors import EngineError
    from engine.quality.suites import SUITES

    chosen = suite or list(SUITES)
    if unknown := [name for name in chosen if name not in SUITES]:
        raise fail(f"--suite: unknown {unknown[0]!r} (known: {', '.join(SUITES)})")
    try:
        against = resolve_model(reference) if reference else None
        rows = command.run([resolve_model(m) for m in models], against, chosen, text, size)
    except (EngineError, ModelNotFoundError) as error:
        raise fail(str(error)) from None
    report.publish(rows, "Quality", json_path)


app.add_typer(dashboards.app, name="dashboards")
app.add_typer(alerts.app, name="alerts")
app.add_typer(benches.app, name="bench")
app.add_typer(tenants.keys, name="keys")
app.command()(tenants.usage)


@app.command()
def version() -> None:
    """Print the version."""
    from serving.state import package_version

    print(package_version())


if __name__ == "__main__":
    main()
