"""The models of the article's table: random weights in real shapes, and real small ones."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from deploy.bench.peer_folder import write_folder
from deploy.config import DEFAULT_MODEL
from deploy.models import has_default_model, resolve_model
from engine.checkpoint.loading import RANDOM_BITS_KEY
from engine.models.config import ModelConfig
from engine.models.shapes import SHAPES

MAX_MODEL_LEN = 4096  # prompt and output of the longest case, 2,000 tokens after 128

Kind = Literal["random", "real", "tiny"]


@dataclass(frozen=True)
class Subject:
    """bits: of the layers' matrices on average; None where a checkpoint decides.

    max_num_seqs: most streams at a time, up to which concurrency grows. shape_name: of SHAPES, for random
    weights.
    """

    name: str
    title: str
    kind: Kind
    bits: float | None
    max_num_seqs: int
    shape_name: str = ""

    @property
    def shape(self) -> ModelConfig | None:
        return SHAPES.get(self.shape_name)


SUBJECTS = {
    s.name: s
    for s in (
        Subject("3.8b", "3.8B (Phi-3 mini)", "random", 3.25, 256, "3.8b"),
        Subject("3.8b-w2", "3.8B (Phi-3 mini), 2 bits", "random", 2.125, 256, "3.8b"),
        Subject("8b", "8B (Llama 3)", "random", 4.25, 256, "8b"),
        Subject("14b", "14B (Phi-3 medium)", "random", 4.25, 256, "14b"),
        Subject("70b", "70B (Llama 3)", "random", 4.0, 128, "70b"),
        Subject("123b", "123B (Mistral Large 2)", "random", 3.5, 128, "123b"),
        Subject("180b", "180B (dense)", "random", 2.125, 128, "180b"),
        Subject("smollm2", "SmolLM2-135M, real weights", "real", None, 64),
        Subject("tiny", "two small random layers", "tiny", None, 16),
    )
}
DEFAULT_SUBJECTS = ("3.8b", "3.8b-w2", "8b", "14b", "70b", "123b", "180b", "smollm2")
"""`tiny` is for tests of the command itself."""


def prepare(subject: Subject, directory: Path, quantized: Path | None = None) -> Path:
    """The model's folder or file, made in `directory` if it has to be.

    quantized: a checkpoint in the real one's place where that was not fetched before.
    Raises ModelNotFoundError where a real checkpoint cannot be had.
    """
    if subject.kind == "real":
        if quantized is not None and not has_default_model():
            return quantized.resolve()
        return resolve_model(DEFAULT_MODEL)
    folder = directory / subject.name
    if subject.kind == "tiny":
        write_random_llama(folder, num_layers=2)
    else:
        shape, bits = subject.shape, subject.bits
        assert shape is not None, "random weights have a shape"
        assert bits is not None, "and have a width"
        write_folder(folder, shape, "bf16", bits)
    return folder


def write_random_llama(folder: Path, num_layers: int) -> None:
    """A small Llama of random float32 weights with a tokenizer: any device and any engine runs it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    small = dataclasses.replace(
        SHAPES["8b"],
        vocab_size=32_000,
        hidden_size=128,
        intermediate_size=256,
        num_layers=num_layers,
        num_heads=2,
        num_kv_heads=1,
        head_dim=64,
    )
    write_folder(folder, small, "bf16", bits=8.0)
    file = folder / "config.json"
    raw = json.loads(file.read_text())
    del raw[RANDOM_BITS_KEY]  # its weights are in the folder
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**raw)).float().save_pretrained(folder)


def engine_settings(subject: Subject, model: Path, speculative_tokens: int = 0) -> dict[str, Any]:
    """The configuration's `engine` section, of the server and of the engine alone alike.

    No prefix cache, so that no round helps the next one; drafts only where they are what is measured.
    """
    return {
        "model": str(model),
        "served_model_name": subject.name,
        "max_model_len": MAX_MODEL_LEN,
        "max_num_seqs": subject.max_num_seqs,
        "enable_prefix_caching": False,
        "speculative_tokens": speculative_tokens,
    }
