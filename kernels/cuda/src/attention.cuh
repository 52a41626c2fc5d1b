// Attention of one step over the paged cache: rotary embedding, append, split-KV with grouped queries.
//
// An item is (token, key-value head, up to eight of its query heads, 64 or 128 columns of the values, split of the
// context). Where a split ends depends on the token's position alone, so that a token's result does not depend on
// its batch. The producer streams an item's KV blocks through the ring like weights; this step's own keys and values
// are put in their places there. Products run on the tensor cores in bfloat16, queries and probabilities as a sum
// of two numbers each (rows g and g + 8 of operand A). The last block to finish a split of a head combines them in
// their order (flash decoding, Dao et al. 2023).
//
// The cache is bfloat16, or (kFp8) e4m3 codes with an exponent for each token (kernels/kv_cache.py), which become
// bfloat16 when they are read: exactly. Scores and probabilities take the powers of two, to the same bits.
#pragma once

#include <cuda_bf16.h>

#include "activations.cuh"
#include "async.cuh"
#include "fp8_cache.cuh"
#include "program.h"
#include "mma.cuh"

constexpr int kBlockTokens = 16;
constexpr int kLogSplitTokens = 8;  // short contexts stay whole: combining costs more than it saves
constexpr int kMaxSplits = 64;
constexpr int kItemHeads = 8;
constexpr int kConsumers = 32 * kWarps;
constexpr int kConsumerBarrier = 1;

// Where a step's tokens are: Step's arrays, in shared memory.
struct Rows {
  int32_t positions[kMaxTokens], sequences[kMaxTokens], first_rows[kMaxTokens];
};

struct Item {
  int token, position;
  int first;           // first key that is seen
  int begin, end;      // keys of the split
  int split, splits, kv_head, group, half, slot;

  __device__ int first_block() const { return max(begin, first) / kBlockTokens; }
  __device__ int num_blocks() const { return (end + kBlockTokens - 1) / kBlockTokens - first_block(); }
};

// KV blocks of a stage of the ring, at most 32 KB.
__host__ __device__ constexpr int blocks_per_stage(int head_dim) { return 512 / head_dim; }

// Columns of the values in an item: 64 spread a few tokens over more blocks, 128 save reading the keys twice.
__device__ __forceinline__ int item_columns(const AttentionPhase& phase, const Step& step) {
  const int items = step.num_tokens * phase.num_kv_heads * phase.groups * (phase.head_dim / 64);
  return phase.head_dim == 64 || items <= static_cast<int>(gridDim.x) ? 64 : 128;
}

// fn(item): this block's items, one after the other. All lanes of a warp call it: each looks at one token, so that the
// time does not grow with the tokens.
template <class Fn>
__device__ __forceinline__ void for_each_item(const AttentionPhase& phase, const Step& step, const Rows& rows, Fn fn) {
  const int lane = threadIdx.x % 32, groups = phase.groups;
  const int log_halves = __ffs(phase.head_dim) - __ffs(item_columns(phase, step));  // all of these are powers of two
  const int heads = phase.num_kv_heads * groups << log_halves;
  const auto log_size_of = [](int position) {
    int log_size = kLogSplitTokens;
    while (kMaxSplits << log_size < position + 1) ++log_size;
    return log_size;
  };
  const auto first_of = [&](int position) { return phase.window > 0 ? max(0, position + 1 - phase.window) : 0; };
  const int my_position = lane < step.num_tokens ? rows.positions[lane] : -1;
  int count = 0;
  if (my_position >= 0) {
    const int log_size = log_size_of(my_position);
    count = heads * ((my_position >> log_size) + 1 - (first_of(my_position) >> log_size));
  }
  int end = count;
#pragma unroll
  for (int step = 1; step < kMaxTokens; step *= 2) {
    const int before = __shfl_up_sync(~0u, end, step);
    if (lane >= step) end += before;
  }
  const int total = __shfl_sync(~0u, end, kMaxTokens - 1);
#pragma unroll 1
  for (int index = blockIdx.x; index < total; index += gridDim.x) {
    const int token = __popc(__ballot_sync(~0u, lane < kMaxTokens && end <= index));
    const int position = __shfl_sync(~0u, my_position, token), first = first_of(position);
    const int log_size = log_size_of(position), first_split = first >> log_size;
    const int splits = (position >> log_size) + 1 - first_split;
    // Divisions take long; mostly there is nothing to divide.
    int split = 0, head = index - __shfl_sync(~0u, end - count, token), group = 0;
    if (splits > 1) split = head % splits, head /= splits;
    int kv_head = head >> log_halves;
    if (groups > 1) group = kv_head % groups, kv_head /= groups;
    const int begin = (first_split + split) << log_size;
    fn(Item{token, position, first, begin, min(begin + (1 << log_size), position + 1), split, splits, kv_head, group,
            head & ((1 << log_halves) - 1), token * heads + head});
  }
}

