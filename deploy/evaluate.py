"""`peregrine eval`: suites, progress, rows."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from engine.checkpoint import open_checkpoint
from engine.quality import suites
from engine.quality import text as held_out


def run(
    model: Path, reference: Path | None, chosen: Sequence[str], text: Path | None, size: int | None
) -> list[dict[str, Any]]:
    """Rows of all suites. Raises EngineError's kinds: what cannot be loaded or measured."""
    documents = held_out.documents_of_file(text) if text else held_out.heldout_documents()
    ours = open_checkpoint(model)
    theirs = None if reference is None else open_checkpoint(reference)
    rows: list[dict[str, Any]] = []
    for name in chosen:
        passes = 1 if theirs is None and name != "divergence" else 2
        with tqdm(total=passes * ours.config.num_layers, desc=name, unit="layer") as bar:

            def advance(bar: Any = bar) -> None:
                bar.update()

            found = suites.run(name, ours, theirs, documents=documents, size=size, progress=advance)
        rows += [r.as_dict() for r in found]
    return rows
