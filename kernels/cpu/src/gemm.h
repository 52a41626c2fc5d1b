// Packed weights (kernels/formats.py) times activations rounded to 16 bits per token and group of 32.
//
// A 16-bit code is 256 * high + low, both int8, so that two byte dot products give the exact integer dot.
// Plain int8 activations cost SmolLM2 (Q4_1) a KL divergence of 3.5e-3 per token, and greedy decoding then
// leaves the float32 model's path; 16 bits cost 1e-7. Decoding waits for memory either way.
//
// A token's result is the same bits whatever tokens are beside it: its integer dots are exact, and its
// float sum runs over the groups in one order.
#pragma once

#include <algorithm>
#include <vector>

#include "simd.h"
#include "threads.h"

constexpr int kGroup = 32;
constexpr int kTileRows = 16;

struct Matrix {  // a PackedWeight; mirrored in kernels/cpu/__init__.py
  const uint8_t* data;
  int32_t n, k, bits;
};

// Activations of m tokens: codes [m, 2, k] int8 (high bytes, then low bytes of a row), and for each group
// its scale and scale * sum of codes.
struct QuantizedRows {
  std::vector<int8_t> codes;
  std::vector<float> scale, scaled_sum;
  int k = 0, groups = 0;

  void resize(int64_t m, int k_) {
    k = k_;
    groups = k_ / kGroup;
    if (codes.size() < static_cast<size_t>(2 * m * k)) codes.resize(2 * m * k);
    if (scale.size() < static_cast<size_t>(m * groups)) {
      scale.resize(m * groups);
      scaled_sum.resize(m * groups);
    }
  }

  // Symmetric, round to nearest, scale = largest magnitude / 32512 (so that the high byte stays in int8).
  void quantize_row(int64_t row, const float* x) {
    for (int g = 0; g < groups; ++g) {
      const vf a = load<vf>(x + g * kGroup), b = load<vf>(x + g * kGroup + kLanes);
      const vf abs_a = a < 0 ? -a : a, abs_b = b < 0 ? -b : b;
      const float amax = max(abs_a > abs_b ? abs_a : abs_b);
      const float inverse = amax > 0 ? 32512.0f / amax : 0.0f;
      // Adding 1.5 * 2^23 rounds to the nearest integer in the low mantissa bits.
      const vf magic = splat(12582912.0f);
      const vi qa = (vi)(a * inverse + magic) - (vi)magic, qb = (vi)(b * inverse + magic) - (vi)magic;
      const vi high_a = (qa + 128) >> 8, high_b = (qb + 128) >> 8;
      typedef int8_t v16b __attribute__((vector_size(16)));
      int8_t* out = codes.data() + 2 * row * k + g * kGroup;
      store(out, __builtin_convertvector(high_a, v16b));
      store(out + kLanes, __builtin_convertvector(high_b, v16b));
      store(out + k, __builtin_convertvector(qa - (high_a << 8), v16b));
      store(out + k + kLanes, __builtin_convertvector(qb - (high_b << 8), v16b));
      const float s = amax / 32512.0f;
      scale[row * groups + g] = s;
      scaled_sum[row * groups + g] = s * sum(to_float(qa + qb));
    }
  }
};