__device__ __forceinline__ int64_t block_origin(const AttentionPhase& phase, int64_t block, int kv_head) {
  return (block * phase.num_kv_heads + kv_head) * kBlockTokens * phase.head_dim;
}

// Of a head's tokens in a block, keys or values.
template <bool kFp8>
__host__ __device__ constexpr int head_bytes(int head_dim) {
  return kFp8 ? kBlockTokens * (head_dim + 1) : kBlockTokens * head_dim * 2;
}

template <bool kFp8>
__device__ __forceinline__ int64_t head_origin(const AttentionPhase& phase, int64_t block, int kv_head) {
  if constexpr (kFp8) return (block * phase.num_kv_heads + kv_head) * head_bytes<true>(phase.head_dim);
  else return block_origin(phase, block, kv_head) * 2;
}

__device__ __forceinline__ uint4 pack8(const Floats8& x) {
  return make_uint4(pack2(x.v[0], x.v[1]), pack2(x.v[2], x.v[3]), pack2(x.v[4], x.v[5]), pack2(x.v[6], x.v[7]));
}

__device__ __forceinline__ float rounded(float v) { return __bfloat162float(__float2bfloat16_rn(v)); }

template <int kDim, int kColumns, bool kFp8>
struct SplitAttention {
  using Eight = std::conditional_t<kFp8, Codes8, uint4>;  // columns of a key or value, as the cache has them
  static constexpr int kHeadBytes = head_bytes<kFp8>(kDim);
  static constexpr int kLanes = kDim / 8;               // lanes of a head, eight columns each
  static constexpr int kOwn = kColumns / 8;             // columns of the values that a lane's row of operand B holds
  static constexpr int kQueryStride = kDim + 8;         // bfloat16: rows fall on different banks
  static constexpr int kPartStride = kColumns + 2;

  const AttentionPhase& phase;
  const Step& step;
  const Rows& rows;            // shared
  __nv_bfloat16* queries;      // shared: [16][kQueryStride]
  float* parts;                // shared: [warps][kItemHeads][kPartStride]
  int* flag;                   // shared
  uint32_t odd_launches;       // see mark_of
  int warp, lane, column;

  __device__ SplitAttention(const AttentionPhase& phase, const Step& step, const Rows& rows, uint8_t* room, int* flag,
                            uint32_t odd_launches, int warp, int lane)
      : phase(phase), step(step), rows(rows), queries(reinterpret_cast<__nv_bfloat16*>(room)),
        parts(reinterpret_cast<float*>(room + 16 * kQueryStride * 2)), flag(flag), odd_launches(odd_launches),
        warp(warp), lane(lane), column(8 * (lane % kLanes)) {}

  struct Rotary {
    Floats8 cos, sin;
  };

  __device__ Rotary load_rotary(int position) const {
    const int64_t at = static_cast<int64_t>(position) * (kDim / 2) + column % (kDim / 2);
    return {load8(phase.cos + at), load8(phase.sin + at)};
  }

