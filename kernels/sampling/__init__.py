"""Sampling on the device, without host synchronization: one call, capturable in a CUDA graph.

Triton is imported at the first use on a GPU only; a CPU runs the reference.
"""

from torch import Tensor

from kernels.sampling import reference
from kernels.sampling.batch import (
    MAX_BIAS,
    MAX_VOCAB,
    Mode,
    RowParams,
    Sampled,
    SamplingBatch,
    allocate_masks,
    num_mask_words,
)
from kernels.sampling.reference import mask_bias

__all__ = [
    "MAX_BIAS",
    "MAX_VOCAB",
    "Mode",
    "RowParams",
    "Sampled",
    "SamplingBatch",
    "allocate_masks",
    "mask_bias",
    "num_mask_words",
    "sample",
]


def sample(
    logits: Tensor,
    batch: SamplingBatch,
    *,
    num_logprobs: int | None = None,
    mode: Mode = Mode.FILTERED,
    advance: bool = False,
    has_masks: bool = False,
) -> Sampled:
    """One token for each row of logits, float32 [R, V]; row i belongs to the batch's row i.

    A row's token depends on its own logits, parameters, seed and position alone. The logits are left as
    they are.

    Args:
        num_logprobs: as many best alternatives with their logprobs, and the sampled tokens' own; None: none.
        mode: at least the highest `RowParams.mode` among the rows.
        advance: afterwards position += 1 and, where there are penalties, the token is counted.
        has_masks: rows whose `is_masked` is set choose among the tokens of their mask; without it nobody
            looks at masks.

    Raises:
        ValueError: shapes or dtypes that do not fit, or masks that the batch has no tensors for.
    """
    num_rows, vocab_size = logits.shape
    if num_rows > batch.capacity or vocab_size > MAX_VOCAB:
        raise ValueError(f"logits are {num_rows} x {vocab_size}, limit {batch.capacity} x {MAX_VOCAB}")
    if batch.output_counts is not None and batch.output_counts.shape[1] != vocab_size:
        raise ValueError(f"logits have {vocab_size} columns, the penalties {batch.output_counts.shape[1]}")
    if has_masks and (batch.masks is None or batch.masks.shape[1] != num_mask_words(vocab_size)):
        raise ValueError(f"the batch has no masks for {vocab_size} tokens")
    if logits.device.type != "cuda":
        backend = reference.sample
    else:
        from kernels.sampling import device

        backend = device.sample
    return backend(logits, batch, num_logprobs=num_logprobs, mode=mode, advance=advance, has_masks=has_masks)
