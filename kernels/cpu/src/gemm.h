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

enum Kind : int32_t { kAffine, kZero, kSym };  // how a group's parameters are stored; see kernels/formats.py

struct Matrix {  // a PackedWeight; mirrored in kernels/cpu/__init__.py
  const uint8_t* data;
  int32_t n, k, bits, group_size;  // group_size: columns, K for a whole row
  Kind kind;

  int num_groups() const { return (k + group_size - 1) / group_size; }
  int param_bytes() const { return kind == kAffine ? 4 * kTileRows : kind == kZero ? 2 * kTileRows : kTileRows; }
  int64_t code_bytes() const { return static_cast<int64_t>(k) * kTileRows * bits / 8; }
  int64_t block_bytes() const {
    return code_bytes() + static_cast<int64_t>(num_groups()) * param_bytes() + (kind == kAffine ? 0 : 2 * kTileRows);
  }
};

struct Weight {  // a PackedWeight, or a StackedWeight: matrices of one K along N
  Matrix parts[3];
  int32_t count, n, k;
};

// Scale and offset of 16 rows for one group of columns: W = scale * u + offset.
struct GroupParams {
  const uint8_t* at;
  vf row_scale;
  Kind kind;
  int bits;

  GroupParams(const Matrix& w, const uint8_t* block) : at(block + w.code_bytes()), kind(w.kind), bits(w.bits) {
    if (kind != kAffine)
      row_scale = load_half(at + static_cast<int64_t>(w.num_groups()) * w.param_bytes()) * (1.0f / 256);
  }
  void load_group(int group, vf& scale, vf& offset) const {
    if (kind == kAffine) {
      const uint8_t* p = at + group * 4 * kTileRows;
      scale = load_half(p);
      offset = load_half(p + 2 * kTileRows);
      return;
    }
    const uint8_t* p = at + group * (kind == kZero ? 2 : 1) * kTileRows;
    scale = load_bytes(p) * row_scale;
    if (kind == kZero) offset = -(scale * (static_cast<float>(1 << bits) / 256)) * load_bytes(p + kTileRows);
    else offset = -scale * static_cast<float>(1 << (bits - 1));
  }
};

// The eight quads of one tile of 16 rows x 32 columns.
template <int kBits>
static inline void load_codes(const uint8_t* tile, vb (&w)[8]) {
  static_assert(kBits == 2 || kBits == 3 || kBits == 4 || kBits == 5 || kBits == 6 || kBits == 8);
  if constexpr (kBits == 8) {
#pragma GCC unroll 8
    for (int q = 0; q < 8; ++q) w[q] = load<vb>(tile + 64 * q);
    return;
  }
  constexpr int kLow = kBits >= 4 ? 4 : 2;  // bits of the first plane
  constexpr int kPerVector = 8 / kLow;
  constexpr int32_t kLowMask = kLow == 4 ? 0x0f0f0f0f : 0x03030303;
#pragma GCC unroll 4
  for (int v = 0; v < kLow; ++v) {
    const vi both = load<vi>(tile + 64 * v);
#pragma GCC unroll 4
    for (int i = 0; i < kPerVector; ++i) w[v * kPerVector + i] = (vb)((both >> (kLow * i)) & kLowMask);
  }
  const uint8_t* second = tile + 64 * kLow;
  if constexpr (kBits - kLow == 1) {
    const vi bit = load<vi>(second);
#pragma GCC unroll 8
    for (int q = 0; q < 8; ++q) {
      const vi moved = q < kLow ? bit << (kLow - q) : bit >> (q - kLow);
      w[q] |= (vb)(moved & (0x01010101 << kLow));
    }
  } else if constexpr (kBits - kLow == 2) {
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      const vi pairs = load<vi>(second + 64 * v);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const vi moved = 2 * i < kLow ? pairs << (kLow - 2 * i) : pairs >> (2 * i - kLow);
        w[4 * v + i] |= (vb)(moved & (0x03030303 << kLow));
      }
    }
  }
}

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
static inline void gemm_tile(const Matrix& m, const uint8_t* weights, const int8_t* codes, const float* scale,
                             const float* scaled_sum, vf (&out)[kRowBlocks][kTokens]) {
  constexpr int kTileBytes = kTileRows * kGroup * kBits / 8;
  constexpr int kQuads = kGroup / 4;
  const int k = m.k, tiles = k / kGroup, tiles_per_group = m.group_size / kGroup;
  const int64_t block_bytes = m.block_bytes();
  const GroupParams first(m, weights), second(m, weights + (kRowBlocks - 1) * block_bytes);
  static_assert(kRowBlocks <= 2);
  vf w_scale[kRowBlocks], w_offset[kRowBlocks];
  for (int b = 0; b < kRowBlocks; ++b)
    for (int t = 0; t < kTokens; ++t) out[b][t] = vf{};
  for (int g = 0, left = 0, group = 0; g < tiles; ++g, --left) {
    if (left == 0) {
      first.load_group(group, w_scale[0], w_offset[0]);
      if constexpr (kRowBlocks == 2) second.load_group(group, w_scale[1], w_offset[1]);
      ++group;
      left = tiles_per_group;
    }
    vb w[kRowBlocks][kQuads];
    for (int b = 0; b < kRowBlocks; ++b) {
      const uint8_t* tile = weights + b * block_bytes + static_cast<int64_t>(g) * kTileBytes;
#if defined(__x86_64__)
      if constexpr (kTokens == 1)  // many tokens keep their weights in the cache
        for (int line = 0; line < kTileBytes; line += 64)
          _mm_prefetch(reinterpret_cast<const char*>(tile) + 6 * kTileBytes + line, _MM_HINT_T0);
#endif
      load_codes<kBits>(tile, w[b]);
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
      const int64_t i = static_cast<int64_t>(t) * tiles + g;
      for (int b = 0; b < kRowBlocks; ++b) {
        const vf dot = to_float((high[b] << 8) + low[b]);
        out[b][t] = fma(dot, w_scale[b] * scale[i], out[b][t]);
        out[b][t] = fma(w_offset[b], splat(scaled_sum[i]), out[b][t]);
      }
    }
  }
}