  // RMSNorm over a head where there is one, then the rotation; every group of kLanes lanes holds a whole head.
  __device__ Floats8 rotate(Floats8 x, const float* norm, const Rotary& rotary) const {
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
    const float sign = lane % kLanes < kLanes / 2 ? -1.0f : 1.0f;
    Floats8 result;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float other = __shfl_xor_sync(~0u, x.v[i], kLanes / 2);
      result.v[i] = x.v[i] * rotary.cos.v[i] + sign * other * rotary.sin.v[i];
    }
    return result;
  }

  // ring: next() waits for a stage, release() frees it. Returns it as it is after the phase's stages.
  template <class Ring>
  __device__ __noinline__ Ring run(Ring ring) {
    for_each_item(phase, step, rows, [&](const Item& item) { one_item(item, ring); });
    // Rows of padding: the next phase waits for these as well.
    for (int token = blockIdx.x; token < step.num_tokens; token += gridDim.x)
      if (rows.positions[token] < 0)
        for (int i = warp * 32 + lane; i < phase.num_heads * kDim; i += kConsumers)
          store_marked(phase.out + token * phase.out_stride + place_of(i), 0.0f,
                       mark_of(phase.out_marks, odd_launches, token));
    return ring;
  }

  template <class Ring>
  __device__ void one_item(const Item& item, Ring& ring) {
    const int num_heads = min(kItemHeads, phase.heads_per_kv - item.group * kItemHeads);
    const int first_head = item.kv_head * phase.heads_per_kv + item.group * kItemHeads;
    const uint32_t mark = mark_of(phase.qkv_marks, odd_launches, item.token);
    const int first_row = rows.first_rows[item.token], first_new = rows.positions[first_row];
    const float* own = phase.qkv + item.token * phase.qkv_stride;
    const float* own_head = own + place_of((first_head + min(warp, num_heads - 1)) * kDim + column);
    const float* own_key = own + place_of((phase.num_heads + item.kv_head) * kDim + column);
    const float* own_value = own + place_of((phase.num_heads + phase.num_kv_heads + item.kv_head) * kDim + column);
    const int64_t block = step.block_table[rows.sequences[item.token] * step.block_table_stride + item.position / kBlockTokens];
    // One round trip to L2: a head of the queries by each warp, and the token's own key and value.
    const Rotary rotary = load_rotary(item.position);
    const Floats8 head_ahead = load_marked8(own_head), k_ahead = load_marked8(own_key), v_ahead = load_marked8(own_value);
    const Floats8 head = settle(head_ahead, own_head, mark);
    const Floats8 own_k = settle(k_ahead, own_key, mark), own_v = settle(v_ahead, own_value, mark);
    Floats8 q = rotate(head, phase.q_norm, rotary), low;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      q.v[i] = warp < num_heads ? q.v[i] * phase.scale * 1.44269504f : 0.0f;
      low.v[i] = q.v[i] - rounded(q.v[i]);
    }
    if (lane < kLanes) {
      *reinterpret_cast<uint4*>(queries + warp * kQueryStride + column) = pack8(q);
      *reinterpret_cast<uint4*>(queries + (warp + 8) * kQueryStride + column) = pack8(low);
    }
    const Eight new_key = pack(rotate(own_k, phase.k_norm, rotary)), new_value = pack(own_v);
    named_barrier(kConsumerBarrier, kConsumers);

    float o[kColumns / 8][4] = {}, largest = -1e30f, total = 0;
    const int first_block = item.first_block(), num_blocks = item.num_blocks();
    for (int begin = 0; begin < num_blocks; begin += blocks_per_stage(kDim)) {
      const int count = min(blocks_per_stage(kDim), num_blocks - begin);
      uint8_t* stage = ring.next(count * 2 * kHeadBytes);
      for (int i = 0; i < count; ++i) {
        if ((begin + i) % kWarps != warp) continue;
        uint8_t* keys = stage + i * 2 * kHeadBytes;
        uint8_t* values = keys + kHeadBytes;
        const int base = (first_block + begin + i) * kBlockTokens;
        if (base + kBlockTokens > first_new) {
          complete(item, base, first_row, first_new, new_key, new_value, keys, values);
          proxy_fence();  // the ring's next copy comes after these stores
        }
        one_block(item, base, keys, values, o, largest, total);
      }
      ring.release();
    }
    if (warp == 0 && item.split + 1 == item.splits && item.group == 0 && item.half == 0) append(item, block, new_key, new_value);
    write_part(o, largest, total);
    named_barrier(kConsumerBarrier, kConsumers);
    merge(item, num_heads, phase.out + item.token * phase.out_stride, first_head * kDim + item.half * kColumns);
    named_barrier(kConsumerBarrier, kConsumers);  // queries, parts and flag are free again
  }

  __device__ __forceinline__ Eight pack(const Floats8& x) const {
    if constexpr (kFp8) return to_codes<kLanes>(x);
    else return pack8(x);
  }

  // The token's own key and value into the cache.
  __device__ void append(const Item& item, int64_t block, const Eight& key, const Eight& value) const {
    if constexpr (kFp8) {
      const int64_t origin = head_origin<true>(phase, block, item.kv_head);
      put(static_cast<uint8_t*>(phase.k_cache) + origin, item.position % kBlockTokens, key);
      put(static_cast<uint8_t*>(phase.v_cache) + origin, item.position % kBlockTokens, value);
      return;
    }
    const int64_t at = block_origin(phase, block, item.kv_head) + item.position % kBlockTokens * kDim + column;
    if constexpr (!kFp8)
      if (lane < kLanes) {
        *reinterpret_cast<uint4*>(static_cast<__nv_bfloat16*>(phase.k_cache) + at) = key;
        *reinterpret_cast<uint4*>(static_cast<__nv_bfloat16*>(phase.v_cache) + at) = value;
      }
  }

  // A token's codes and exponent into a head's tokens of a block.
  __device__ void put(uint8_t* head, int token, const Codes8& x) const {
    if (lane < kLanes) *reinterpret_cast<uint2*>(head + token * kDim + column) = x.codes;
    if (lane == 0) head[kBlockTokens * kDim + token] = x.exponent;
  }

  // This step's keys and values into a block in shared memory; rows beyond the token become zero, since what lies
  // there may be anything, also NaN.
  __device__ void complete(const Item& item, int base, int first_row, int first_new, const Eight& new_key,
                           const Eight& new_value, uint8_t* keys, uint8_t* values) const {
    for (int at = max(base, first_new); at < base + kBlockTokens; ++at) {
      Eight k = new_key, v = new_value;
      if (at < item.position) {  // another token of the same sequence
        const int source = first_row + at - first_new;
        const float* of_token = phase.qkv + source * phase.qkv_stride;
        const int key = (phase.num_heads + item.kv_head) * kDim + column;
        const uint32_t mark = mark_of(phase.qkv_marks, odd_launches, source);
        k = pack(rotate(read_marked8(of_token + place_of(key), mark), phase.k_norm, load_rotary(at)));
        v = pack(read_marked8(of_token + place_of(key + phase.num_kv_heads * kDim), mark));
      } else if (at > item.position) {
        k = v = Eight{};
      }
      if constexpr (kFp8) {
        put(keys, at - base, k), put(values, at - base, v);
        continue;
      }
      const int byte = (at - base) * kDim * 2 + column * 2;
      if constexpr (!kFp8)
        if (lane < kLanes) {
          *reinterpret_cast<uint4*>(keys + byte) = k;
          *reinterpret_cast<uint4*>(values + byte) = v;
        }
    }
    __syncwarp();
  }

  // Eight columns in shared memory, bfloat16.
  __device__ __forceinline__ uint4 eight_of(const uint8_t* at) const {
    if constexpr (kFp8) return from_codes(*reinterpret_cast<const uint2*>(at));
    else return *reinterpret_cast<const uint4*>(at);
  }

  struct Scales {
    float keys[2][2], values[2][2];  // of keys 8 n + 2 q + e of a block
  };

  __device__ __forceinline__ Scales load_scales(const uint8_t* keys, const uint8_t* values) const {
    Scales scales;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const int at = kBlockTokens * kDim + 8 * n + 2 * (lane % 4);
      const uint32_t of_keys = *reinterpret_cast<const uint16_t*>(keys + at);
      const uint32_t of_values = *reinterpret_cast<const uint16_t*>(values + at);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        scales.keys[n][e] = power(of_keys >> 8 * e & 255);
        scales.values[n][e] = power(of_values >> 8 * e & 255);
      }
    }
    return scales;
  }

  // Sixteen keys and values, online softmax. Lane (g, q) = lane / 4, lane % 4: its row of operand A is head g (and
  // the head's low part), of operand B key or column group g; columns of both products are permuted so that a lane
  // reads 16 bytes at a time.
  __device__ void one_block(const Item& item, int base, const uint8_t* keys, const uint8_t* values,
                            float (&o)[kColumns / 8][4], float& largest, float& total) const {
    const int g = lane / 4, q = lane % 4;
    float s[2][4] = {};
#pragma unroll 1  // here and below: this code runs once a layer, and fetching instructions is what it waits for
    for (int i = 0; i < kDim / 32; ++i) {
      const int chunk = 4 * i + q;  // of 8 columns
      const uint4 high = *reinterpret_cast<const uint4*>(queries + g * kQueryStride + 8 * chunk);
      const uint4 low = *reinterpret_cast<const uint4*>(queries + (g + 8) * kQueryStride + 8 * chunk);
      const uint32_t first[4] = {high.x, low.x, high.y, low.y}, second[4] = {high.z, low.z, high.w, low.w};
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const uint4 k = eight_of(keys + (8 * n + g) * (kFp8 ? kDim : kDim * 2) + (kFp8 ? 8 : 16) * chunk);
        mma_bf16(s[n], first, k.x, k.y);
        mma_bf16(s[n], second, k.z, k.w);
      }
    }
    Scales scales;
    if constexpr (kFp8) {
      scales = load_scales(keys, values);
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) s[n][e] *= scales.keys[n][e % 2];
    }
    float p[2][2], new_largest = largest;
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int at = base + 8 * n + 2 * q + e;
        p[n][e] = at >= item.first && at <= item.position ? s[n][e] + s[n][2 + e] : -1e30f;
        new_largest = fmaxf(new_largest, p[n][e]);
      }
    new_largest = lanes_max<2>(new_largest);
    const float factor = exp2f(largest - new_largest);
    largest = new_largest;
    total *= factor;
    uint32_t a[4];
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        p[n][e] = p[n][e] > -1e29f ? exp2f(p[n][e] - largest) : 0.0f;
        total += p[n][e];
        if constexpr (kFp8) p[n][e] *= scales.values[n][e];
      }
      a[2 * n] = pack2(p[n][0], p[n][1]);
      a[2 * n + 1] = pack2(p[n][0] - rounded(p[n][0]), p[n][1] - rounded(p[n][1]));
    }
