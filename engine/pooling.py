"""From the residual stream of prompt chunks to one vector a prompt."""

import torch
from torch import Tensor

from engine.pooling_params import PoolingParams
from engine.request import Request
from kernels.reference import rms_norm


def pool_chunk(hidden: Tensor, final_norm: Tensor, eps: float, params: PoolingParams) -> Tensor:
    """float32 [hidden]: what a chunk's residual stream [tokens, hidden] adds, the sum or the last row."""
    rows = hidden if params.pooling == "mean" else hidden[-1:]
    return rms_norm(rows, final_norm, eps).sum(dim=0)


class PooledPrompts:
    """Adds up the chunks of each prompt, over the steps that compute it."""

    def __init__(self) -> None:
        self._pooled: dict[str, Tensor] = {}

    def add(self, request: Request, chunk: Tensor) -> None:
        """Take in a chunk's float32 [hidden], in order."""
        assert request.pooling is not None
        known = self._pooled.get(request.request_id)
        if known is not None and request.pooling.pooling == "mean":
            chunk = known + chunk
        self._pooled[request.request_id] = chunk

    def take(self, request: Request) -> tuple[float, ...]:
        """The prompt's vector, of length 1: the sum and the mean point in the same direction."""
        pooled = self._pooled.pop(request.request_id)
        return tuple(torch.nn.functional.normalize(pooled, dim=0).tolist())

    def forget(self, request_id: str) -> None:
        """Drop what is kept for a prompt that ends, or is computed again; unknown ids are ignored."""
        self._pooled.pop(request_id, None)
