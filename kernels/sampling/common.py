"""What the sampling kernels share: weights as integers, keys, bins.

A token's weight is exp((x - best) / temperature), in (0, 1], as an integer in units of 2^-44. Sums of a whole
vocabulary of 2^18 fit into int64, and integer sums are exact in any order: the two stages of the draw, which
add the same weights in different groupings, agree to the last bit, and the blocked scan needs no care for
rounding. What is less likely than 2^-44 times the best token cannot be drawn.
"""
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

CHUNK = 2048  # tokens a program of a two-stage kernel takes: 64 programs for a vocabulary of 128 k
BINS = 64
_UNIT = tl.constexpr(float(1 << 44))
_BINS = tl.constexpr(BINS)
_MUL_SEED = tl.constexpr(0x9E3779B97F4A7C15)
_MUL_POSITION = tl.constexpr(0xD1B54A32D192ED03)
_MIX_1 = tl.constexpr(0xBF58476D1CE4E5B9)
_MIX_2 = tl.constexpr(0x94D049BB133111EB)


@triton.jit
def weight_of(x, best, temperature):
    """float32 exp((x - best) / temperature); exactly 1 for the best, also where the quotient overflows."""
    distance = tl.where(x == best, 0.0, tl.div_rn(x, temperature) - tl.div_rn(best, temperature))
    weight = tl.exp(distance)
    return tl.where(weight > 0.0, weight, 0.0)  # NaN becomes 0


@triton.jit
def as_integer(weight):
    """int64 units of 2^-44; scaling by a power of two is exact."""
    return (weight * _UNIT).to(tl.int64)


@triton.jit
def key_of(x):
    """int32 in the order of float32 x; 0 and -0 have one key."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def value_of(key):
    """The inverse of `key_of`."""
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def bin_of(x, best, per_logit):
    """int32 in [0, BINS), growing with the distance from the best: rounding is monotone, so order is kept."""
    distance = tl.where(x == best, 0.0, (best - x) * per_logit)
    return tl.where(distance < _BINS - 1.0, distance, _BINS - 1.0).to(tl.int32)  # NaN is far


@triton.jit
def bins_per_logit(best, lowest):
    """The bins reach over the row's finite logits, at most 63 below the best; the last takes the rest."""
    reach = tl.minimum(best - lowest, 63.0)
    return tl.div_rn(_BINS - 1.0, tl.maximum(reach, 1e-30))


@triton.jit
def uniform_bits(seed, position):
    """uint64 with 53 random bits: SplitMix64's finalizer (Steele et al. 2014) of int64 seed and position."""
    x = seed.to(tl.uint64) * _MUL_SEED + (position + 1).to(tl.uint64) * _MUL_POSITION
    x = (x ^ (x >> 30)) * _MIX_1
    x = (x ^ (x >> 27)) * _MIX_2
    return (x ^ (x >> 31)) >> 11
