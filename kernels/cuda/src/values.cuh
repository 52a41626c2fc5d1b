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

// The same in float16, two columns at a time: codes become 1024 + c by their bits.
__device__ __forceinline__ __half2 as_half2(uint32_t bits) { return *reinterpret_cast<const __half2*>(&bits); }
__device__ __forceinline__ uint32_t bits_of(__half2 v) { return *reinterpret_cast<const uint32_t*>(&v); }

// Of the codes of a row in a group: values are (c - first) * scale, for affine formats and the first row of 4 bits + offset.
struct HalfLine {
  __half2 first, scale, offset;
};

// A byte of `word` + 1024, twice.
__device__ __forceinline__ __half2 raised_byte(uint32_t word, int byte) {
  return as_half2(__byte_perm(word, 0x64u, 0x4040 | byte << 8 | byte));
}

// Rows lane / 4 (r8 = 0) and lane / 4 + 8. `inverse_unit`, a power of two, counts for affine formats alone. Values of a
// zero point are below 2^16, and exact but for rounding to 11 bits, at the end and (4 bits, first row) in the offset.
template <class F>
__device__ __forceinline__ HalfLine half_line_of(const uint32_t (&params)[kParameterWords<F>], int group, int r8,
                                                 __half2 inverse_unit) {
  const __half2 base = __float2half2_rn(1024.0f);
  if constexpr (F::kAffine) {
    const __half2 v = as_half2(params[2 * group + r8]);
    const __half2 step = __float2half2_rn(1.0f / (1 << (8 - F::kBits)));
    return {base, __hmul2(__hmul2(__low2half2(v), inverse_unit), step), __hmul2(__high2half2(v), inverse_unit)};
  } else if constexpr (F::kSigned) {
    return {__float2half2_rn(1024.0f + 128.0f), base, base};
  } else {
    const __half2 scale = __hsub2(raised_byte(params[group], 2 * r8), base), zero = raised_byte(params[group], 2 * r8 + 1);
    if constexpr (F::kBits != 4) {
      return {zero, scale, base};
    } else {  // codes of the second row are sixteen times as large, those of the first row are not moved up to be so
      if (r8 == 1) return {zero, scale, base};
      return {base, __hmul2(scale, __float2half2_rn(16.0f)), __hmul2(__hneg2(scale), __hsub2(zero, base))};
    }
  }
}

// (v & mask) | bits in one instruction: the compiler makes two of two constants.
__device__ __forceinline__ uint32_t masked_or(uint32_t v, uint32_t mask, uint32_t bits) {
  uint32_t out;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(out) : "r"(v), "r"(mask), "r"(bits));
  return out;
}

// Values of columns (0, 2) and (1, 3) of both rows: words [r8] are registers of `load_codes` (of 4 bits, with kRaw, the
// first one alone is read).
template <class F>
__device__ __forceinline__ void halves_of(uint32_t first, uint32_t second, const HalfLine (&lines)[2], uint32_t (&out)[2][2]) {
  const uint32_t words[2] = {first, second};
#pragma unroll
  for (int r8 = 0; r8 < 2; ++r8) {
    const HalfLine& line = lines[r8];
    __half2 v[2];
    if constexpr (F::kBits == 4 && !F::kAffine) {
      const uint32_t mask = r8 == 0 ? 0x000f000fu : 0x00f000f0u;
      v[0] = as_half2(masked_or(first, mask, 0x64006400u)), v[1] = as_half2(masked_or(first >> 8, mask, 0x64006400u));
    } else {
      const int up = 8 - F::kBits - (r8 == 0 ? 0 : log2_of(kSecondRowFactor<F::kBits>));
      const uint32_t word = (words[r8] << up) ^ (F::kSigned ? 0x80808080u : 0u);
      v[0] = as_half2(__byte_perm(word, 0x64u, 0x4240)), v[1] = as_half2(__byte_perm(word, 0x64u, 0x4341));
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      v[i] = __hsub2(v[i], line.first);
      if (F::kAffine || (F::kBits == 4 && r8 == 0)) v[i] = __hfma2(v[i], line.scale, line.offset);
      else if (!F::kSigned) v[i] = __hmul2(v[i], line.scale);
      out[r8][i] = bits_of(v[i]);
    }
  }
}
