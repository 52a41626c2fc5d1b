// Eight columns of a key or value in the cache's e4m3 form: codes of its head, scaled by a power of two
// (kernels/kv_cache.py is the specification).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "async.cuh"

struct Codes8 {
  uint2 codes;
  uint32_t exponent;  // value = code * 2^(exponent - 127)
};

// 2^(exponent - 127), zero of 0.
__device__ __forceinline__ float power(uint32_t exponent) { return __uint_as_float(exponent << 23); }

// first in the lower half.
__device__ __forceinline__ uint32_t two_codes(float first, float second) {
  uint16_t two;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(two) : "f"(second), "f"(first));
  return two;
}

// kLanes lanes hold a head. 448 = 1.75 * 2^8 is the largest code: where the mantissa is above 1.75, the addition
// carries into the exponent.
template <int kLanes>
__device__ __forceinline__ Codes8 to_codes(const Floats8& x) {
  float largest = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) largest = fmaxf(largest, fabsf(x.v[i]));
  largest = lanes_max<kLanes / 2>(largest);
  const int exponent = max(static_cast<int>((__float_as_uint(largest) + 0x1fffffu) >> 23) - 8, 1);
  const float inverse = power(254 - exponent);
  uint32_t two[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) two[i] = two_codes(x.v[2 * i] * inverse, x.v[2 * i + 1] * inverse);
  return {make_uint2(two[0] | two[1] << 16, two[2] | two[3] << 16), static_cast<uint32_t>(exponent)};
}

// Two codes as bfloat16; every code is exact in float16 and in bfloat16.
__device__ __forceinline__ uint32_t from_two_codes(uint32_t two) {
  uint32_t halves;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(static_cast<uint16_t>(two)));
  const float2 floats = __half22float2(*reinterpret_cast<const __half2*>(&halves));
  const __nv_bfloat162 result = __floats2bfloat162_rn(floats.x, floats.y);
  return *reinterpret_cast<const uint32_t*>(&result);
}

__device__ __forceinline__ uint4 from_codes(const uint2& codes) {
  return make_uint4(from_two_codes(codes.x), from_two_codes(codes.x >> 16), from_two_codes(codes.y),
                    from_two_codes(codes.y >> 16));
}
