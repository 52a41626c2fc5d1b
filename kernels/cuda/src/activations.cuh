// From float32 activations to 16-bit codes, one scale for every 256 columns of a token.
#pragma once

#include "async.cuh"
#include "program.h"
#include "units.cuh"

constexpr float kCodeMax = 32512.0f;  // 127 * 256: the high byte stays within int8

// Codes, sums of codes and scales of `units` units of `tokens` tokens, in shared or global memory.
struct Activations {
  uint8_t* codes;   // [units][4 k64 tiles][2 * tokens][4][16], see UnitActivations
  float* sums;      // [units][tokens][8]: of every 32 columns
  float* scales;    // [units][tokens]

  __device__ Activations(uint8_t* at, int units, int tokens)
      : codes(at),
        sums(reinterpret_cast<float*>(at + units * tokens * 512)),
        scales(reinterpret_cast<float*>(at + units * tokens * 544)) {}
};

// Selector of __byte_perm: byte `from` of its two operands into byte `at` of the first one.
constexpr __host__ __device__ int byte_into(int at, int from) {
  return (0x3210 & ~(0xf << (4 * at))) | from << (4 * at);
}

// (unit, token) pairs of one warp: their loads are in flight together, and so are the reductions.
template <int kBatch>
struct Batch {
  Floats8 value[kBatch];
  int unit[kBatch], token[kBatch];
  bool is_there[kBatch];
};

template <int kBatch>
__device__ __forceinline__ void quantize_batch(const Batch<kBatch>& batch, int tokens, int lane, const Activations& x) {
  float largest[kBatch];
  int sum[kBatch];
#pragma unroll
  for (int i = 0; i < kBatch; ++i) {
    largest[i] = 0;
#pragma unroll
    for (int e = 0; e < 8; ++e) largest[i] = fmaxf(largest[i], fabsf(batch.value[i].v[e]));
  }
#pragma unroll
  for (int step = 16; step > 0; step >>= 1)
#pragma unroll
    for (int i = 0; i < kBatch; ++i) largest[i] = fmaxf(largest[i], __shfl_xor_sync(~0u, largest[i], step));
  // Columns 8 lane .. + 7: tile lane / 8, its mma (lane / 4) % 2, the bytes of a lane with lane % 4.
  const int tile = lane / 8, half = (lane / 4) % 2, column = lane % 4;
#pragma unroll
  for (int i = 0; i < kBatch; ++i) {
    // A little short, so that no quotient exceeds kCodeMax. Rounding by adding kMagic, see units.cuh.
    const float inverse = largest[i] > 0 ? __fdividef(kCodeMax - 1, largest[i]) : 0.0f;
    uint32_t high[2] = {}, low[2] = {};
    sum[i] = 0;
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const int q = __float_as_int(fmaf(batch.value[i].v[e], inverse, kMagic)) - kMagicBits;
      sum[i] += q;
      high[e / 4] = __byte_perm(high[e / 4], q + 128, byte_into(e % 4, 5));
      low[e / 4] = __byte_perm(low[e / 4], q, byte_into(e % 4, 4));
    }
    if (batch.is_there[i]) {
      uint8_t* to = x.codes + (((batch.unit[i] * 4 + tile) * 2 * tokens + 2 * batch.token[i]) * 4 + column) * 16 + half * 8;
      *reinterpret_cast<uint2*>(to) = make_uint2(high[0], high[1]);
      *reinterpret_cast<uint2*>(to + 64) = make_uint2(low[0], low[1]);
      if (lane == 0) x.scales[batch.unit[i] * tokens + batch.token[i]] = largest[i] * (1.0f / (kCodeMax - 1));
    }
  }
#pragma unroll
  for (int i = 0; i < kBatch; ++i) sum[i] += __shfl_xor_sync(~0u, sum[i], 1);
#pragma unroll
  for (int i = 0; i < kBatch; ++i) {
    sum[i] += __shfl_xor_sync(~0u, sum[i], 2);
    if (column == 0 && batch.is_there[i])
      x.sums[(batch.unit[i] * tokens + batch.token[i]) * 8 + 2 * tile + half] = static_cast<float>(sum[i]);
  }
}

