// Causal attention over the paged KV cache, softmax by parts (Dao et al. 2022, Flash-Decoding 2023).
//
// Keys lie transposed inside a block, so that the scores of 16 keys are one vector. The context is cut into
// parts of kPart keys at fixed places; each part has its own maximum, and parts are merged in order. So a
// query's result depends on its own context alone, not on the batch, the chunk it came in, or the threads.
#pragma once

#include <algorithm>
#include <vector>

#include "simd.h"
#include "threads.h"

constexpr int kBlock = 16;
constexpr int kPart = 256;
constexpr int kMaxHeadDim = 256;
constexpr int kMaxRows = 16;  // query rows (tokens x heads of one group) that share a pass over the keys
constexpr int kRowTile = 4;   // rows whose sums stay in registers

struct Step {  // AttentionMetadata; mirrored in kernels/cpu/__init__.py
  const int32_t *positions, *slot_mapping, *query_start, *seq_lens, *block_table;
  int32_t num_tokens, num_seqs, max_blocks;
};

struct AttentionShape {
  int32_t num_heads, num_kv_heads, head_dim, window;  // window 0: none
  float scale, softcap;  // softcap 0: none

  int32_t first_visible(int32_t pos) const { return window > 0 ? std::max(0, pos - window + 1) : 0; }
};

struct Partial {  // of one query row: maximum score, sum of weights, weighted sum of values
  float max, sum;
  float out[kMaxHeadDim];
};

// Query rows of one kv head, in token order, each with its position.
struct QueryRows {
  const float* q[kMaxRows];
  int32_t pos[kMaxRows];
  int count = 0;
};

// scores[row][16 * block + lane] of kRows rows against kBlocks blocks of keys.
template <int kRows, int kBlocks>
static inline void score_tile(const float* const* q, const float* const* keys, int dim, float scale, float* scores) {
  vf acc[kRows][kBlocks] = {};
  for (int d = 0; d < dim; ++d) {
    vf column[kBlocks];
    for (int b = 0; b < kBlocks; ++b) column[b] = load<vf>(keys[b] + d * kBlock);
    for (int r = 0; r < kRows; ++r)
      for (int b = 0; b < kBlocks; ++b) acc[r][b] = fma(splat(q[r][d]), column[b], acc[r][b]);
  }
  for (int r = 0; r < kRows; ++r)
    for (int b = 0; b < kBlocks; ++b) store(scores + r * kPart + b * kBlock, acc[r][b] * scale);
}

// out[row][16 * kVectors] += weights[row][t] * values[t], for t in [begin, end) of one block.
template <int kRows, int kVectors>
static inline void value_tile(const float* weights, const float* const* values, int dim, int64_t first_key,
                              int64_t begin, int64_t end, Partial* partial, int at) {
  vf acc[kRows][kVectors];
  for (int r = 0; r < kRows; ++r)
    for (int i = 0; i < kVectors; ++i) acc[r][i] = load<vf>(partial[r].out + at + i * kLanes);
  for (int64_t t = begin; t < end; ++t) {
    const float* row = values[(t - first_key) / kBlock] + (t % kBlock) * dim + at;
    vf value[kVectors];
    for (int i = 0; i < kVectors; ++i) value[i] = load<vf>(row + i * kLanes);
    for (int r = 0; r < kRows; ++r)
      for (int i = 0; i < kVectors; ++i) acc[r][i] = fma(splat(weights[r * kPart + t - first_key]), value[i], acc[r][i]);
  }
  for (int r = 0; r < kRows; ++r)
    for (int i = 0; i < kVectors; ++i) store(partial[r].out + at + i * kLanes, acc[r][i]);
}

// Calls fn.operator()<n>(first row) for tiles of n <= kRowTile rows.
template <class Fn>
static inline void for_row_tiles(int rows, Fn&& fn) {
  int r = 0;
  for (; r + kRowTile <= rows; r += kRowTile) fn.template operator()<kRowTile>(r);
  if (rows - r == 3) fn.template operator()<3>(r);
  if (rows - r == 2) fn.template operator()<2>(r);
  if (rows - r == 1) fn.template operator()<1>(r);
}

