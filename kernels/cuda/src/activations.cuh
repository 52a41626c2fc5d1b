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

// The mark of a token's row. odd_launches: Step's arrivals[2].
__device__ __forceinline__ uint32_t mark_of(Marks marks, uint32_t odd_launches, int token) {
  return marks == 0 ? kUnmarked : (marks ^ (marks >> 1 & odd_launches >> token)) & 1;
}

// A lane's eight columns of some (unit, token) pairs: their loads, reductions and conversions are under way together.
template <int kBatch>
struct Batch {
  Floats8 value[kBatch];
  int unit[kBatch], token[kBatch];  // unit < 0: there is none
};

// Codes, sums and scale of each pair. Columns 8 lane .. + 7 are tile lane / 8, its mma (lane / 4) % 2, the bytes of a lane
// with lane % 4.
template <int kBatch>
__device__ __forceinline__ void quantize_batch(const Batch<kBatch>& batch, int tokens, int lane, const Activations& x) {
  const int tile = lane / 8, half = (lane / 4) % 2, column = lane % 4;
  float largest[kBatch];
  int sum[kBatch];
#pragma unroll
  for (int i = 0; i < kBatch; ++i) {
    const float* v = batch.value[i].v;
    float m[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) m[e] = fmaxf(fabsf(v[e]), fabsf(v[e + 4]));
    largest[i] = fmaxf(fmaxf(m[0], m[1]), fmaxf(m[2], m[3]));
  }
#pragma unroll
  for (int i = 0; i < kBatch; ++i)  // not negative: ordered as its bits
    largest[i] = __uint_as_float(__reduce_max_sync(~0u, __float_as_uint(largest[i])));
#pragma unroll
  for (int i = 0; i < kBatch; ++i) {
    // A little short, so that no quotient exceeds kCodeMax. Rounding by adding kMagic (units.cuh), and 128 more: byte 1
    // is then the high part, byte 0 the low part with its sign turned.
    const float inverse = largest[i] > 0 ? __fdividef(kCodeMax - 1, largest[i]) : 0.0f;
    uint32_t bits[8], high[2], low[2];
#pragma unroll
    for (int e = 0; e < 8; ++e) bits[e] = __float_as_uint(fmaf(batch.value[i].v[e], inverse, kMagic + 128));
    sum[i] = 0;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint32_t first = __byte_perm(bits[4 * h], bits[4 * h + 1], 0x5140);  // low, low, high, high
      const uint32_t second = __byte_perm(bits[4 * h + 2], bits[4 * h + 3], 0x5140);
      low[h] = __byte_perm(first, second, 0x5410) ^ 0x80808080u;
      high[h] = __byte_perm(first, second, 0x7632);
      sum[i] += __dp4a(static_cast<int>(high[h]), 0x01010101, 0) * 256 + __dp4a(static_cast<int>(low[h]), 0x01010101, 0);
    }
    if (batch.unit[i] >= 0) {
      const int unit = batch.unit[i], token = batch.token[i];
      uint8_t* to = x.codes + (((unit * 4 + tile) * 2 * tokens + 2 * token) * 4 + column) * 16 + half * 8;
      *reinterpret_cast<uint2*>(to) = make_uint2(high[0], high[1]);
      *reinterpret_cast<uint2*>(to + 64) = make_uint2(low[0], low[1]);
      if (lane == 0) x.scales[unit * tokens + token] = largest[i] * (1.0f / (kCodeMax - 1));
    }
  }
#pragma unroll
  for (int i = 0; i < kBatch; ++i) sum[i] += __shfl_xor_sync(~0u, sum[i], 1);
#pragma unroll
  for (int i = 0; i < kBatch; ++i) {
    sum[i] += __shfl_xor_sync(~0u, sum[i], 2);
    if (column == 0 && batch.unit[i] >= 0)
      x.sums[(batch.unit[i] * tokens + batch.token[i]) * 8 + 2 * tile + half] = static_cast<float>(sum[i]);
  }
}

// Every `stride`-th pair of a unit and a token.
struct Pairs {
  int stride, units, tokens, index, unit, token;

  __device__ __forceinline__ Pairs(int first, int stride, int units, int tokens)
      : stride(stride), units(units), tokens(tokens), index(first) {
    split();
  }
  __device__ __forceinline__ bool is_there() const { return unit < units; }
  __device__ __forceinline__ void next() {
    index += stride;
    split();
  }
  __device__ __forceinline__ void split() {
    if (tokens <= 2) unit = index >> (tokens - 1), token = index & (tokens - 1);
    else unit = index / tokens, token = index % tokens;
  }
};

