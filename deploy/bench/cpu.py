"""CPU decoding beside transformers and llama.cpp: the same weights, prompts and threads, in one run.

Every measurement is a process of its own (so that memory is its own and no runtime's idle threads disturb
another), repeated in rounds that visit all runtimes; medians over the rounds are reported.
"""

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

PROMPT_TOKENS = 128
OUTPUT_TOKENS = 64
QUANTIZED = "peregrine-quantized"
RUNTIMES = ("peregrine", "peregrine-fp32", "transformers-fp32", "transformers-bf16", "llama.cpp")
_TIMEOUT_S = 600

Measurement = tuple[float, float]
"""(prompt tokens / s, output tokens / s), over the whole batch."""


def run(
    model: Path,
    threads: int,
    batches: list[int],
    runtimes: list[str],
    rounds: int,
    quantized: Path | None = None,
) -> list[dict[str, Any]]:
    """Rows of cpu.json; `quantized` is another checkpoint of the model, that Peregrine runs in addition.

    Raises RuntimeError when a runtime fails.
    """
    results: dict[tuple[str, int], list[dict[str, float]]] = {}
    paths = dict.fromkeys(runtimes, model)
    if quantized is not None:
        runtimes = [*runtimes, QUANTIZED]
        paths[QUANTIZED] = quantized
    plan = [(r, b) for _ in range(rounds) for r in runtimes for b in batches]
    for runtime, batch in tqdm(plan, desc="measuring", unit="run"):
        command = [sys.executable, "-m", "deploy.bench.cpu", runtime, str(paths[runtime])]
        command += [str(threads), str(batch)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{runtime} failed: {done.stderr.strip()[-2000:]}")
        results.setdefault((runtime, batch), []).append(json.loads(done.stdout.splitlines()[-1]))
    return [
        {
            "runtime": runtime,
            "model": paths[runtime].name.removesuffix(".gguf"),
            "weights_mb": round(_weight_bytes(paths[runtime]) / 1e6, 1),
            "threads": threads,
            "batch": batch,
            "prompt_tok_s": round(statistics.median(r["prompt_tok_s"] for r in runs), 1),
            "tok_s": round(statistics.median(r["tok_s"] for r in runs), 1),
            "rss_mb": round(statistics.median(r["rss_mb"] for r in runs)),
        }
        for (runtime, batch), runs in results.items()
    ]


def _weight_bytes(model: Path) -> int:
    files = model.glob("*.safetensors") if model.is_dir() else [model]
    return sum(f.stat().st_size for f in files)


def prompts(batch: int, vocab_size: int) -> list[list[int]]:
    """Different tokens for each sequence, the same for each runtime."""
    return [
        [(7919 * (b + 1) + 104729 * i) % (vocab_size - 100) + 50 for i in range(PROMPT_TOKENS)]
        for b in range(batch)
    ]


def measure_peregrine(model: Path, threads: int, batch: int, dtype: str) -> Measurement:
    from engine import EngineConfig, SamplingParams
    from engine.core import EngineCore
    from engine.messages import AddRequest

    core = EngineCore(
        EngineConfig(
            model=str(model),
            device="cpu",
            dtype=dtype,  # type: ignore[arg-type]
            num_threads=threads,
            token_budget=1024,
            num_blocks=batch * 16 + 64,
        )
    )
    core.warm_up()
    params = SamplingParams(temperature=0.0, max_tokens=OUTPUT_TOKENS + 1, ignore_eos=True)
    for i, prompt in enumerate(prompts(batch, core.model.vocab_size)):
        core.add_request(AddRequest(str(i), tuple(prompt), params, 0.0))
    start = time.perf_counter()
    while core.stats().num_waiting_tokens:
        core.step()
    prefilled = time.perf_counter()
    done = core.stats().total_output_tokens
    while core.has_work:
        core.step()
    end = time.perf_counter()
    num_tokens = core.stats().total_output_tokens - done
    return batch * PROMPT_TOKENS / (prefilled - start), num_tokens / (end - prefilled)


def measure_transformers(model: Path, threads: int, batch: int, dtype: str) -> Measurement:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    lm = AutoModelForCausalLM.from_pretrained(
        str(model.parent), gguf_file=model.name, dtype=getattr(torch, dtype), local_files_only=True
    ).eval()
    token_ids = torch.tensor(prompts(batch, lm.config.vocab_size))
    with torch.inference_mode():
        lm(token_ids[:, :8])
        start = time.perf_counter()
        out = lm(token_ids, use_cache=True, logits_to_keep=1)
        prefilled = time.perf_counter()
        for _ in range(OUTPUT_TOKENS):
            chosen = out.logits[:, -1].argmax(dim=-1, keepdim=True)
            out = lm(chosen, past_key_values=out.past_key_values, use_cache=True)
        end = time.perf_counter()
    return token_ids.numel() / (prefilled - start), batch * OUTPUT_TOKENS / (end - prefilled)


def measure_llama_cpp(model: Path, threads: int, batch: int) -> Measurement:
    import llama_cpp as ll

    ll.llama_backend_init()
    # The callback object must live as long as it may be called.
    silence = ll.llama_log_callback(lambda level, text, data: None)
    ll.llama_log_set(silence, None)
    lm = ll.llama_model_load_from_file(str(model).encode(), ll.llama_model_default_params())
    vocab_size = ll.llama_vocab_n_tokens(ll.llama_model_get_vocab(lm))
    params = ll.llama_context_default_params()
    params.n_ctx = batch * 256
    params.n_batch = params.n_ubatch = 1024
    params.n_seq_max = batch
    params.n_threads = params.n_threads_batch = threads
    context = ll.llama_init_from_model(lm, params)
    tokens = ll.llama_batch_init(batch * PROMPT_TOKENS, 0, 1)

    def decode(columns: list[list[int]], position: int) -> None:
        tokens.n_tokens = 0
        for sequence, column in enumerate(columns):
            for offset, token_id in enumerate(column):
                i = tokens.n_tokens
                tokens.token[i] = token_id
                tokens.pos[i] = position + offset
                tokens.n_seq_id[i] = 1
                tokens.seq_id[i][0] = sequence
                tokens.logits[i] = offset == len(column) - 1
                tokens.n_tokens += 1
        if ll.llama_decode(context, tokens) != 0:
            raise RuntimeError("llama_decode failed")

    def choose(row: int) -> int:
        import numpy as np

        logits = ll.llama_get_logits_ith(context, row)
        return int(np.ctypeslib.as_array(logits, shape=(vocab_size,)).argmax())

    decode([[1, 2, 3]], 0)
    ll.llama_memory_clear(ll.llama_get_memory(context), True)
    start = time.perf_counter()
    decode(prompts(batch, vocab_size), 0)
    chosen = [[choose((b + 1) * PROMPT_TOKENS - 1)] for b in range(batch)]
    prefilled = time.perf_counter()
    for step in range(OUTPUT_TOKENS):
        decode(chosen, PROMPT_TOKENS + step)
        chosen = [[choose(b)] for b in range(batch)]
    end = time.perf_counter()
    return batch * PROMPT_TOKENS / (prefilled - start), batch * OUTPUT_TOKENS / (end - prefilled)


_MEASURE: dict[str, Callable[[Path, int, int], Measurement]] = {
    "peregrine": lambda m, t, b: measure_peregrine(m, t, b, "auto"),
    QUANTIZED: lambda m, t, b: measure_peregrine(m, t, b, "auto"),
    "peregrine-fp32": lambda m, t, b: measure_peregrine(m, t, b, "float32"),
    "transformers-fp32": lambda m, t, b: measure_transformers(m, t, b, "float32"),
    "transformers-bf16": lambda m, t, b: measure_transformers(m, t, b, "bfloat16"),
    "llama.cpp": measure_llama_cpp,
}


def _main(runtime: str, model: str, threads: str, batch: str) -> None:
    prompt_tok_s, tok_s = _MEASURE[runtime](Path(model), int(threads), int(batch))
    rss_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"prompt_tok_s": prompt_tok_s, "tok_s": tok_s, "rss_mb": rss_mb}))


if __name__ == "__main__":
    _main(*sys.argv[1:])