// out(row block, token) for kRowBlocks neighbouring row blocks and kTokens tokens. Two row blocks by four tokens
// is the largest tile whose sums and weights fit into 32 registers; it reaches the rate of the dot products.
template <int kBits, int kTokens, int kRowBlocks>
static inline void gemm_tile(const uint8_t* weights, int64_t block_stride, const int8_t* codes, const float* scale,
                             const float* scaled_sum, int k, vf (&out)[kRowBlocks][kTokens]) {
  constexpr int kCodeBytes = kTileRows * kGroup * kBits / 8;
  constexpr int kTileBytes = kCodeBytes + 2 * 2 * kTileRows;
  constexpr int kQuads = kGroup / 4;
  const int groups = k / kGroup;
  for (int b = 0; b < kRowBlocks; ++b)
    for (int t = 0; t < kTokens; ++t) out[b][t] = vf{};
  for (int g = 0; g < groups; ++g) {
    vb w[kRowBlocks][kQuads];
    vf w_scale[kRowBlocks], w_offset[kRowBlocks];
    for (int b = 0; b < kRowBlocks; ++b) {
      const uint8_t* tile = weights + b * block_stride + static_cast<int64_t>(g) * kTileBytes;
#if defined(__x86_64__)
      if constexpr (kTokens == 1)  // many tokens keep their weights in the cache
        for (int line = 0; line < kTileBytes; line += 64)
          _mm_prefetch(reinterpret_cast<const char*>(tile) + 6 * kTileBytes + line, _MM_HINT_T0);
#endif
      if constexpr (kBits == 4) {
#pragma GCC unroll 4
        for (int v = 0; v < kQuads / 2; ++v) {
          const vb both = load<vb>(tile + 64 * v);
          w[b][2 * v] = both & 15;
          w[b][2 * v + 1] = (vb)(((vi)both >> 4) & 0x0f0f0f0f);
        }
      } else {
#pragma GCC unroll 8
        for (int v = 0; v < kQuads; ++v) w[b][v] = load<vb>(tile + 64 * v);
      }
      w_scale[b] = load_half(tile + kCodeBytes);
      w_offset[b] = load_half(tile + kCodeBytes + 2 * kTileRows);
    }
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) {
      const int8_t* x = codes + 2 * static_cast<int64_t>(t) * k + g * kGroup;
      vi high[kRowBlocks] = {}, low[kRowBlocks] = {};
#pragma GCC unroll 8
      for (int q = 0; q < kQuads; ++q) {
        const vi high_quad = splat_quad(x + 4 * q), low_quad = splat_quad(x + k + 4 * q);
        for (int b = 0; b < kRowBlocks; ++b) {
          high[b] = dot4<(1 << kBits) - 1>(high[b], w[b][q], high_quad);
          low[b] = dot4<(1 << kBits) - 1>(low[b], w[b][q], low_quad);
        }
      }
      const int64_t i = static_cast<int64_t>(t) * groups + g;
      for (int b = 0; b < kRowBlocks; ++b) {
        const vf dot = to_float((high[b] << 8) + low[b]);
        out[b][t] = fma(dot, w_scale[b] * scale[i], out[b][t]);
        out[b][t] = fma(w_offset[b], splat(scaled_sum[i]), out[b][t]);
      }
    }
  }
}

// sink(token, first row, 16 values) for each row block of [first, last) and each of tokens [begin, end).
template <int kBits, class Sink>
static void gemm_rows(const Matrix& w, const QuantizedRows& x, int64_t begin, int64_t end, int64_t first, int64_t last,
                      Sink&& sink) {
  const int64_t block_stride =
      static_cast<int64_t>(w.k / kGroup) * (kTileRows * kGroup * kBits / 8 + 4 * kTileRows);
  auto tile = [&]<int kTokens, int kRowBlocks>(int64_t block, int64_t token) {
    vf out[kRowBlocks][kTokens];
    gemm_tile<kBits, kTokens, kRowBlocks>(w.data + block * block_stride, block_stride, x.codes.data() + 2 * token * x.k,
                                          x.scale.data() + token * x.groups, x.scaled_sum.data() + token * x.groups,
                                          w.k, out);
    for (int b = 0; b < kRowBlocks; ++b)
      for (int t = 0; t < kTokens; ++t) sink(token + t, (block + b) * kTileRows, out[b][t]);
  };
  auto tokens = [&]<int kRowBlocks>(int64_t block) {
    int64_t t = begin;
    for (; t + 4 <= end; t += 4) tile.template operator()<4, kRowBlocks>(block, t);
    if (t + 3 == end) tile.template operator()<3, kRowBlocks>(block, t);
    if (t + 2 == end) tile.template operator()<2, kRowBlocks>(block, t);
    if (t + 1 == end) tile.template operator()<1, kRowBlocks>(block, t);
  };
  int64_t block = first;
  for (; block + 2 <= last; block += 2) tokens.template operator()<2>(block);
  if (block < last) tokens.template operator()<1>(block);
}

// All rows of w, in parallel. The sink runs on any thread, once for each (token, row block).
template <class Sink>
static void gemm(ThreadPool& pool, const Matrix& w, const QuantizedRows& x, int64_t m, Sink&& sink) {
  // A panel of tokens and a chunk of weights stay in the L2 cache together.
  constexpr int64_t kPanel = 128, kMaxChunk = 32;
  const int64_t blocks = (w.n + kTileRows - 1) / kTileRows;
  // Chunks small enough to balance the threads within some percent, large enough to amortise the ticket.
  const int64_t per_chunk = std::clamp<int64_t>(blocks / (pool.size() * 8) / 2 * 2, 2, kMaxChunk);
  pool.run((blocks + per_chunk - 1) / per_chunk, [&](int64_t chunk) {
    const int64_t first = chunk * per_chunk, last = std::min(blocks, first + per_chunk);
    for (int64_t begin = 0; begin < m; begin += kPanel) {
      const int64_t end = std::min(m, begin + kPanel);
      if (w.bits == 4) gemm_rows<4>(w, x, begin, end, first, last, sink);
      else gemm_rows<8>(w, x, begin, end, first, last, sink);
    }
  });
}
