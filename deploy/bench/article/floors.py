"""What physics allows one card: bytes over its read rate, operations over its matrix rate.

Every floor is a bound from below on time: it counts the weights that a step must read and the products that
it must compute, and nothing else (no cache, no activations, no launches).
"""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from deploy.bench.article.results import Results
from deploy.bench.article.table import has_gpu
from engine.models.config import ModelConfig
from engine.models.shapes import SHAPES


@dataclass(frozen=True)
class Card:
    """name: found in the driver's name of the GPU. read_bytes_s: read-only, bytes a second. bf16_flop_s,
    fp8_flop_s: operations a second of dense products of 8192 x 8192. memory_bytes: as nvidia-smi gives it.
    """

    name: str
    read_bytes_s: float
    bf16_flop_s: float
    fp8_flop_s: float
    memory_bytes: int


# Of an H100 80GB HBM3, the best rates that were measured; our own runs read 3.02 to 3.08e12.
H100 = Card("H100", 3.18e12, bf16_flop_s=768e12, fp8_flop_s=1263e12, memory_bytes=81_559 * 2**20)
# The best of our own runs, which read 4.46 to 4.60e12; its matrix units are an H100's.
H200 = dataclasses.replace(H100, name="H200", read_bytes_s=4.6e12, memory_bytes=143_771 * 2**20)
WIDTHS = (2.125, 2.25, 3.125, 3.25, 4.125, 4.25, 8.0)
"""Bits a weight of the packed formats, scales included."""
HEAD_BITS = 6.25  # as the benchmarks store the output head


def card_of(results: Results) -> Card:
    """An H200 where every run on a GPU was on one; an H100, of which the article speaks, everywhere else."""
    gpus = [run["machine"]["gpu"] for shape, run in results.runs.items() if has_gpu(results, shape)]
    return H200 if gpus and all(H200.name in gpu for gpu in gpus) else H100


def layer_parameters(shape: ModelConfig) -> int:
    """Of the layers' matrices, norms left out."""
    attention = shape.hidden_size * (2 * shape.q_size + 2 * shape.kv_size)
    return shape.num_layers * (attention + 3 * shape.hidden_size * shape.intermediate_size)


def step_parameters(shape: ModelConfig) -> int:
    """That a step multiplies by: the layers' and the head's; rows of the embedding are only looked up."""
    return layer_parameters(shape) + shape.vocab_size * shape.hidden_size


def parameters(shape: ModelConfig) -> int:
    tables = 1 if shape.tie_word_embeddings else 2
    return layer_parameters(shape) + tables * shape.vocab_size * shape.hidden_size


def step_bytes(shape: ModelConfig, bits: float, head_bits: float = HEAD_BITS) -> float:
    """That a decode step must read. bits: of the layers' matrices on average."""
    return (layer_parameters(shape) * bits + shape.vocab_size * shape.hidden_size * head_bits) / 8


def decode_s(read_bytes: float, card: Card) -> float:
    """A step's floor by bandwidth in seconds, whatever the number of streams."""
    return read_bytes / card.read_bytes_s


def batch_tok_s(shape: ModelConfig, bits: float, streams: int, card: Card) -> float:
    """Tokens a second of all streams: weights read once a step, products at the bf16 rate."""
    compute_s = 2 * step_parameters(shape) * streams / card.bf16_flop_s
    return streams / max(decode_s(step_bytes(shape, bits), card), compute_s)


def prompt_s(shape: ModelConfig, tokens: int, flop_s: float) -> float:
    """Of a prompt's products, in seconds; the head is for its last token alone, attention is left out."""
    return 2 * layer_parameters(shape) * tokens / flop_s


def readable_bytes(tokens: int, seconds: float, card: Card) -> float:
    """Weights that may be read for each token of one stream, when so many tokens take so long."""
    return card.read_bytes_s * seconds / tokens


@dataclass(frozen=True)
class Fit:
    """A shape at the widest format with which it keeps a limit. tokens_a_read: of speculation; 1 without."""

    shape: str
    bits: float
    read_bytes: float
    tokens_a_read: float


def largest_shape(
    limit_bytes: float, shapes: Mapping[str, ModelConfig] = SHAPES, widths: Iterable[float] = WIDTHS
) -> Fit | None:
    """The shape of most parameters that reads at most so much a step at any width; None if there is none."""
    for name, shape in sorted(shapes.items(), key=lambda item: -parameters(item[1])):
        for bits in sorted(widths, reverse=True):
            if (needed := step_bytes(shape, bits)) <= limit_bytes:
                return Fit(name, bits, needed, 1.0)
    return None


def tokens_a_read(shape: ModelConfig, bits: float, limit_bytes: float) -> float:
    """How many tokens each reading of the weights must bring (by accepted drafts) to keep the limit."""
    return step_bytes(shape, bits) / limit_bytes
