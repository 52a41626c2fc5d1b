"""The edge: SmolLM2 on two cores, beside llama.cpp where it is installed, by `peregrine bench cpu`."""

import importlib.util
import json
from pathlib import Path
from typing import Any

from deploy.bench.article import processes
from deploy.bench.cpu import PROMPT_TOKENS

THREADS = 2


def measure(
    directory: Path, model: Path, quantized: Path | None, rounds: int, timeout_s: float
) -> list[dict[str, Any]]:
    """Rows of both runtimes; the time to the first token is the prompt's. Raises ChildError.

    quantized: another checkpoint of the model, measured as well.
    """
    lacks = ""
    if importlib.util.find_spec("llama_cpp") is None:
        lacks = "llama-cpp-python is not installed"
    elif model.suffix != ".gguf":
        lacks = "it reads GGUF files alone"
    runtimes = ["peregrine", *(["llama.cpp"] if not lacks else [])]
    target = directory / "cpu.json"
    arguments = ["bench", "cpu", "--threads", str(THREADS), "--batches", "1", "--rounds", str(rounds)]
    arguments += ["--runtimes", ",".join(runtimes), "--json", str(target), "--model", str(model)]
    if quantized is not None and quantized.resolve() != model.resolve():
        arguments += ["--quantized", str(quantized)]
    processes.run("deploy.cli", arguments, directory / "cpu.log", timeout_s)
    rows: list[dict[str, Any]] = [
        {
            **row,
            "ttft_ms": round(1e3 * PROMPT_TOKENS / row["prompt_tok_s"], 1),
            "prompt_tokens": PROMPT_TOKENS,
        }
        for row in json.loads(target.read_text())["rows"]
    ]
    if lacks:
        rows.append({"runtime": "llama.cpp", "failed": lacks})
    return rows
