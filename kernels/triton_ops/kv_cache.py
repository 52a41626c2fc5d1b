"""The cache's e4m3 form (see `kernels.kv_cache`) within Triton kernels."""
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl
from torch import Tensor

from kernels import kv_cache

_CARRY, _MAX_EXPONENT = tl.constexpr(kv_cache.CARRY), tl.constexpr(kv_cache.MAX_EXPONENT)


@triton.jit
def power(exponent):
    """2^(exponent - 127), zero of 0: what a code of the cache is multiplied by."""
    return (exponent.to(tl.int32) << 23).to(tl.float32, bitcast=True)


@triton.jit
def exponent_of(largest):
    """Of the codes of values whose largest magnitude this is."""
    bits = largest.to(tl.int32, bitcast=True)
    return tl.maximum(((bits + _CARRY) >> 23) - _MAX_EXPONENT, 1)


@triton.jit
def scale_to_codes(exponent):
    """What values are multiplied by to become codes."""
    return power(254 - exponent)


def operands(caches: tuple[Tensor, Tensor]) -> tuple[Tensor | None, ...]:
    """Keys, their exponents, values, theirs: pointers for a kernel. Bfloat16 has no exponents (None)."""
    if not kv_cache.is_fp8(caches[0]):
        return caches[0], None, caches[1], None
    found: list[Tensor | None] = []
    for cache in caches:
        found += [kv_cache.codes(cache), kv_cache.exponents(cache)]
    return tuple(found)


def head_stride(caches: tuple[Tensor, Tensor]) -> int:
    """Elements from one head's tokens of a block to the next one's."""
    return caches[0].stride(1)
