"""One checkpoint's logits and greedy tokens beside those of the same weights in transformers."""

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

import kernels
from engine import EngineConfig, SamplingParams
from engine.checkpoint import Checkpoint, open_checkpoint
from engine.core import EngineCore
from engine.messages import AddRequest
from engine.models.build import build_model
from engine.models.llama import KVCache

PROMPT_TOKENS, NEW_TOKENS = 120, 24
_MAX_MODEL_LEN, _BLOCK_SIZE, _NUM_BLOCKS = 256, 16, 64
_CHUNKS = (50, 37, 1, 1, 24)  # then the rest: chunked prefill, decodes, and chunks again
_TOKEN_BUDGET = 48
_SHARED_TOKENS = 80  # of two prompts, for the prefix cache


@dataclass(frozen=True, slots=True)
class Agreement:
    """max_abs_diff, logit_std: over a prompt's float32 logits. num_equal of num_tokens greedy tokens are what
    transformers chooses, given all before them; num_cached prompt tokens came from the prefix cache.
    """

    max_abs_diff: float
    logit_std: float
    num_equal: int
    num_tokens: int
    num_cached: int


@torch.inference_mode()
def compare(path: Path, reference: PreTrainedModel) -> Agreement:
    """Raises ModelLoadError where the checkpoint cannot be loaded."""
    first, second = _prompts(reference.config.vocab_size)
    expected = _reference_logits(reference, first)
    got = our_logits(open_checkpoint(path), torch.tensor(first))
    outputs, num_cached = _generate(path, [first, second])
    num_equal = 0
    for prompt, output in zip((first, second), outputs, strict=True):
        chosen = _reference_logits(reference, prompt + output)[len(prompt) - 1 : -1].argmax(-1)
        num_equal += int((chosen == torch.tensor(output)).sum())
    return Agreement(
        max_abs_diff=float((got - expected).abs().max()),
        logit_std=float(expected.std()),
        num_equal=num_equal,
        num_tokens=sum(map(len, outputs)),
        num_cached=num_cached,
    )


@torch.inference_mode()
def our_logits(checkpoint: Checkpoint, token_ids: Tensor, *, keep_packed: bool = False) -> Tensor:
    """float32 [T, vocab] for token_ids [T], in chunks and single tokens over the paged cache."""
    device = torch.device("cpu")
    model = build_model(
        checkpoint, max_model_len=_MAX_MODEL_LEN, dtype=torch.float32, device=device, keep_packed=keep_packed
    )
    cache = KVCache.allocate(checkpoint.config, _NUM_BLOCKS, _BLOCK_SIZE, torch.float32, device)
    rows, begin = [], 0
    for size in (*_CHUNKS, len(token_ids) - sum(_CHUNKS)):
        part = token_ids[begin : begin + size]
        rows.append(model.logits(model.forward(part, cache, _step(begin, len(part)))))
        begin += size
    return torch.cat(rows)


def _step(num_computed: int, num_new: int) -> kernels.AttentionMetadata:
    """One sequence over consecutive blocks."""
    positions = torch.arange(num_computed, num_computed + num_new, dtype=torch.int32)
    return kernels.AttentionMetadata(
        positions=positions,
        slot_mapping=positions,
        query_start_loc=torch.tensor([0, num_new], dtype=torch.int32),
        seq_lens=torch.tensor([num_computed + num_new], dtype=torch.int32),
        block_table=torch.arange(_NUM_BLOCKS, dtype=torch.int32)[None],
    )


def _prompts(vocab_size: int) -> tuple[list[int], list[int]]:
    """Two that begin alike."""
    generator = torch.Generator().manual_seed(1)
    size = (2, PROMPT_TOKENS)
    first, second = torch.randint(3, vocab_size, size, generator=generator).tolist()
    return first, first[:_SHARED_TOKENS] + second[_SHARED_TOKENS:]


def _reference_logits(reference: PreTrainedModel, token_ids: list[int]) -> Tensor:
    logits: Tensor = reference(torch.tensor([token_ids])).logits[0]
    return logits


def _generate(path: Path, prompts: list[list[int]]) -> tuple[list[list[int]], int]:
    """Greedy tokens of each, one after the other, by the whole engine."""
    core = EngineCore(
        EngineConfig(
            model=str(path),
            device="cpu",
            dtype="float32",
            num_blocks=_NUM_BLOCKS,
            token_budget=_TOKEN_BUDGET,
            max_num_seqs=4,
            max_model_len=_MAX_MODEL_LEN,
        )
    )
    params = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True)
    texts: list[list[int]] = []
    num_cached = 0
    for i, prompt in enumerate(prompts):
        core.add_request(AddRequest(str(i), tuple(prompt), params, time.monotonic()))
        texts.append([])
        while core.has_work:
            for output in core.step().outputs:
                assert output.token_id is not None
                texts[i].append(output.token_id)
                num_cached = output.num_cached_tokens
    return texts, num_cached
