"""Greedy text of the GPU, token by token, against the same packed weights in float32 on the CPU.

    python -m deploy.bench.greedy_parity CHECKPOINT... [--json FILE]

Needs a Hopper GPU. Every token must be the float32 model's best one, or one that is as good as equal: keys,
values and prompts are bfloat16, which moves logits a little. Each token that is not the best is listed with
its distance in logits. By induction a run without any is float32's own greedy text. Held against it are all
prompts at once, and each alone, where drafts must change nothing. (Beside others they may turn a tie: they
change when a prompt starts, so what it is computed with, and large products are cut by their rows.)
"""

import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from deploy.bench import report
from engine import EngineConfig, SamplingParams
from engine.checkpoint import Checkpoint, open_checkpoint
from engine.core import EngineCore
from engine.messages import AddRequest
from engine.quality.divergence import head_table, hidden_states
from engine.quality.text import heldout_documents, token_windows

_PROMPTS, _OUTPUTS, _LONGEST_PROMPT = 20, 128, 64
_TIE = 0.04  # of the standard deviation of a row's logits


def measure(model: Path, console: Console) -> dict[str, Any]:
    """One row; raises AssertionError where a token is no tie or drafts change the text."""
    checkpoint = open_checkpoint(model)
    windows = token_windows(checkpoint.load_tokenizer(), heldout_documents(), _PROMPTS, _LONGEST_PROMPT)
    prompts = [row[: 4 + 3 * i].tolist() for i, row in enumerate(windows)]
    together, seconds = _generate(model, prompts, max_num_seqs=len(prompts), speculative_tokens=0)
    alone, alone_seconds = _generate(model, prompts, max_num_seqs=1, speculative_tokens=0)
    drafted, drafted_seconds = _generate(model, prompts, max_num_seqs=1, speculative_tokens=5)
    changed = [i for i, (a, b) in enumerate(zip(alone, drafted, strict=True)) if a != b]
    assert not changed, f"drafts changed the texts of prompts {changed}"
    ties = _ties(checkpoint, prompts * 2, together + alone, console)
    num_tokens = sum(map(len, together))
    return {
        "model": model.name,
        "tokens": 2 * num_tokens,
        "ties": len(ties),
        "largest_tie_logits": max(ties, default=0.0),
        "together_tok_s": round(num_tokens / seconds, 1),
        "alone_tok_s": round(num_tokens / alone_seconds, 1),
        "alone_tok_s_drafts": round(num_tokens / drafted_seconds, 1),
    }


def _ties(
    checkpoint: Checkpoint, prompts: list[list[int]], texts: list[list[int]], console: Console
) -> list[float]:
    """How far below the best one, in logits, each token of the prompts' texts is that is not the best.

    Raises AssertionError where that is too far for a tie.
    """
    tokens = [torch.tensor(prompt + text) for prompt, text in zip(prompts, texts, strict=True)]
    states = hidden_states(checkpoint, pad_sequence(tokens, batch_first=True))  # nobody sees what follows
    table, ties = head_table(checkpoint), []
    for number, (prompt, text, own) in enumerate(zip(prompts, texts, states, strict=True)):
        logits = functional.linear(own[len(prompt) - 1 :][: len(text)], table)
        best = logits.max(1)
        chosen = logits.gather(1, torch.tensor(text).unsqueeze(1)).squeeze(1)
        gaps, of_std = best.values - chosen, (best.values - chosen) / logits.std(1)
        for at in gaps.nonzero().flatten().tolist():
            where = f"text {number}, output {at}: {text[at]} for {best.indices[at]}"
            console.print(f"{where}, {gaps[at]:.4f} below, {of_std[at]:.4f} of the standard deviation")
            assert of_std[at] < _TIE, f"{where} is no tie"
            ties.append(float(gaps[at]))
    return ties


def _generate(
    model: Path, prompts: list[list[int]], *, max_num_seqs: int, speculative_tokens: int
) -> tuple[list[list[int]], float]:
    """Output tokens of each prompt, so many running at once, and the seconds that all took."""
    core = EngineCore(
        EngineConfig(
            model=str(model),
            max_model_len=512,
            max_num_seqs=max_num_seqs,
            num_blocks=1024,
            speculative_tokens=speculative_tokens,
            prefill_precision="bf16",  # what e4m3 prompts cost is prefill_divergence's question
        )
    )
    core.warm_up()
    params = SamplingParams(temperature=0.0, max_tokens=_OUTPUTS, ignore_eos=True)
    texts: dict[str, list[int]] = {str(i): [] for i in range(len(prompts))}
    start = time.perf_counter()
    for name, prompt in zip(texts, prompts, strict=True):
        core.add_request(AddRequest(name, tuple(prompt), params, start))
    while core.has_work:
        for output in core.step().outputs:
            if output.token_id is not None:
                texts[output.request_id].append(output.token_id)
    return list(texts.values()), time.perf_counter() - start


def main(models: list[Path], json_path: Annotated[Path | None, typer.Option("--json")] = None) -> None:
    rows = [measure(model, Console(stderr=True)) for model in models]
    report.publish(rows, "Greedy text against float32", json_path)


if __name__ == "__main__":
    typer.run(main)
