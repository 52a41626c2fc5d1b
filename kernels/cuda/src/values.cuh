// What packed codes stand for: parts of a fused matrix, and a code's value as one multiply-add.
//
// A code c, moved to the high bits of its byte, becomes the float 2^15 + c by its bits. With offset = -scale *
// (2^15 + zero), fma(2^15 + c, scale, offset) is scale * (c - zero), exactly where `scale` is a byte times a power of two.
#pragma once

#include <cuda_fp8.h>

#include "units.cuh"

// Up to three matrices of one format and K, one below the other in the dense matrix.
struct Pieces {
  Segment segments[3];
  int32_t first_rows[3];  // of the dense matrix
  int32_t count;
};

constexpr int log2_of(int v) { return v <= 1 ? 0 : 1 + log2_of(v / 2); }

template <class F>
constexpr int kParameterWords = F::kSigned ? 1 : F::kNumGroups * (F::kAffine ? 2 : 1);  // of both rows of a lane

struct Line {
  float scale, offset;
};

// Of the codes of row lane / 4 + 8 r8 in a group. A value is W * factor / row_factor.
template <class F>
__device__ __forceinline__ Line line_of(const uint32_t (&params)[kParameterWords<F>], int group, int r8, float factor) {
  constexpr float kRaised = 32768.0f;
  if constexpr (F::kAffine) {
    const float2 v = __half22float2(reinterpret_cast<const __half2*>(params)[2 * group + r8]);
    const float scale = factor * v.x * (1.0f / (1 << (8 - F::kBits)));
    return {scale, fmaf(factor, v.y, -kRaised * scale)};
  } else if constexpr (F::kSigned) {
    return {factor, -factor * (kRaised + 128)};
  } else {
    const float scale = factor * byte_to_float(params[group], 2 * r8);
    return {scale, -scale * (kRaised + byte_to_float(params[group], 2 * r8 + 1))};
  }
}

// Values of four columns: `word` is a register of `load_codes`.
template <class F>
__device__ __forceinline__ float4 values_of(uint32_t word, int r8, Line line) {
  const int up = 8 - F::kBits - (r8 == 0 ? 0 : log2_of(kSecondRowFactor<F::kBits>));
  word = (word << up) ^ (F::kSigned ? 0x80808080u : 0u);
  float v[4];
#pragma unroll
  for (int j = 0; j < 4; ++j)
    v[j] = fmaf(__uint_as_float(__byte_perm(word, 0x47000000u, 0x7404 | j << 4)), line.scale, line.offset);
  return make_float4(v[0], v[1], v[2], v[3]);
}

__device__ __forceinline__ uint32_t to_e4m3(float4 v) {
  const uint32_t low = __nv_cvt_float2_to_fp8x2(make_float2(v.x, v.y), __NV_SATFINITE, __NV_E4M3);
  return low | static_cast<uint32_t>(__nv_cvt_float2_to_fp8x2(make_float2(v.z, v.w), __NV_SATFINITE, __NV_E4M3)) << 16;
}
