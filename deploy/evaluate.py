"""`peregrine eval`: suites, progress, rows."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from engine.checkpoint import open_checkpoint
from engine.quality import suites
from engine.quality import text as held_out


def run(
    models: Sequence[Path], reference: Path | None, chosen: Sequence[str], text: Path | None, size: int | None
) -> list[dict[str, Any]]:
    """Rows of all models and suites. Raises EngineError's kinds: what cannot be loaded or measured."""
    documents = held_out.documents_of_file(text) if text else held_out.heldout_documents()
    theirs = None if reference is None else open_checkpoint(reference)
    known: dict[str, np.ndarray] = {}
    rows: list[dict[str, Any]] = []
    for model in models:
        ours, label = open_checkpoint(model), model.name.removesuffix(".gguf")
        for name in chosen:
            needs_reference = name == "divergence" or (theirs is not None and name not in known)
            passes = 2 if needs_reference else 1
            with tqdm(total=passes * ours.config.num_layers, desc=f"{label} {name}", unit="layer") as bar:

                def advance(bar: Any = bar) -> None:
                    bar.update()

                found = suites.run(
                    name, ours, theirs, documents=documents, size=size, progress=advance, known=known
                )
            rows += [{"model": label, **r.as_dict()} for r in found]
    return rows
