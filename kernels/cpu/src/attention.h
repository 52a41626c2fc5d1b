// Causal attention over the paged KV cache, online softmax (Dao et al. 2022) by blocks of 16 keys.
//
// Keys lie transposed inside a block, so that the scores of 16 keys are one vector. The context is cut into
// parts of kPart keys at fixed places; parts are merged in order. So a query's result depends on its own
// context alone, not on the batch, the chunk it came in, or the number of threads.
#pragma once

#include <algorithm>
#include <vector>

#include "simd.h"
#include "threads.h"

constexpr int kBlock = 16;
constexpr int kPart = 256;
constexpr int kMaxHeadDim = 256;
constexpr int kMaxRows = 8;  // query rows (tokens x heads of one group) that share a pass over the keys

struct Step {  // AttentionMetadata; mirrored in kernels/cpu/__init__.py
  const int32_t *positions, *slot_mapping, *query_start, *seq_lens, *block_table;
  int32_t num_tokens, num_seqs, max_blocks;
};

struct AttentionShape {
  int32_t num_heads, num_kv_heads, head_dim, window;  // window 0: none
  float scale;
};

struct Partial {  // of one query row: running maximum, sum of weights, weighted sum of values
  float max, sum;
  float out[kMaxHeadDim];
};

// One pass over the keys [begin, end) for num_rows rows, each with its own last visible position.
static void attend_part(const AttentionShape& s, const float* const* q, const int32_t* pos, int num_rows,
                        const float* keys, const float* values, const int32_t* blocks, int64_t block_stride,
                        int64_t begin, int64_t end, Partial* partial) {
  const int dim = s.head_dim, vectors = dim / kLanes;
  for (int r = 0; r < num_rows; ++r) {
    partial[r].max = -INFINITY;
    partial[r].sum = 0;
    std::fill_n(partial[r].out, dim, 0.0f);
  }
  vi lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  for (int64_t start = begin; start < end; start += kBlock) {
    const int64_t base = blocks[start / kBlock] * block_stride;
    const float *k = keys + base, *v = values + base;
    vf score[kMaxRows];
    for (int r = 0; r < num_rows; ++r) score[r] = vf{};
    for (int d = 0; d < dim; ++d) {
      const vf column = load<vf>(k + d * kBlock);
      for (int r = 0; r < num_rows; ++r) score[r] += column * q[r][d];
    }
    for (int r = 0; r < num_rows; ++r) {
      const int32_t last = pos[r];
      const int32_t first = s.window > 0 ? std::max(0, last - s.window + 1) : 0;
      if (start > last || start + kBlock <= first) continue;
      const vi key_pos = lane + static_cast<int32_t>(start);
      const vi visible = (key_pos <= last) & (key_pos >= first);
      const vf scored = visible ? score[r] * s.scale : splat(-INFINITY);
      Partial& p = partial[r];
      const float new_max = std::max(p.max, max(scored));
      const float correction = p.max == -INFINITY ? 0.0f : std::exp(p.max - new_max);
      const vf weight = visible ? exp_negative(scored - new_max) : vf{};
      p.sum = p.sum * correction + sum(weight);
      p.max = new_max;
      float w[kLanes];
      store(w, weight);
      const int lo = std::max<int64_t>(0, first - start), hi = std::min<int64_t>(kBlock, last - start + 1);
      for (int i = 0; i < vectors; ++i) {
        vf out = load<vf>(p.out + i * kLanes) * correction;
        for (int t = lo; t < hi; ++t) out += load<vf>(v + t * dim + i * kLanes) * w[t];
        store(p.out + i * kLanes, out);
      }
    }
  }
}

static void merge_part(Partial& into, const Partial& part, int dim) {
  if (part.sum == 0) return;
  const float new_max = std::max(into.max, part.max);
  const float a = into.max == -INFINITY ? 0.0f : std::exp(into.max - new_max), b = std::exp(part.max - new_max);
  into.sum = into.sum * a + part.sum * b;
  into.max = new_max;
  for (int i = 0; i < dim; ++i) into.out[i] = into.out[i] * a + part.out[i] * b;
}

