"""Sizes of quantized checkpoints: allowed, on disk, loaded by the engine, and reported.

python -m deploy.bench.checkpoint_sizes OUT.json DIR [DIR ...]
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deploy.bench import report
from engine import EngineConfig
from engine.core import EngineCore


def run(directories: Sequence[Path]) -> list[dict[str, Any]]:
    """A row for each directory that `peregrine quantize` wrote."""
    rows = []
    for directory in directories:
        told = json.loads((directory / "report.json").read_text())
        budget = told["options"]["budget"]
        file_bytes = sum(f.stat().st_size for f in directory.glob("*.safetensors"))
        core = EngineCore(EngineConfig(model=str(directory), device="cpu", num_blocks=64))
        rows.append(
            {
                "checkpoint": directory.name,
                "budget_bits": budget["bits"],
                "budget_bytes": budget["memory_bytes"],
                "file_bytes": file_bytes,
                "reported_file_bytes": told["file_bytes"],
                "loaded_bytes": core.model.weight_bytes,
                "reported_tensor_bytes": told["tensor_bytes"],
                "bits": round(told["bits"], 4),
                "share_of_budget": round(
                    file_bytes / budget["memory_bytes"]
                    if budget["memory_bytes"]
                    else told["bits"] / budget["bits"],
                    5,
                ),
                "validation_kl": round(told["quality"]["kl"], 5),
                "rotated_layers": sum(r["is_rotated"] for r in told["rotations"]),
            }
        )
    return rows


if __name__ == "__main__":
    target, *paths = map(Path, sys.argv[1:])
    report.publish(run(paths), "Sizes", target)
