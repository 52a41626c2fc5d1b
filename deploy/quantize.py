"""`peregrine quantize`: options, progress, report."""

from pathlib import Path

from rich.console import Console
from tqdm import tqdm

from deploy.quantization_report import write_report
from engine.quality import text
from engine.quantization.pipeline import Options, Result, quantize


class _Progress:
    """One bar a stage, with the time that is left."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None
        self._stage = ""

    def __call__(self, stage: str, total: int) -> None:
        if self._bar is None or stage != self._stage or self._bar.n >= self._bar.total:
            self.close()
            self._bar, self._stage = tqdm(total=total, desc=stage, unit="step"), stage
        self._bar.update()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def run(
    model: Path, out: Path, options: Options, calibration: Path | None, analysis: Path | None = None
) -> Result:
    """Quantize and write report.html. Raises what `engine.quantization.pipeline.quantize` raises."""
    documents = text.documents_of_file(calibration) if calibration else text.calibration_documents()
    progress = _Progress()
    try:
        result = quantize(model, out, options, documents, progress, analysis)
    finally:
        progress.close()
    write_report(result, model.name.removesuffix(".gguf"), out / "report.html")
    return result


def print_result(result: Result, out: Path, console: Console) -> None:
    quality = result.quality
    console.print(
        f"[bold green]{out}[/]: {result.bits:.3f} bits a weight, {result.file_bytes / 1e6:,.1f} MB. "
        f"On validation text: KL {quality['kl']:.4f} nats a token, perplexity {quality['perplexity']:.2f} "
        f"(original {quality['reference_perplexity']:.2f}), same top token {quality['top1']:.1%}. "
        f"See report.html; serve with: peregrine serve {out}"
    )
