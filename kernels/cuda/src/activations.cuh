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

// Codes, sums and scale of one unit of one token. Columns 8 lane .. + 7 are tile lane / 8, its mma (lane / 4) % 2, the
// bytes of a lane with lane % 4.
__device__ __forceinline__ void quantize_unit(const Floats8& value, int unit, int token, int tokens, int lane,
                                              const Activations& x) {
  float largest = 0;
#pragma unroll
  for (int e = 0; e < 8; ++e) largest = fmaxf(largest, fabsf(value.v[e]));
  largest = __uint_as_float(__reduce_max_sync(~0u, __float_as_uint(largest)));  // not negative: ordered as its bits
  // A little short, so that no quotient exceeds kCodeMax. Rounding by adding kMagic (units.cuh), and 128 more: byte 1
  // is then the high part, byte 0 the low part with its sign turned.
  const float inverse = largest > 0 ? __fdividef(kCodeMax - 1, largest) : 0.0f;
  uint32_t bits[8], high[2], low[2];
  int sum = 0;
#pragma unroll
  for (int e = 0; e < 8; ++e) bits[e] = __float_as_uint(fmaf(value.v[e], inverse, kMagic + 128));
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const uint32_t first = __byte_perm(bits[4 * h], bits[4 * h + 1], 0x5140);  // low, low, high, high
    const uint32_t second = __byte_perm(bits[4 * h + 2], bits[4 * h + 3], 0x5140);
    low[h] = __byte_perm(first, second, 0x5410) ^ 0x80808080u;
    high[h] = __byte_perm(first, second, 0x7632);
    sum += __dp4a(static_cast<int>(high[h]), 0x01010101, 0) * 256 + __dp4a(static_cast<int>(low[h]), 0x01010101, 0);
  }
  const int tile = lane / 8, half = (lane / 4) % 2, column = lane % 4;
  uint8_t* to = x.codes + (((unit * 4 + tile) * 2 * tokens + 2 * token) * 4 + column) * 16 + half * 8;
  *reinterpret_cast<uint2*>(to) = make_uint2(high[0], high[1]);
  *reinterpret_cast<uint2*>(to + 64) = make_uint2(low[0], low[1]);
  sum += __shfl_xor_sync(~0u, sum, 1);
  sum += __shfl_xor_sync(~0u, sum, 2);
  if (column == 0) x.sums[(unit * tokens + token) * 8 + 2 * tile + half] = static_cast<float>(sum);
  if (lane == 0) x.scales[unit * tokens + token] = largest * (1.0f / (kCodeMax - 1));
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

// What a lane needs for a pair.
struct Entry {
  Floats8 x, delta, norm;
};

// Quantizes a warp's pairs. kNorm: adds delta to the stream, writes the result on where `keeps(unit, token)` says so,
// notes the squares, multiplies by the norm. Rolled up, since the code is cold each time: fetching instructions would
// take longer than it saves; the loads of the next pairs are under way meanwhile.
template <bool kNorm, class Scale, class Keeps>
__device__ __forceinline__ void quantize_pairs(const MatmulPhase& phase, Pairs pairs, const Activations& x,
                                               uint32_t odd_launches, Scale delta_scale, float* squares, int lane,
                                               Keeps keeps) {
  const Marks x_marks = phase.x_marks, delta_marks = phase.delta_marks;
  const int row_size = phase.units * kUnitColumns;
  const auto column = [&](const Pairs& p) { return p.unit * kUnitColumns + 8 * lane; };
  const auto place = [&](const Pairs& p) { return p.token * row_size + p.unit * kUnitColumns + 4 * lane; };
  const auto is_there = [&](const Pairs& p) { return p.is_there() && column(p) < phase.k; };
  Pairs ahead = pairs;
  const auto begin = [&] {
    Entry e{};
    if (is_there(ahead)) {
      e.x = x_marks == 0 ? load8(phase.x + static_cast<int64_t>(ahead.token) * phase.k + column(ahead))
                         : load_marked8(phase.x + place(ahead));
      if constexpr (kNorm) {
        if (delta_marks != 0) e.delta = load_marked8(phase.delta + place(ahead));
        e.norm = load8(phase.norm + column(ahead));
      }
    }
    ahead.next();
    return e;
  };
  // Not an array, which would lie in memory.
  Entry first = begin(), second = begin(), third{}, fourth{};
  if constexpr (!kNorm) third = begin(), fourth = begin();
#pragma unroll 1
  for (; pairs.is_there(); pairs.next()) {
    const Entry now = first;
    first = second;
    if constexpr (kNorm) second = begin();
    else second = third, third = fourth, fourth = begin();
    Floats8 v{};
    float scale = 1.0f;
    if constexpr (kNorm) {
      if (phase.delta_norm != nullptr) scale = delta_scale(pairs.token);
    }
    if (is_there(pairs)) {
      v = settle(now.x, phase.x + place(pairs), mark_of(x_marks, odd_launches, pairs.token));
      if constexpr (kNorm) {
        if (delta_marks != 0) {
          Floats8 d = settle(now.delta, phase.delta + place(pairs), mark_of(delta_marks, odd_launches, pairs.token));
          if (phase.delta_norm != nullptr) {
            const Floats8 weight = load8(phase.delta_norm + column(pairs));
#pragma unroll
            for (int e = 0; e < 8; ++e) d.v[e] *= scale * weight.v[e];
          }
#pragma unroll
          for (int e = 0; e < 8; ++e) v.v[e] += d.v[e];
        }
        if (phase.stream != nullptr && keeps(pairs.unit, pairs.token))
          store_marked8(phase.stream + place(pairs), v, mark_of(phase.stream_marks, odd_launches, pairs.token));
      }
    }
    if constexpr (kNorm) {
      float square = 0;
#pragma unroll
      for (int e = 0; e < 8; ++e) square += v.v[e] * v.v[e];
      square = lanes_sum(square);
      if (lane == 0) squares[pairs.unit * pairs.tokens + pairs.token] = square;
#pragma unroll
      for (int e = 0; e < 8; ++e) v.v[e] *= now.norm.v[e];  // zero where there is nothing
    }
    quantize_unit(v, pairs.unit, pairs.token, pairs.tokens, lane, x);
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
