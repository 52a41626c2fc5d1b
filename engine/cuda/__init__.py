"""The engine's steps on a Hopper GPU: decodes in one launch of the fused kernel, prompts in torch."""

from engine.cuda.runner import CudaModelRunner
from engine.cuda.weights import UnsupportedError

__all__ = ["CudaModelRunner", "UnsupportedError"]