// Turns scores of the keys from `first_key` on into weights e^(score - max), zero where a key is not visible.
static inline void softmax_row(const AttentionShape& s, int32_t pos, int64_t first_key, int num_blocks, float* scores,
                               Partial& p) {
  const int32_t last = pos, first = s.first_visible(pos);
  vi lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  vf top = splat(-INFINITY);
  for (int b = 0; b < num_blocks; ++b) {
    const int32_t start = static_cast<int32_t>(first_key) + b * kBlock;
    vf v = load<vf>(scores + b * kBlock);
    if (s.softcap > 0) {
      v = splat(s.softcap) * tanh(v * (1.0f / s.softcap));
      store(scores + b * kBlock, v);
    }
    if (start < first || start + kBlock - 1 > last) {
      const vi key = lane + start;
      v = (key <= last) & (key >= first) ? v : splat(-INFINITY);
      store(scores + b * kBlock, v);
    }
    top = v > top ? v : top;
  }
  p.max = max(top);
  vf total{};
  for (int b = 0; b < num_blocks; ++b) {
    const vf v = load<vf>(scores + b * kBlock);
    const vf weight = v > splat(-INFINITY) ? exp_negative(v - p.max) : vf{};
    total += weight;
    store(scores + b * kBlock, weight);
  }
  p.sum = sum(total);
}

// One part of the context, keys [begin, end), for all rows.
static void attend_part(const AttentionShape& s, const QueryRows& rows, const float* keys, const float* values,
                        const int32_t* blocks, int64_t block_stride, int64_t begin, int64_t end, Partial* partial) {
  constexpr int kBlocks = kPart / kBlock, kKeysInL1 = 64;
  alignas(64) static thread_local float scores[kMaxRows * kPart];
  const int dim = s.head_dim;
  for (int r = 0; r < rows.count; ++r) {
    partial[r].max = -INFINITY;
    partial[r].sum = 0;
    std::fill_n(partial[r].out, dim, 0.0f);
  }
  // Outside of what some row sees, slots may never have been written.
  const int64_t first = std::max<int64_t>(begin, s.first_visible(rows.pos[0]));
  end = std::min<int64_t>(end, rows.pos[rows.count - 1] + 1);
  if (first >= end) return;
  const int64_t first_key = first / kBlock * kBlock;
  const int num_blocks = static_cast<int>((end - first_key + kBlock - 1) / kBlock);
  const float *k[kBlocks], *v[kBlocks];
  for (int b = 0; b < num_blocks; ++b) {
    const int64_t base = blocks[first_key / kBlock + b] * block_stride;
    k[b] = keys + base;
    v[b] = values + base;
  }
  for (int b = 0; b < num_blocks; b += 2)
    for_row_tiles(rows.count, [&]<int kRows>(int r) {
      float* to = scores + r * kPart + b * kBlock;
      if (b + 1 < num_blocks) score_tile<kRows, 2>(rows.q + r, k + b, dim, s.scale, to);
      else score_tile<kRows, 1>(rows.q + r, k + b, dim, s.scale, to);
    });
  for (int r = 0; r < rows.count; ++r)
    softmax_row(s, rows.pos[r], first_key, num_blocks, scores + r * kPart, partial[r]);
  for (int64_t t = first; t < end;) {
    const int64_t stop = std::min(end, (t / kKeysInL1 + 1) * kKeysInL1);
    for_row_tiles(rows.count, [&]<int kRows>(int r) {
      const float* w = scores + r * kPart;
      int at = 0;
      for (; at + 4 * kLanes <= dim; at += 4 * kLanes)
        value_tile<kRows, 4>(w, v, dim, first_key, t, stop, partial + r, at);
      for (; at + 2 * kLanes <= dim; at += 2 * kLanes)
        value_tile<kRows, 2>(w, v, dim, first_key, t, stop, partial + r, at);
      for (; at < dim; at += kLanes) value_tile<kRows, 1>(w, v, dim, first_key, t, stop, partial + r, at);
    });
    t = stop;
  }
}

static void merge_part(Partial& into, const Partial& part, int dim) {
  if (part.sum == 0) return;
  const float new_max = std::max(into.max, part.max);
  const float a = into.max == -INFINITY ? 0.0f : std::exp(into.max - new_max), b = std::exp(part.max - new_max);
  into.sum = into.sum * a + part.sum * b;
  into.max = new_max;
  for (int i = 0; i < dim; i += kLanes)
    store(into.out + i, fma(load<vf>(part.out + i), splat(b), load<vf>(into.out + i) * a));
}