// sink(token, row, 16 values, rows that count) for each row block of [first, last) and each of tokens [begin, end);
// `row` counts from first_row.
template <int kBits, class Sink>
static void gemm_rows(const Matrix& w, const QuantizedRows& x, int64_t begin, int64_t end, int64_t first, int64_t last,
                      int64_t first_row, Sink& sink) {
  const int64_t block_bytes = w.block_bytes();
  auto tile = [&]<int kTokens, int kRowBlocks>(int64_t block, int64_t token) {
    vf out[kRowBlocks][kTokens];
    gemm_tile<kBits, kTokens, kRowBlocks>(w, w.data + block * block_bytes, x.codes.data() + 2 * token * x.k,
                                          x.scale.data() + token * x.groups, x.scaled_sum.data() + token * x.groups,
                                          out);
    for (int b = 0; b < kRowBlocks; ++b) {
      const int64_t row = (block + b) * kTileRows;
      const int rows = static_cast<int>(std::min<int64_t>(kTileRows, w.n - row));
      for (int t = 0; t < kTokens; ++t) sink(token + t, first_row + row, out[b][t], rows);
    }
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

template <class Sink>
static void gemm_chunk(const Matrix& w, const QuantizedRows& x, int64_t m, int64_t first, int64_t last,
                       int64_t first_row, Sink& sink) {
  constexpr int64_t kPanel = 128;  // a panel of tokens and a chunk of weights stay in the L2 cache together
  for (int64_t begin = 0; begin < m; begin += kPanel) {
    const int64_t end = std::min(m, begin + kPanel);
    switch (w.bits) {
      case 2: gemm_rows<2>(w, x, begin, end, first, last, first_row, sink); break;
      case 3: gemm_rows<3>(w, x, begin, end, first, last, first_row, sink); break;
      case 4: gemm_rows<4>(w, x, begin, end, first, last, first_row, sink); break;
      case 5: gemm_rows<5>(w, x, begin, end, first, last, first_row, sink); break;
      case 6: gemm_rows<6>(w, x, begin, end, first, last, first_row, sink); break;
      default: gemm_rows<8>(w, x, begin, end, first, last, first_row, sink); break;
    }
  }
}

// All rows of w, in parallel. The sink runs on any thread, once for each (token, row block).
template <class Sink>
static void gemm(ThreadPool& pool, const Weight& w, const QuantizedRows& x, int64_t m, Sink&& sink) {
  constexpr int64_t kMaxChunk = 32;
  // Chunks small enough to balance the threads within some percent, large enough to amortise the ticket.
  const int64_t blocks = (w.n + kTileRows - 1) / kTileRows;
  const int64_t per_chunk = std::clamp<int64_t>(blocks / (pool.size() * 8) / 2 * 2, 2, kMaxChunk);
  auto num_blocks = [](const Matrix& part) { return (part.n + kTileRows - 1) / kTileRows; };
  int64_t chunks = 0;
  for (int i = 0; i < w.count; ++i) chunks += (num_blocks(w.parts[i]) + per_chunk - 1) / per_chunk;
  pool.run(chunks, [&](int64_t chunk) {
    int64_t first_row = 0;
    for (int i = 0; i < w.count; ++i) {
      const Matrix& part = w.parts[i];
      const int64_t here = (num_blocks(part) + per_chunk - 1) / per_chunk;
      if (chunk < here) {
        const int64_t last = std::min<int64_t>(num_blocks(part), (chunk + 1) * per_chunk);
        gemm_chunk(part, x, m, chunk * per_chunk, last, first_row, sink);
        return;
      }
      chunk -= here;
      first_row += part.n;
    }
  });
}
