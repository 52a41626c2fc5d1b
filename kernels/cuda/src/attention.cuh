// Attention of one step over the paged cache: rotary embedding, append, split-KV with grouped queries.
//
// An item is (token, key-value head, up to four of its query heads, split of the context). Where a split ends
// depends on the token's position alone, so that a token's result does not depend on its batch. The last
// block to finish a split of a head combines them in their order (flash decoding, Dao et al. 2023).
#pragma once

#include <cuda_bf16.h>

#include "async.cuh"
#include "program.h"

constexpr int kBlockTokens = 16;
constexpr int kChunk = kBlockTokens * kConsumerWarps;  // a KV block a warp
constexpr int kSplitTokens = 2 * kChunk;  // short contexts stay whole: combining costs more than it saves
constexpr int kMaxSplits = 64;
constexpr int kItemHeads = 4;
constexpr int kConsumers = 32 * kConsumerWarps;
constexpr int kConsumerBarrier = 1;

// Tokens of a split for a context of `length` tokens: doubled until kMaxSplits cover it.
__device__ __forceinline__ int split_tokens(int length) {
  int tokens = kSplitTokens;
  while (tokens * kMaxSplits < length) tokens *= 2;
  return tokens;
}

__device__ __forceinline__ void unpack_bf16(const uint4& raw, float (&v)[8]) {
  const uint32_t w[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    v[2 * i] = __uint_as_float(w[i] << 16);
    v[2 * i + 1] = __uint_as_float(w[i] & 0xffff0000u);
  }
}

__device__ __forceinline__ uint4 pack_bf16(const float (&v)[8]) {
  uint32_t w[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const __nv_bfloat162 two = __floats2bfloat162_rn(v[2 * i], v[2 * i + 1]);
    w[i] = *reinterpret_cast<const uint32_t*>(&two);
  }
  return make_uint4(w[0], w[1], w[2], w[3]);
}

// Where a step's tokens are: Step's arrays, in shared memory.
struct Rows {
  int32_t positions[kMaxTokens], sequences[kMaxTokens], first_rows[kMaxTokens];
};

template <int kDim>
struct SplitAttention {
  struct Item {
    int token, position, first, size, first_split, split, splits, kv_head, group, groups, heads_per_kv;
  };
  static constexpr int kLanes = kDim / 8;            // lanes that share a row, eight columns each
  static constexpr int kRowsPerLoad = 32 / kLanes;
  static constexpr int kLoads = kBlockTokens / kRowsPerLoad;

  const AttentionPhase& phase;
  const Step& step;
  const Rows& rows;  // shared
  float* scratch;  // shared: [warps][kItemHeads][kDim + 2]
  int* flag;       // shared
  int warp, lane, part, column;

  __device__ SplitAttention(const AttentionPhase& phase, const Step& step, const Rows& rows, float* scratch, int* flag,
                            int warp, int lane)
      : phase(phase), step(step), rows(rows), scratch(scratch), flag(flag), warp(warp), lane(lane), part(lane % kLanes),
        column(8 * (lane % kLanes)) {}