// q [tokens, q_stride], out [tokens, num_heads * head_dim]; caches as in kernels/types.py.
static void paged_attention(ThreadPool& pool, const AttentionShape& s, const Step& step, const float* q,
                            int64_t q_stride, const float* k_cache, const float* v_cache, float* out) {
  struct Item {
    int32_t seq, kv_head, first_token, num_tokens, part, slot;
  };
  static std::vector<Item> items;  // calls are serialized by the library's lock
  static std::vector<Partial> partials;
  const int group = s.num_heads / s.num_kv_heads, dim = s.head_dim;
  const int heads_per_pass = std::min(group, kMaxRows), tokens_per_tile = std::max(1, kMaxRows / group);
  const int64_t block_stride = static_cast<int64_t>(s.num_kv_heads) * dim * kBlock, head_stride = dim * kBlock;

  items.clear();
  int32_t slots = 0;
  // A single query over a long context is cut into its parts, so that all threads help.
  for (int32_t seq = 0; seq < step.num_seqs; ++seq) {
    const int32_t begin = step.query_start[seq], end = step.query_start[seq + 1];
    const int32_t parts = (step.seq_lens[seq] + kPart - 1) / kPart;
    for (int32_t h = 0; h < s.num_kv_heads; ++h)
      for (int32_t t = begin; t < end; t += tokens_per_tile) {
        const int32_t n = std::min(tokens_per_tile, end - t);
        if (end - begin == 1 && parts > 1)
          for (int32_t p = 0; p < parts; ++p) items.push_back({seq, h, t, n, p, slots + p * group});
        else
          items.push_back({seq, h, t, n, -1, 0});
        if (end - begin == 1 && parts > 1) slots += parts * group;
      }
  }
  if (partials.size() < static_cast<size_t>(slots)) partials.resize(slots);

  auto finish = [&](const Partial& p, int32_t token, int head) {
    float* to = out + (static_cast<int64_t>(token) * s.num_heads + head) * dim;
    const float inverse = 1.0f / p.sum;
    for (int i = 0; i < dim; ++i) to[i] = p.out[i] * inverse;
  };
  auto visit = [&](const Item& item) {
    const int32_t* blocks = step.block_table + static_cast<int64_t>(item.seq) * step.max_blocks;
    const float *keys = k_cache + item.kv_head * head_stride, *values = v_cache + item.kv_head * head_stride;
    for (int first_head = 0; first_head < group; first_head += heads_per_pass) {
      const int heads = std::min(heads_per_pass, group - first_head);
      const float* rows[kMaxRows];
      int32_t pos[kMaxRows];
      int num_rows = 0;
      for (int t = 0; t < item.num_tokens; ++t)
        for (int h = 0; h < heads; ++h, ++num_rows) {
          const int32_t token = item.first_token + t;
          rows[num_rows] = q + token * q_stride + static_cast<int64_t>(item.kv_head * group + first_head + h) * dim;
          pos[num_rows] = step.positions[token];
        }
      const int64_t context = pos[num_rows - 1] + 1;
      auto attend = [&](int64_t part, Partial* to) {
        const int64_t begin = part * kPart;
        attend_part(s, rows, pos, num_rows, keys, values, blocks, block_stride, begin,
                    std::min(context, begin + kPart), to);
      };
      if (item.part >= 0) {
        attend(item.part, partials.data() + item.slot + first_head);
        continue;
      }
      static thread_local std::vector<Partial> local(2 * kMaxRows);
      Partial *total = local.data(), *part = local.data() + kMaxRows;
      attend(0, total);
      for (int64_t p = 1; p * kPart < context; ++p) {
        attend(p, part);
        for (int r = 0; r < num_rows; ++r) merge_part(total[r], part[r], dim);
      }
      for (int r = 0; r < num_rows; ++r)
        finish(total[r], item.first_token + r / heads, item.kv_head * group + first_head + r % heads);
    }
  };
  const int64_t per_chunk = std::max<int64_t>(1, static_cast<int64_t>(items.size()) / (pool.size() * 16));
  const int64_t num_items = static_cast<int64_t>(items.size());
  pool.run((num_items + per_chunk - 1) / per_chunk, [&](int64_t chunk) {
    for (int64_t i = chunk * per_chunk; i < std::min(num_items, (chunk + 1) * per_chunk); ++i) visit(items[i]);
  });
  for (const Item& item : items) {
    if (item.part != 0) continue;
    const int32_t parts = (step.seq_lens[item.seq] + kPart - 1) / kPart;
    for (int h = 0; h < group; ++h) {
      Partial& total = partials[item.slot + h];
      for (int32_t p = 1; p < parts; ++p) merge_part(total, partials[item.slot + p * group + h], dim);
      finish(total, item.first_token, item.kv_head * group + h);
    }
  }
}
