// One unit: 16 rows x 256 columns of packed codes times up to 16 tokens of 16-bit activations, on the tensor
// cores. See kernels/cuda/packing.py for the order of the bytes.
//
// An activation code is 256 * high + low, both int8; they are two neighbouring columns of operand B, so that
// one mma.m16n8k32 covers four tokens. Integer sums are exact: a token's result is the same bits in any batch.
#pragma once

#include <cuda_fp16.h>

#include "program.h"

__device__ __forceinline__ void mma_u8s8(int (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <int kBits>
constexpr int kCodeBytes = kTileRows * kUnitColumns * kBits / 8;

// Operand A of the four mma of columns 128 * pair .. + 127.
template <int kBits>
__device__ __forceinline__ void load_codes(const uint8_t* unit, int pair, int lane, uint32_t (&a)[4][4]) {
  static_assert(kBits == 2 || kBits == 3 || kBits == 4 || kBits == 5 || kBits == 6 || kBits == 8);
  const uint4* vectors = reinterpret_cast<const uint4*>(unit);
  if constexpr (kBits == 8) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint4 v = vectors[(4 * pair + i) * 32 + lane];
      a[i][0] = v.x, a[i][1] = v.y, a[i][2] = v.z, a[i][3] = v.w;
    }
  } else if constexpr (kBits >= 4) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint4 v = vectors[(2 * pair + i) * 32 + lane];
      const uint32_t w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        a[2 * i + j / 2][2 * (j % 2)] = w[j] & 0x0f0f0f0f;
        a[2 * i + j / 2][2 * (j % 2) + 1] = (w[j] >> 4) & 0x0f0f0f0f;
      }
    }
  } else {
    const uint4 v = vectors[pair * 32 + lane];
    const uint32_t w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int r = 0; r < 4; ++r) a[i][r] = (w[i] >> (2 * r)) & 0x03030303;
  }
  constexpr int kLow = kBits == 8 ? 8 : kBits >= 4 ? 4 : 2;
  const uint8_t* high = unit + kCodeBytes<kLow>;
  if constexpr (kBits - kLow == 1) {
    const uint2 v = reinterpret_cast<const uint2*>(high)[2 * lane + pair];
    const uint32_t w[2] = {v.x, v.y};
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int from = 4 * (i % 2) + r;  // bit of each byte
        const uint32_t moved = from < kLow ? w[i / 2] << (kLow - from) : w[i / 2] >> (from - kLow);
        a[i][r] |= moved & (0x01010101u << kLow);
      }
  } else if constexpr (kBits - kLow == 2) {
    const uint4 v = reinterpret_cast<const uint4*>(high)[pair * 32 + lane];
    const uint32_t w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const uint32_t moved = 2 * r < kLow ? w[i] << (kLow - 2 * r) : w[i] >> (2 * r - kLow);
        a[i][r] |= moved & (0x03030303u << kLow);
      }
  }
}

// Quantized activations of one unit, in shared memory.
struct UnitActivations {
  const uint8_t* codes;  // [4 k64 tiles][2 * tokens][4][16]: lane's bytes of both mma of the tile
  const int32_t* sums;   // [4][tokens][2]: of every 32 columns
  const float* scales;   // [tokens]
};

// kGroup: columns that share parameters, 0 for the whole row. kAffine: float16 scale and offset a group, else
// uint8 scale and zero point (of one step in 2^(8 - kBits)).
template <int kBits_, int kGroup_, bool kAffine_>
struct UnitFormat {
  static constexpr int kBits = kBits_, kGroup = kGroup_;
  static constexpr bool kAffine = kAffine_;
  static_assert(kGroup == 0 || kGroup == 32 || kGroup == 64 || kGroup == 128);
  static_assert(!kAffine || kGroup == 32);
};

