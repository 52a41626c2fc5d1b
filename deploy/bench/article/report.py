"""article.md and article.html of article.json; measuring needs neither."""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup
from rich.console import Console

from deploy.bench.article import floors
from deploy.bench.article.claims import LONG_S, LONG_TOKENS, claims
from deploy.bench.article.floors import Card
from deploy.bench.article.results import Results
from deploy.bench.article.table import Table, has_gpu, label, shapes
from deploy.bench.article.tables import tables
from engine.models.shapes import SHAPES

_TITLE = "The article's table, measured"
_LEAD = (
    "Every figure is measured end to end over HTTP (HAProxy, Ray Serve, one replica on one accelerator) "
    "unless its table says otherwise; weights are random in the models' real shapes, SmolLM2's are real."
)


def write(results: Results, out: Path, dollars_an_hour: float, peers: Path | None, console: Console) -> None:
    """Write both beside article.json, and the pictures under plots/, where matplotlib is installed."""
    pictures: Mapping[str, Path] = {}
    if find_spec("matplotlib") is None:
        console.print("No pictures: matplotlib is not installed. Run it again with --render where it is.")
    else:
        from deploy.bench.article.plots import draw

        pictures = draw(results, out / "plots", peers)
    found, about = tables(results, dollars_an_hour), lead(results)
    facts = findings(floors.card_of(results))
    (out / "article.md").write_text(markdown(about, facts, found, pictures, out))
    (out / "article.html").write_text(html(about, facts, found, pictures))
    console.print(f"Written: {out / 'article.json'}, article.md, article.html")


def lead(results: Results) -> str:
    """What all figures have in common, and which were measured without a GPU."""
    measured = shapes(results)
    without = [name for name in measured if not has_gpu(results, name)]
    if not without or without == measured:
        return _LEAD
    where = (f"{label(n)} on {results.runs[n]['machine']['cores']} CPU cores" for n in without)
    return f"{_LEAD} Without a GPU: {'; '.join(where)}."


def findings(card: Card) -> list[str]:
    """What the arithmetic says of a card by itself, a sentence each."""
    allowed = floors.readable_bytes(LONG_TOKENS, LONG_S, card)
    fit = floors.largest_shape(allowed)
    lines = [
        f"{LONG_TOKENS:,} tokens in {LONG_S} s are {LONG_TOKENS / LONG_S:,.0f} tokens/s of one stream: at "
        f"{card.read_bytes_s / 1e12:.2f} TB/s that lets {allowed / 1e9:.2f} GB of weights be read a token."
    ]
    if fit is not None:
        lines.append(
            f"The largest of our shapes that reads so little is {fit.shape.upper()} at {fit.bits:g} bits "
            f"({fit.read_bytes / 1e9:.2f} GB); a dense model of any size is bound to "
            f"{allowed * 8 / min(floors.WIDTHS) / 1e9:.1f}e9 parameters at {min(floors.WIDTHS)} bits."
        )
    for shape, bits in (("70b", 4.0), ("180b", 2.125)):
        needed = floors.tokens_a_read(SHAPES[shape], bits, allowed)
        lines.append(
            f"{shape.upper()} at {bits:g} bits would have to bring {needed:.1f} tokens with each reading of "
            "its weights."
        )
    beyond = [f"{c.what} ({c.factor:.1f} times)" for c in claims(card) if c.can_be_met is False]
    lines.append(f"Beyond any {card.name} as published, in {LONG_S} s: {'; '.join(beyond)}.")
    return lines


def markdown(
    about: str, facts: list[str], found: list[Table], pictures: Mapping[str, Path], out: Path
) -> str:
    lines = [f"# {_TITLE}", "", about, "", *(f"- {line}" for line in facts), ""]
    for title, file in pictures.items():
        lines += [f"![{title}]({file.relative_to(out).as_posix()})", ""]
    for table in found:
        lines += [f"## {table.title}", ""]
        if table.note:
            lines += [table.note, ""]
        lines.append("| " + " | ".join(table.columns) + " |")
        marks = ("---" if i < table.num_names else "---:" for i in range(len(table.columns)))
        lines.append("|" + "|".join(marks) + "|")
        lines += ["| " + " | ".join(_cell(c) for c in row) + " |" for row in table.rows]
        lines.append("")
    return "\n".join(lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def html(about: str, facts: list[str], found: list[Table], pictures: Mapping[str, Path]) -> str:
    """One file: the pictures stand in it."""
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    drawn = {title: Markup(_svg(file)) for title, file in pictures.items()}
    template = environment.get_template("article.html.jinja")
    return template.render(title=_TITLE, lead=about, findings=facts, pictures=drawn, tables=found)


def _svg(file: Path) -> str:
    """Without the XML declaration; ids get the file's name, for those of several pictures are the same."""
    text = file.read_text()
    body = text[text.index("<svg") :]
    for mark in ('id="', 'href="#', "url(#"):
        body = body.replace(mark, f"{mark}{file.stem}-")
    return body