// Adds delta to the stream, writes the result on where `keeps` says so, notes the squares, multiplies by the norm.
template <int kBatch, class Scale, class Keeps>
__device__ __forceinline__ void enter_norm(const MatmulPhase& phase, int tokens, Scale delta_scale, float* squares,
                                           int lane, Batch<kBatch>& batch, Keeps keeps) {
  Floats8 delta[kBatch], norm[kBatch];
  float square[kBatch];
#pragma unroll
  for (int i = 0; i < kBatch; ++i) {
    const int column = batch.unit[i] * kUnitColumns + 8 * lane;
    const bool is_there = batch.is_there[i] && column < phase.k;
    delta[i] = norm[i] = Floats8{};
    if (is_there) norm[i] = load8(phase.norm + column);
    if (is_there && phase.delta != nullptr)
      delta[i] = load8(phase.delta + static_cast<int64_t>(batch.token[i]) * phase.k + column);
  }
  if (phase.delta_norm != nullptr) {
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int column = batch.unit[i] * kUnitColumns + 8 * lane;
      if (batch.is_there[i] && column < phase.k) {
        const Floats8 weight = load8(phase.delta_norm + column);
#pragma unroll
        for (int e = 0; e < 8; ++e) delta[i].v[e] *= delta_scale(batch.token[i]) * weight.v[e];
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kBatch; ++i) {
    Floats8& v = batch.value[i];
    square[i] = 0;
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      v.v[e] += delta[i].v[e];
      square[i] += v.v[e] * v.v[e];
    }
    const int column = batch.unit[i] * kUnitColumns + 8 * lane;
    if (phase.stream != nullptr && batch.is_there[i] && column < phase.k && keeps(batch.unit[i], batch.token[i]))
      store8(phase.stream + static_cast<int64_t>(batch.token[i]) * phase.k + column, v);
#pragma unroll
    for (int e = 0; e < 8; ++e) v.v[e] *= norm[i].v[e];
  }
#pragma unroll
  for (int step = 16; step > 0; step >>= 1)
#pragma unroll
    for (int i = 0; i < kBatch; ++i) square[i] += __shfl_xor_sync(~0u, square[i], step);
  if (lane == 0) {
#pragma unroll
    for (int i = 0; i < kBatch; ++i)
      if (batch.is_there[i]) squares[batch.unit[i] * tokens + batch.token[i]] = square[i];
  }
}

// Pairs of a warp from `unit` on, `stride` units apart.
template <int kBatch, bool kWithNorm, class Scale, class Keeps>
__device__ __forceinline__ void quantize_units(const MatmulPhase& phase, int tokens, int unit, int stride,
                                               const Activations& x, Scale delta_scale, float* squares, int lane,
                                               Keeps keeps) {
  int token = 0;
  while (unit < phase.units) {
    Batch<kBatch> batch;
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      batch.unit[i] = unit, batch.token[i] = token, batch.is_there[i] = unit < phase.units;
      const int column = unit * kUnitColumns + 8 * lane;
      batch.value[i] = Floats8{};
      if (unit < phase.units && column < phase.k)
        batch.value[i] = load8(phase.x + static_cast<int64_t>(token) * phase.k + column);
      if (++token == tokens) token = 0, unit += stride;
    }
    if constexpr (kWithNorm) enter_norm<kBatch>(phase, tokens, delta_scale, squares, lane, batch, keeps);
    quantize_batch<kBatch>(batch, tokens, lane, x);
  }
}

// 1 / RMS of a token's delta, by one warp.
__device__ __forceinline__ float measure_delta(const MatmulPhase& phase, int token, int lane) {
  float square = 0;
  for (int column = 8 * lane; column < phase.k; column += 256) {
    const Floats8 v = load8(phase.delta + static_cast<int64_t>(token) * phase.k + column);
#pragma unroll
    for (int e = 0; e < 8; ++e) square += v.v[e] * v.v[e];
  }
  return rsqrtf(lanes_sum(square) / phase.k + phase.eps);
}

// 1 / RMS of a token's stream from its units' squares [units][tokens], by one warp; the order is always the same.
__device__ __forceinline__ float norm_scale(const MatmulPhase& phase, const float* squares, int token, int tokens,
                                            int lane) {
  float square = 0;
  for (int unit = lane; unit < phase.units; unit += 32) square += squares[unit * tokens + token];  // shared, or written in this launch and not read before
  return rsqrtf(lanes_sum(square) / phase.k + phase.eps);
}