  // A head of this step, normed and rotated; `row` is equal in all lanes of a group.
  __device__ void load_rotated(const float* head, const float* norm, int position, float (&v)[8]) const {
    Floats8 x = load8(head + column);
    if (norm != nullptr) {
      float square = 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) square += x.v[i] * x.v[i];
      square = lanes_sum<kLanes / 2>(square);
      const float scale = rsqrtf(square / kDim + phase.eps);
      const Floats8 weight = load8(norm + column);
#pragma unroll
      for (int i = 0; i < 8; ++i) x.v[i] *= scale * weight.v[i];
    }
    const int64_t at = static_cast<int64_t>(position) * (kDim / 2) + column % (kDim / 2);
    const Floats8 cos = load8(phase.cos + at), sin = load8(phase.sin + at);
    const float sign = part < kLanes / 2 ? -1.0f : 1.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float other = __shfl_xor_sync(~0u, x.v[i], kLanes / 2);
      v[i] = x.v[i] * cos.v[i] + sign * other * sin.v[i];
    }
  }

  // fn(item): this block's items, one after the other.
  template <class Fn>
  __device__ void for_each(Fn fn) const {
    const int heads_per_kv = phase.num_heads / phase.num_kv_heads;
    const int groups = (heads_per_kv + kItemHeads - 1) / kItemHeads;
    int index = blockIdx.x;
    for (int token = 0; token < step.num_tokens; ++token) {
      const int position = rows.positions[token];
      if (position < 0) continue;
      const int first = phase.window > 0 ? max(0, position + 1 - phase.window) : 0;
      const int size = split_tokens(position + 1);
      const int first_split = first / size, splits = position / size + 1 - first_split;
      const int count = phase.num_kv_heads * groups * splits;
      for (; index < count; index += gridDim.x) {
        const int split = index % splits, group = (index / splits) % groups, kv_head = index / splits / groups;
        fn(Item{token, position, first, size, first_split, split, splits, kv_head, group, groups, heads_per_kv});
      }
      index -= count;
    }
  }

  __device__ __noinline__ void run() {
    for_each([&](const Item& item) { one_item(item); });
  }

  // Into L2, while others still compute this step's queries.
  __device__ __noinline__ void prefetch_cache() const {
    for_each([&](const Item& item) {
      const int begin = (item.first_split + item.split) * item.size, end = min(begin + item.size, item.position + 1);
      for (int base = begin + warp * kBlockTokens; base < end; base += kChunk) {
        if (base + kBlockTokens <= item.first) continue;
        const int64_t origin = cache_origin(item, base);
        for (int byte = 128 * lane; byte < kBlockTokens * kDim * 2; byte += 128 * 32) {
          prefetch(reinterpret_cast<const uint8_t*>(static_cast<__nv_bfloat16*>(phase.k_cache) + origin) + byte);
          prefetch(reinterpret_cast<const uint8_t*>(static_cast<__nv_bfloat16*>(phase.v_cache) + origin) + byte);
        }
      }
    });
  }

  __device__ int64_t cache_origin(const Item& item, int base) const {
    const int64_t block =
        step.block_table[rows.sequences[item.token] * step.block_table_stride + base / kBlockTokens];
    return (block * phase.num_kv_heads + item.kv_head) * kBlockTokens * kDim;
  }

  __device__ void one_item(const Item& item) {
    const auto [token, position, first, size, first_split, split, splits, kv_head, group, groups, heads_per_kv] = item;
    const int num_heads = min(kItemHeads, heads_per_kv - group * kItemHeads);
    const int first_head = kv_head * heads_per_kv + group * kItemHeads;
    const int first_row = rows.first_rows[token], first_new = rows.positions[first_row];
    const float* own = phase.qkv + static_cast<int64_t>(token) * phase.qkv_stride;
    float q[kItemHeads][8], o[kItemHeads][8] = {}, largest[kItemHeads], total[kItemHeads] = {};
#pragma unroll
    for (int h = 0; h < kItemHeads; ++h) {
      load_rotated(own + (first_head + min(h, num_heads - 1)) * kDim, phase.q_norm, position, q[h]);
#pragma unroll
      for (int i = 0; i < 8; ++i) q[h][i] *= phase.scale * 1.44269504f;
      largest[h] = -1e30f;
    }
    const int begin = (first_split + split) * size, end = min(begin + size, position + 1);
    for (int base = begin + warp * kBlockTokens; base < end; base += kChunk)
      if (base + kBlockTokens > first) one_block(item, base, first_row, first_new, q, o, largest, total);

    // Rows of one warp, then warps.
    float* mine = scratch + warp * kItemHeads * (kDim + 2);
#pragma unroll
    for (int h = 0; h < kItemHeads; ++h) {
      total[h] = lanes_sum<16, kLanes>(total[h]);
#pragma unroll
      for (int i = 0; i < 8; ++i) o[h][i] = lanes_sum<16, kLanes>(o[h][i]);
      if (lane < kLanes) {
#pragma unroll
        for (int i = 0; i < 8; ++i) mine[h * (kDim + 2) + column + i] = o[h][i];
      }
      if (lane == 0) {
        mine[h * (kDim + 2) + kDim] = largest[h];
        mine[h * (kDim + 2) + kDim + 1] = total[h];
      }
    }
    named_barrier(kConsumerBarrier, kConsumers);
    const int slot_head = (token * phase.num_kv_heads + kv_head) * groups + group;
    const int64_t slot = static_cast<int64_t>(slot_head) * kMaxSplits + split;
    float* out = phase.out + static_cast<int64_t>(token) * phase.out_stride + first_head * kDim;
    for (int i = warp * 32 + lane; i < num_heads * kDim; i += kConsumers) {
      const float* head = scratch + (i / kDim) * (kDim + 2);
      float m = -1e30f, l = 0, v = 0;
#pragma unroll
      for (int w = 0; w < kConsumerWarps; ++w) m = fmaxf(m, head[w * kItemHeads * (kDim + 2) + kDim]);
#pragma unroll
      for (int w = 0; w < kConsumerWarps; ++w) {
        const float* part_of = head + w * kItemHeads * (kDim + 2);
        const float factor = exp2f(part_of[kDim] - m);
        l += part_of[kDim + 1] * factor;
        v += part_of[i % kDim] * factor;
      }
      if (splits == 1) {
        out[i] = v / l;
      } else {
        step.split_out[slot * kItemHeads * kDim + i] = v;
        if (i % kDim == 0) {
          step.split_lse[(slot * kItemHeads + i / kDim) * 2] = m;
          step.split_lse[(slot * kItemHeads + i / kDim) * 2 + 1] = l;
        }
      }
    }
    if (splits > 1) {
      __threadfence();
      named_barrier(kConsumerBarrier, kConsumers);
      if (warp == 0 && lane == 0) {
        __threadfence();
        const bool is_last = atomicAdd(step.split_count + slot_head, 1u) == static_cast<uint32_t>(splits - 1);
        if (is_last) step.split_count[slot_head] = 0;
        __threadfence();
        *flag = is_last;
      }
      named_barrier(kConsumerBarrier, kConsumers);
      if (*flag) combine(slot - split, splits, num_heads, out);
    }
    named_barrier(kConsumerBarrier, kConsumers);  // scratch and flag are free again
  }

  __device__ void combine(int64_t first_slot, int splits, int num_heads, float* out) {
    for (int i = warp * 32 + lane; i < num_heads * kDim; i += kConsumers) {
      const float* lse = step.split_lse + (first_slot * kItemHeads + i / kDim) * 2;
      float m = -1e30f, l = 0, v = 0;
      for (int s = 0; s < splits; ++s) m = fmaxf(m, __ldcg(lse + s * kItemHeads * 2));
#pragma unroll 8
      for (int s = 0; s < splits; ++s) {
        const float factor = exp2f(__ldcg(lse + s * kItemHeads * 2) - m);
        l += __ldcg(lse + s * kItemHeads * 2 + 1) * factor;
        v += __ldcg(step.split_out + (first_slot + s) * kItemHeads * kDim + i) * factor;
      }
      out[i] = v / l;
    }
  }

  // Sixteen keys and values of one KV block, online softmax.
  __device__ void one_block(const Item& item, int base, int first_row, int first_new, const float (&q)[kItemHeads][8], float (&o)[kItemHeads][8],
                            float (&largest)[kItemHeads], float (&total)[kItemHeads]) {
    const int position = item.position, first = item.first, kv_head = item.kv_head;
    const int64_t origin = cache_origin(item, base);
    uint4* keys = reinterpret_cast<uint4*>(static_cast<__nv_bfloat16*>(phase.k_cache) + origin);
    uint4* values = reinterpret_cast<uint4*>(static_cast<__nv_bfloat16*>(phase.v_cache) + origin);
    const int row = lane / kLanes;
    uint4 k[kLoads], v[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      k[i] = __ldcg(keys + i * 32 + lane);
      v[i] = __ldcg(values + i * 32 + lane);
    }
    if (base + kBlockTokens > first_new) {
      // This step's own keys and values: from the projections, as the cache will hold them.
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const int at = base + i * kRowsPerLoad + row;
        const bool is_new = at >= first_new && at <= position;
        if (__any_sync(~0u, is_new)) {
          const int source = is_new ? first_row + at - first_new : first_row;
          const float* heads = phase.qkv + static_cast<int64_t>(source) * phase.qkv_stride + phase.num_heads * kDim;
          float key[8];
          load_rotated(heads + kv_head * kDim, phase.k_norm, is_new ? at : first_new, key);
          const Floats8 value = load8(heads + (phase.num_kv_heads + kv_head) * kDim + column);
          if (is_new) {
            k[i] = pack_bf16(key);
            v[i] = pack_bf16(value.v);
            if (at == position && item.group == 0) {
              keys[i * 32 + lane] = k[i];
              values[i * 32 + lane] = v[i];
            }
          }
        }
      }
    }
    float scores[kItemHeads][kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      float key[8];
      unpack_bf16(k[i], key);
      const int at = base + i * kRowsPerLoad + row;
      const bool is_seen = at >= first && at <= position;
#pragma unroll
      for (int h = 0; h < kItemHeads; ++h) {
        float s = 0;
#pragma unroll
        for (int e = 0; e < 8; ++e) s += q[h][e] * key[e];
        s = lanes_sum<kLanes / 2>(s);
        scores[h][i] = is_seen ? s : -1e30f;
      }
    }
#pragma unroll
    for (int h = 0; h < kItemHeads; ++h) {
      float m = largest[h];
#pragma unroll
      for (int i = 0; i < kLoads; ++i) m = fmaxf(m, scores[h][i]);
      m = lanes_max<16, kLanes>(m);
      const float factor = exp2f(largest[h] - m);
      largest[h] = m;
      total[h] *= factor;
#pragma unroll
      for (int e = 0; e < 8; ++e) o[h][e] *= factor;
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      float value[8];
      unpack_bf16(v[i], value);
      const int at = base + i * kRowsPerLoad + row;
      const bool is_seen = at >= first && at <= position;
#pragma unroll
      for (int h = 0; h < kItemHeads; ++h) {
        const float p = is_seen ? exp2f(scores[h][i] - largest[h]) : 0.0f;
        total[h] += p;
        if (is_seen) {  // what lies in unused slots may be anything
#pragma unroll
          for (int e = 0; e < 8; ++e) o[h][e] += p * value[e];
        }
      }
    }
  }
};
