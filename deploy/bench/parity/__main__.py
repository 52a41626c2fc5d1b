"""Logits and greedy tokens of every model family and checkpoint format beside transformers'.

    python -m deploy.bench.parity [--json FILE] [--page docs/models.md] [--only FAMILY]...

Small random models, float32 on the CPU. Exits with 1 where a logit is further off than 1e-3 or a greedy token
is another.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import transformers
import typer
from rich.progress import track

from deploy.bench import report
from deploy.bench.parity.forms import FORMS
from deploy.bench.parity.measure import compare
from deploy.bench.parity.models import MODELS, SmallModel

MAX_DIFFERENCE = 1e-3
_BEGIN, _END = "<!-- table: python -m deploy.bench.parity -->", "<!-- /table -->"


def measure(model: SmallModel, form: str) -> dict[str, Any]:
    """One row of the table."""
    reference = model.build(for_gguf=form.startswith("GGUF"))
    with tempfile.TemporaryDirectory() as directory:
        agreement = compare(FORMS[form](reference, Path(directory)), reference)
    return {
        "family": model.name,
        "architecture": type(reference).__name__,
        "features": model.features,
        "checkpoint": form,
        "max_abs_logit_diff": float(f"{agreement.max_abs_diff:.2g}"),
        "logit_std": round(agreement.logit_std, 2),
        "greedy_equal": agreement.num_equal,
        "greedy_tokens": agreement.num_tokens,
        "cached_tokens": agreement.num_cached,
    }


def holds(row: dict[str, Any]) -> bool:
    return row["max_abs_logit_diff"] < MAX_DIFFERENCE and row["greedy_equal"] == row["greedy_tokens"]


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """A line for each family, a column for each format: the largest difference of a logit."""
    forms = list(dict.fromkeys(row["checkpoint"] for row in rows))
    cells = {(row["family"], row["checkpoint"]): _cell(row) for row in rows}
    features = {row["family"]: row["features"] for row in rows}
    lines = [f"| family | features on | {' | '.join(forms)} |", "|---|---|" + "---|" * len(forms)]
    for family, own in features.items():
        line = " | ".join(cells.get((family, form), "") for form in forms)
        lines.append(f"| {family} | {own} | {line} |")
    return "\n".join(lines) + "\n"


def _cell(row: dict[str, Any]) -> str:
    text = f"{row['max_abs_logit_diff']:.0e}"
    if row["greedy_equal"] == row["greedy_tokens"]:
        return text
    return f"{text} ({row['greedy_equal']} of {row['greedy_tokens']})"


def main(
    json_path: Annotated[Path | None, typer.Option("--json")] = None,
    page: Annotated[Path | None, typer.Option(help="A Markdown page, whose table is written anew.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Families, by the table's names.")] = None,
) -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    chosen = [model for model in MODELS if only is None or model.name in only]
    if not chosen:
        raise typer.BadParameter(f"must be some of {', '.join(m.name for m in MODELS)}", param_hint="--only")
    pairs = [(model, form) for model in chosen for form in FORMS]
    rows = [measure(*pair) for pair in track(pairs, description="Comparing")]
    report.publish(rows, "Parity with transformers", json_path)
    if page is not None:
        text = page.read_text(encoding="utf-8")
        begin, end = text.index(_BEGIN) + len(_BEGIN), text.index(_END)
        page.write_text(f"{text[:begin]}\n{markdown(rows)}{text[end:]}", encoding="utf-8")
    if not all(map(holds, rows)):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