template <class F>
__device__ __forceinline__ void close_group(int (&c)[4], const uint8_t* params, int group, int sum, float (&u)[2]) {
  if constexpr (F::kAffine) {
    const uint2 v = reinterpret_cast<const uint2*>(params)[group];
    const float2 first = __half22float2(*reinterpret_cast<const __half2*>(&v.x));
    const float2 second = __half22float2(*reinterpret_cast<const __half2*>(&v.y));
    const float total = static_cast<float>(sum);
    u[0] += static_cast<float>(c[0] * 256 + c[1]) * first.x + total * first.y;
    u[1] += static_cast<float>(c[2] * 256 + c[3]) * second.x + total * second.y;
  } else {
    // All terms in steps of the zero point; they fit into 32 bits (packing.py has the arithmetic).
    constexpr int kLow = 1 << (8 - F::kBits), kHigh = 256 << (8 - F::kBits);
    if constexpr (F::kGroup == 0) {
      u[0] += static_cast<float>(c[0] * kHigh + c[1] * kLow - 128 * sum);
      u[1] += static_cast<float>(c[2] * kHigh + c[3] * kLow - 128 * sum);
    } else {
      const uint32_t v = reinterpret_cast<const uint32_t*>(params)[group];
      const int zero0 = (v >> 8) & 255, zero1 = v >> 24;
      u[0] += static_cast<float>(c[0] * kHigh + c[1] * kLow - zero0 * sum) * static_cast<float>(v & 255);
      u[1] += static_cast<float>(c[2] * kHigh + c[3] * kLow - zero1 * sum) * static_cast<float>((v >> 16) & 255);
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) c[i] = 0;
}

// acc[j][r] += unit * activations, for row lane / 4 + 8 r and token 4 j + lane % 4. Nothing is said of tokens
// beyond `num_tokens`.
template <class F, int kMma>
__device__ __forceinline__ void unit_dot(const uint8_t* unit, const UnitActivations& x, int num_tokens, int lane,
                                         float (&acc)[kMma][2]) {
  constexpr int kGroup = F::kGroup, kNumGroups = kGroup == 0 ? 0 : kUnitColumns / kGroup;
  const int row = lane / 4, column = lane % 4;
  const uint8_t* params = unit + kCodeBytes<F::kBits> + row * kNumGroups * (F::kAffine ? 8 : 4);
  int c[kMma][4] = {};
  float u[kMma][2] = {};
  int sum[kMma] = {};
#pragma unroll
  for (int pair = 0; pair < 2; ++pair) {
    uint32_t a[4][4];
    load_codes<F::kBits>(unit, pair, lane, a);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int tile = 2 * pair + half;
#pragma unroll
      for (int j = 0; j < kMma; ++j) {
        const int n = 8 * j + row;
        uint4 b = make_uint4(0, 0, 0, 0);
        if (n < 2 * num_tokens)
          b = *reinterpret_cast<const uint4*>(x.codes + ((tile * 2 * num_tokens + n) * 4 + column) * 16);
        const int token = min(4 * j + column, num_tokens - 1);
        const int2 sums = *reinterpret_cast<const int2*>(x.sums + (tile * num_tokens + token) * 2);
        mma_u8s8(c[j], a[2 * half], b.x, b.y);
        if constexpr (kGroup == 32) close_group<F>(c[j], params, 2 * tile, sums.x, u[j]);
        mma_u8s8(c[j], a[2 * half + 1], b.z, b.w);
        if constexpr (kGroup == 32) {
          close_group<F>(c[j], params, 2 * tile + 1, sums.y, u[j]);
        } else {
          sum[j] += sums.x + sums.y;
          const bool closes = kGroup == 64 || (kGroup == 128 && half == 1) || tile == 3;
          if (closes) {
            close_group<F>(c[j], params, kGroup == 64 ? tile : pair, sum[j], u[j]);
            sum[j] = 0;
          }
        }
      }
    }
  }
#pragma unroll
  for (int j = 0; j < kMma; ++j) {
    const float scale = x.scales[min(4 * j + column, num_tokens - 1)];
    acc[j][0] += u[j][0] * scale;
    acc[j][1] += u[j][1] * scale;
  }
}

// Formats by number; kernels/cuda/packing.py counts the same way.
template <int kMma>
__device__ __forceinline__ void unit_dot(int format, const uint8_t* unit, const UnitActivations& x, int num_tokens,
                                         int lane, float (&acc)[kMma][2]) {
  switch (format) {
    case 0: return unit_dot<UnitFormat<2, 32, false>>(unit, x, num_tokens, lane, acc);
    case 1: return unit_dot<UnitFormat<2, 64, false>>(unit, x, num_tokens, lane, acc);
    case 2: return unit_dot<UnitFormat<3, 64, false>>(unit, x, num_tokens, lane, acc);
    case 3: return unit_dot<UnitFormat<3, 128, false>>(unit, x, num_tokens, lane, acc);
    case 4: return unit_dot<UnitFormat<4, 64, false>>(unit, x, num_tokens, lane, acc);
    case 5: return unit_dot<UnitFormat<4, 128, false>>(unit, x, num_tokens, lane, acc);
    case 6: return unit_dot<UnitFormat<5, 128, false>>(unit, x, num_tokens, lane, acc);
    case 7: return unit_dot<UnitFormat<6, 128, false>>(unit, x, num_tokens, lane, acc);
    case 8: return unit_dot<UnitFormat<8, 0, false>>(unit, x, num_tokens, lane, acc);
    case 9: return unit_dot<UnitFormat<4, 32, true>>(unit, x, num_tokens, lane, acc);
    case 10: return unit_dot<UnitFormat<5, 32, true>>(unit, x, num_tokens, lane, acc);
    case 11: return unit_dot<UnitFormat<8, 32, true>>(unit, x, num_tokens, lane, acc);
    default: __trap();
  }
}