// q [tokens, q_stride], out [tokens, num_heads * head_dim]; caches as in kernels/types.py.
static void paged_attention(ThreadPool& pool, const AttentionShape& s, const Step& step, const float* q,
                            int64_t q_stride, const float* k_cache, const float* v_cache, float* out) {
  struct Item {  // a tile of tokens of one sequence and kv head, over parts [first_part, last_part)
    int32_t seq, kv_head, first_token, num_tokens, first_part, last_part;
    int64_t slot;  // of its rows in `partials`; -1: it sees every part itself
  };
  static std::vector<Item> items;  // calls are serialized by the library's lock
  static std::vector<Partial> partials;
  const int group = s.num_heads / s.num_kv_heads, dim = s.head_dim;
  const int heads_per_pass = std::min(group, kMaxRows), tokens_per_tile = std::max(1, kMaxRows / group);
  const int64_t block_stride = static_cast<int64_t>(s.num_kv_heads) * dim * kBlock, head_stride = dim * kBlock;

  items.clear();
  for (int32_t seq = 0; seq < step.num_seqs; ++seq)
    for (int32_t h = 0; h < s.num_kv_heads; ++h)
      for (int32_t t = step.query_start[seq]; t < step.query_start[seq + 1]; t += tokens_per_tile) {
        const int32_t n = std::min(tokens_per_tile, step.query_start[seq + 1] - t);
        const int32_t first_part = s.first_visible(step.positions[t]) / kPart;
        items.push_back({seq, h, t, n, first_part, step.positions[t + n - 1] / kPart + 1, -1});
      }
  // Few tiles over long contexts are cut into their parts, so that all threads help; the result is the same.
  const size_t whole = items.size();
  int64_t slots = 0;
  if (pool.size() > 1 && whole < static_cast<size_t>(pool.size()) * 8)
    for (size_t i = 0; i < whole; ++i) {
      const Item item = items[i];
      if (item.last_part - item.first_part < 2) continue;
      for (int32_t p = item.first_part; p < item.last_part; ++p, slots += item.num_tokens * group) {
        const Item part{item.seq, item.kv_head, item.first_token, item.num_tokens, p, p + 1, slots};
        if (p == item.first_part) items[i] = part;
        else items.push_back(part);
      }
    }
  if (partials.size() < static_cast<size_t>(slots)) partials.resize(slots);

  auto finish = [&](const Partial& p, const Item& item, int row) {
    const int64_t head = item.kv_head * group + row % group, token = item.first_token + row / group;
    float* to = out + (token * s.num_heads + head) * dim;
    const float inverse = 1.0f / p.sum;
    for (int i = 0; i < dim; i += kLanes) store(to + i, load<vf>(p.out + i) * inverse);
  };
  auto visit = [&](const Item& item) {
    static thread_local std::vector<Partial> scratch(2 * kMaxRows);
    const int32_t* blocks = step.block_table + static_cast<int64_t>(item.seq) * step.max_blocks;
    const float *keys = k_cache + item.kv_head * head_stride, *values = v_cache + item.kv_head * head_stride;
    for (int first_head = 0; first_head < group; first_head += heads_per_pass) {
      const int heads = std::min(heads_per_pass, group - first_head);
      QueryRows rows;
      for (int t = 0; t < item.num_tokens; ++t)
        for (int h = 0; h < heads; ++h, ++rows.count) {
          const int64_t token = item.first_token + t;
          rows.q[rows.count] = q + token * q_stride + static_cast<int64_t>(item.kv_head * group + first_head + h) * dim;
          rows.pos[rows.count] = step.positions[token];
        }
      auto attend = [&](int64_t part, Partial* to) {
        attend_part(s, rows, keys, values, blocks, block_stride, part * kPart, (part + 1) * kPart, to);
      };
      Partial *total = scratch.data(), *next = total + kMaxRows;
      if (item.slot >= 0) {  // several tokens share a tile only when the whole group fits into one pass
        attend(item.first_part, partials.data() + item.slot + first_head);
        continue;
      }
      attend(item.first_part, total);
      for (int32_t p = item.first_part + 1; p < item.last_part; ++p) {
        attend(p, next);
        for (int r = 0; r < rows.count; ++r) merge_part(total[r], next[r], dim);
      }
      for (int r = 0; r < rows.count; ++r) finish(total[r], item, first_head + r);
    }
  };
  const int64_t num_items = static_cast<int64_t>(items.size());
  const int64_t per_chunk = std::max<int64_t>(1, num_items / (pool.size() * 16));
  pool.run((num_items + per_chunk - 1) / per_chunk, [&](int64_t chunk) {
    for (int64_t i = chunk * per_chunk; i < std::min(num_items, (chunk + 1) * per_chunk); ++i) visit(items[i]);
  });
  for (size_t i = 0; slots > 0 && i < whole; ++i) {
    const Item& item = items[i];
    if (item.slot < 0) continue;
    const int32_t end = step.positions[item.first_token + item.num_tokens - 1] / kPart + 1;
    const int64_t rows = static_cast<int64_t>(item.num_tokens) * group;
    for (int64_t r = 0; r < rows; ++r) {
      Partial& total = partials[item.slot + r];
      for (int32_t p = 1; p < end - item.first_part; ++p) merge_part(total, partials[item.slot + p * rows + r], dim);
      finish(total, item, static_cast<int>(r));
    }
  }
}