#pragma unroll
    for (int t = 0; t < kColumns / 8; ++t)
#pragma unroll
      for (int e = 0; e < 4; ++e) o[t][e] *= factor;
    // Column g * kOwn + t of the values is row g of operand B in product t.
#pragma unroll
    for (int part = 0; part < kOwn / 8; ++part) {
      uint32_t v[4][4];
#pragma unroll
      for (int r = 0; r < 4; ++r) {  // keys 2 q, 2 q + 1, 2 q + 8, 2 q + 9
        const int row = 2 * q + (r % 2) + 8 * (r / 2);
        const int column = item.half * kColumns + g * kOwn + 8 * part;
        const uint4 raw = eight_of(values + (kFp8 ? row * kDim + column : row * kDim * 2 + column * 2));
        v[r][0] = raw.x, v[r][1] = raw.y, v[r][2] = raw.z, v[r][3] = raw.w;
      }
#pragma unroll
      for (int t = 0; t < 8; ++t) {
        const int selector = t % 2 == 0 ? 0x5410 : 0x7632;
        mma_bf16(o[8 * part + t], a, __byte_perm(v[0][t / 2], v[1][t / 2], selector),
                 __byte_perm(v[2][t / 2], v[3][t / 2], selector));
      }
    }
  }

  __device__ void write_part(const float (&o)[kColumns / 8][4], float largest, float total) const {
    const int g = lane / 4, q = lane % 4;
    float* mine = parts + (warp * kItemHeads + g) * kPartStride;
    total = lanes_sum<2>(total);
#pragma unroll
    for (int e = 0; e < 2; ++e)
#pragma unroll
      for (int t = 0; t < kColumns / 8; ++t) mine[(2 * q + e) * kOwn + t] = o[t][e] + o[t][2 + e];
    if (q == 0) mine[kColumns] = largest, mine[kColumns + 1] = total;
  }

  // Warps in their order, then splits in theirs.
  __device__ void merge(const Item& item, int num_heads, float* out, int first_column) const {
    const uint32_t mark = mark_of(phase.out_marks, odd_launches, item.token);
    const int64_t slot = static_cast<int64_t>(item.slot) * kMaxSplits + item.split;
    for (int i = warp * 32 + lane; i < num_heads * kColumns; i += kConsumers) {
      const int head = i / kColumns, column = i % kColumns;
      const float* part = parts + head * kPartStride;
      float m = -1e30f, l = 0, v = 0;
#pragma unroll 2
      for (int w = 0; w < kWarps; ++w) m = fmaxf(m, part[w * kItemHeads * kPartStride + kColumns]);
#pragma unroll 2
      for (int w = 0; w < kWarps; ++w) {
        const float* of_warp = part + w * kItemHeads * kPartStride;
        const float factor = exp2f(of_warp[kColumns] - m);
        l += of_warp[kColumns + 1] * factor;
        v += of_warp[column] * factor;
      }
      if (item.splits == 1) {
        store_marked(out + place_of(first_column + head * kDim + column), v / l, mark);
      } else {
        step.split_out[(slot * kItemHeads + head) * kColumns + column] = v;
        if (column == 0) {
          step.split_lse[(slot * kItemHeads + head) * 2] = m;
          step.split_lse[(slot * kItemHeads + head) * 2 + 1] = l;
        }
      }
    }
    if (item.splits == 1) return;
    named_barrier(kConsumerBarrier, kConsumers);
    if (warp == 0 && lane == 0) {
      __threadfence();
      const bool is_last = atomicAdd(step.split_count + item.slot, 1u) == static_cast<uint32_t>(item.splits - 1);
      if (is_last) step.split_count[item.slot] = 0;
      __threadfence();
      *flag = is_last;
    }
    named_barrier(kConsumerBarrier, kConsumers);
    if (*flag) combine(item, slot - item.split, num_heads, out, first_column);
  }

  __device__ void combine(const Item& item, int64_t first_slot, int num_heads, float* out, int first_column) const {
    const uint32_t mark = mark_of(phase.out_marks, odd_launches, item.token);
    for (int i = warp * 32 + lane; i < num_heads * kColumns; i += kConsumers) {
      const int head = i / kColumns, column = i % kColumns;
      const float* lse = step.split_lse + (first_slot * kItemHeads + head) * 2;
      const float* from = step.split_out + (first_slot * kItemHeads + head) * kColumns + column;
      float m = -1e30f, l = 0, v = 0;
#pragma unroll 4
      for (int s = 0; s < item.splits; ++s) m = fmaxf(m, __ldcg(lse + s * kItemHeads * 2));
#pragma unroll 4
      for (int s = 0; s < item.splits; ++s) {
        const float factor = exp2f(__ldcg(lse + s * kItemHeads * 2) - m);
        l += __ldcg(lse + s * kItemHeads * 2 + 1) * factor;
        v += __ldcg(from + s * kItemHeads * kColumns) * factor;
      }
      store_marked(out + place_of(first_column + head * kDim + column), v / l, mark);
    }
  }
};