// Quantizes a warp's pairs, kBatch at a time. kNorm: adds delta to the stream, writes the result on where
// `keeps(unit, token)` says so, notes the squares, multiplies by the norm.
template <int kBatch, bool kNorm, class Scale, class Keeps>
__device__ __forceinline__ void quantize_pairs(const MatmulPhase& phase, Pairs pairs, const Activations& x,
                                               uint32_t odd_launches, Scale delta_scale, float* squares, int lane,
                                               Keeps keeps) {
  const Marks x_marks = phase.x_marks, delta_marks = phase.delta_marks;
  const int row_size = phase.units * kUnitColumns, tokens = pairs.tokens;
  while (pairs.is_there()) {
    Batch<kBatch> batch;
    Floats8 delta[kBatch], norm[kBatch];
    int place[kBatch];
    bool is_there[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i, pairs.next()) {
      const int column = pairs.unit * kUnitColumns + 8 * lane;
      batch.unit[i] = pairs.is_there() ? pairs.unit : -1, batch.token[i] = pairs.token;
      place[i] = pairs.token * row_size + pairs.unit * kUnitColumns + 4 * lane;
      is_there[i] = pairs.is_there() && column < phase.k;
      batch.value[i] = delta[i] = norm[i] = Floats8{};
      if (!is_there[i]) continue;
      batch.value[i] = x_marks == 0 ? load8(phase.x + static_cast<int64_t>(pairs.token) * phase.k + column)
                                    : load_marked8(phase.x + place[i]);
      if constexpr (kNorm) {
        if (delta_marks != 0) delta[i] = load_marked8(phase.delta + place[i]);
        norm[i] = load8(phase.norm + column);
      }
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i)
      if (is_there[i])
        batch.value[i] = settle(batch.value[i], phase.x + place[i], mark_of(x_marks, odd_launches, batch.token[i]));
    if constexpr (kNorm) {
      float square[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i)
        if (is_there[i] && delta_marks != 0)
          delta[i] = settle(delta[i], phase.delta + place[i], mark_of(delta_marks, odd_launches, batch.token[i]));
      if (phase.delta_norm != nullptr) {
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          const float scale = delta_scale(batch.token[i]);
          if (!is_there[i]) continue;
          const Floats8 weight = load8(phase.delta_norm + batch.unit[i] * kUnitColumns + 8 * lane);
#pragma unroll
          for (int e = 0; e < 8; ++e) delta[i].v[e] *= scale * weight.v[e];
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
        if (phase.stream != nullptr && is_there[i] && keeps(batch.unit[i], batch.token[i]))
          store_marked8(phase.stream + place[i], v, mark_of(phase.stream_marks, odd_launches, batch.token[i]));
#pragma unroll
        for (int e = 0; e < 8; ++e) v.v[e] *= norm[i].v[e];
      }
#pragma unroll
      for (int step = 16; step > 0; step >>= 1)
#pragma unroll
        for (int i = 0; i < kBatch; ++i) square[i] += __shfl_xor_sync(~0u, square[i], step);
#pragma unroll
      for (int i = 0; i < kBatch; ++i)
        if (lane == 0 && batch.unit[i] >= 0) squares[batch.unit[i] * tokens + batch.token[i]] = square[i];
    }
    quantize_batch<kBatch>(batch, tokens, lane, x);
  }
}

// 1 / RMS of a token's delta, by one warp.
__device__ __forceinline__ float measure_delta(const MatmulPhase& phase, int token, uint32_t odd_launches, int lane) {
  float square = 0;
  for (int column = 8 * lane; column < phase.k; column += kUnitColumns) {
    const Floats8 v = read_marked8(phase.delta + token * phase.units * kUnitColumns + place_of(column),
                                   mark_of(phase.delta_marks, odd_launches, token));
#pragma unroll
    for (int e = 0; e < 8; ++e) square += v.v[e] * v.v[e];
  }
  return rsqrtf(lanes_sum(square) / phase.k + phase.eps);
}

// 1 / RMS of a token's stream from its units' squares [units][tokens], by one warp; the order is always the same.
// kShared: they lie in shared memory; else another block wrote them in this launch.
template <bool kShared>
__device__ __forceinline__ float norm_scale(const MatmulPhase& phase, const float* squares, int token, int tokens,
                                            int lane) {
  float square = 0;
  for (int unit = lane; unit < phase.units; unit += 32) {
    const float* p = squares + unit * tokens + token;
    square += kShared ? *p : __ldcg(p);
  }
  return rsqrtf(lanes_sum(square) / phase.k + phase.eps);
}
