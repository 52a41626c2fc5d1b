"""From logits to the rows' sampled tokens, on the device."""

from torch import Tensor

from engine.cuda.rows import LaneRows
from kernels.sampling import Mode, sample


def sample_rows(
    logits: Tensor, rows: LaneRows, mode: Mode, *, has_logprobs: bool, has_masks: bool = False
) -> None:
    """One token for each row of logits, float32 [R, vocab], into the first of the rows, which move on."""
    num_rows, num_top = len(logits), rows.top_ids.shape[1] if has_logprobs else None
    got = sample(logits, rows.batch, num_logprobs=num_top, mode=mode, advance=True, has_masks=has_masks)
    rows.sampled[:num_rows].copy_(got.token_ids)
    if got.logprobs is not None and got.top_ids is not None and got.top_logprobs is not None:
        rows.logprobs[:num_rows].copy_(got.logprobs)
        rows.top_ids[:num_rows].copy_(got.top_ids)
        rows.top_logprobs[:num_rows].copy_(got.top_logprobs)
