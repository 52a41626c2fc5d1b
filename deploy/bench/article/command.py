"""`peregrine bench article`: measure, then write the report; also when it was told to end."""

import dataclasses
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from deploy.bench.article import report
from deploy.bench.article import run as parts
from deploy.bench.article.plan import BRIEF, FULL, QUICK, Options
from deploy.bench.article.results import Results


@dataclass(frozen=True)
class Request:
    """The command's options. budget_s: None takes the plan's; budgets: of single shapes."""

    out: Path
    shapes: Sequence[str]
    quick: bool = False
    brief: bool = False
    render_only: bool = False
    budget_s: float | None = None
    dollars_an_hour: float = 3.0
    budgets: Mapping[str, float] = field(default_factory=dict)
    quantized: Path | None = None
    peers: Path | None = None


def run(request: Request, console: Console) -> None:
    """Raises KeyboardInterrupt where it was interrupted, after the report of what there is was written."""
    before = signal.signal(signal.SIGTERM, _interrupt)  # so that the server is ended in order
    request.out.mkdir(parents=True, exist_ok=True)
    try:
        if not request.render_only:
            plan = BRIEF if request.brief else QUICK if request.quick else FULL
            if request.budget_s is not None:
                plan = dataclasses.replace(plan, budget_s=request.budget_s)
            options = Options(request.out, request.shapes, plan, request.quantized, request.budgets)
            parts.run(options, console)
    finally:
        signal.signal(signal.SIGTERM, before)
        results = Results(request.out / "article.json")
        report.write(results, request.out, request.dollars_an_hour, request.peers, console)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt
