// Attention of one new token for each of some sequences, from the qkv product to the next matrix's input, where the tokens
// are so few that a block can take a sequence and KV head alone.
//
// Of every 16 cached keys, which are a block of the cache, a warp computes scores and a mean of the values by itself (K Q^T
// and V^T P^T on the tensor cores, so that up to eight query heads are columns). Warps' means are merged in shared memory,
// with the new key and value as one more. So no block waits for another where contexts are short; long ones are cut into
// parts, which the last block of a sequence and head merges. Blocks find the parts themselves, by the positions.
//
// Keys and values of earlier steps need not wait for the kernel before, only their number is counted up in this step, by the
// first kernel. So a block asks for them by the position as it finds it, and looks again when the kernel before has ended.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "async.cuh"
#include "early_launch.cuh"
#include "mma.cuh"

namespace {

constexpr int kWarps = 12, kThreads = 32 * kWarps;  // beside them a block of the next product fits on the multiprocessor
constexpr int kBlockTokens = 16;                    // of the cache
constexpr int kHeads = 8;                           // query heads of a KV head at most
constexpr int kMaxTokens = 64, kMaxParts = 16;
constexpr int kPartBlocks = 2 * kWarps;  // of the cache, in a part at least, where there are several
constexpr int kMaxSplits = 8;

struct RowAttention {
  const void* qkv;  // bfloat16 [tokens, width], or float32 [splits, tokens, width] where there are several
  const float* bias;
  const float *cos, *sin;  // [positions, dim / 2]
  const int32_t *positions, *rows, *table;
  __nv_bfloat16 *keys, *values;  // [blocks, kv_heads, 16, dim]
  float *means, *lse;            // [kMaxParts, tokens, heads, dim], [kMaxParts, tokens, heads]
  uint32_t* counters;            // [tokens, kv_heads], zero before and after
  __half* out;
  int32_t splits, tokens, kv_heads, group, table_stride, padded;
  float scale, inverse;
};

template <int kDim>
struct Shared {
  static constexpr int kSliceBytes = kBlockTokens * kDim * 2, kStride = kDim + 4;  // floats of a head's mean
  union {
    uint8_t slices[2][kSliceBytes];  // keys, values
    float means[kHeads][kStride];
  } warps[kWarps];
  uint8_t queries[kHeads * kDim * 2];
  float raw[kHeads + 2][kDim];  // q, k, v of the product; then k and v as the cache has them
  float largest[kWarps + 1][kHeads], total[kWarps + 1][kHeads];
  int32_t is_last;
};

// 16-byte piece of a row of a slice or of the queries, so that eight rows' pieces lie in different banks.
template <int kDim>
__device__ __forceinline__ uint32_t piece_at(int row, int piece) {
  return row * (kDim * 2) + ((piece ^ (row & 7)) << 4);
}

// 16 bytes that become zeros if not `is_there`.
__device__ __forceinline__ void copy16_or_zeros(uint32_t to, const void* from, bool is_there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(is_there ? 16 : 0) : "memory");
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int kPending>
__device__ __forceinline__ void wait_groups() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// A warp: the first `num_tokens` of a block of the cache, zeros behind them, to a slice. from: of the block and head.
template <int kDim>
__device__ __forceinline__ void load_slice(uint32_t slice, const __nv_bfloat16* from, int num_tokens, int lane) {
  constexpr int kPieces = kDim / 8;
#pragma unroll
  for (int i = 0; i < kBlockTokens * kPieces / 32; ++i) {
    const int n = i * 32 + lane, token = n / kPieces;
    copy16_or_zeros(slice + piece_at<kDim>(token, n % kPieces), from + n * 8, token < num_tokens);
  }
}

// Four columns of a token's row of the product.
__device__ __forceinline__ float4 load_product4(const RowAttention& p, int token, int column, int width) {
  float4 sum = make_float4(0, 0, 0, 0);
  if (p.splits == 1) {
    const uint2 v = __ldcg(reinterpret_cast<const uint2*>(static_cast<const __nv_bfloat16*>(p.qkv) + int64_t(token) * width + column));
    sum = make_float4(__uint_as_float(v.x << 16), __uint_as_float(v.x & 0xffff0000u), __uint_as_float(v.y << 16),
                      __uint_as_float(v.y & 0xffff0000u));
  } else {
    const float* const from = static_cast<const float*>(p.qkv) + int64_t(token) * width + column;
    float4 parts[kMaxSplits];
#pragma unroll
    for (int i = 0; i < kMaxSplits; ++i)
      parts[i] = i < p.splits ? __ldcg(reinterpret_cast<const float4*>(from + int64_t(i) * p.tokens * width)) : sum;
#pragma unroll
    for (int i = 0; i < kMaxSplits; ++i)
      sum = make_float4(sum.x + parts[i].x, sum.y + parts[i].y, sum.z + parts[i].z, sum.w + parts[i].w);
  }
  if (p.bias != nullptr) {
    const float4 bias = *reinterpret_cast<const float4*>(p.bias + column);
    sum = make_float4(sum.x + bias.x, sum.y + bias.y, sum.z + bias.z, sum.w + bias.w);
  }
  return sum;
}

// What a warp knows of its keys: of heads 2 (lane % 4) + e, the largest score (base 2) and the lane's part of the sum; of
// columns 16 i + lane / 4 + 8 r the weighted sum of values at [i][2 r + e].
template <int kDim>
struct Mean {
  float largest[2] = {-INFINITY, -INFINITY}, total[2] = {}, acc[kDim / 16][4] = {};
};

// The keys of a slice: `num_keys` of 16 count. load_keys, load_values: ask for the next slice's, a group of copies each.
template <int kDim, class LoadKeys, class LoadValues>
__device__ __forceinline__ void add_slice(uint32_t keys, uint32_t values, uint32_t queries, int num_keys, float scale, int lane,
                                          Mean<kDim>& mean, LoadKeys load_keys, LoadValues load_values) {
  float c[4] = {};
  wait_groups<1>();
  __syncwarp();
#pragma unroll
  for (int i = 0; i < kDim / 32; ++i) {
    uint32_t b[4];
    load_matrices(queries + piece_at<kDim>(lane % 8, 4 * i + lane / 8), b);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      uint32_t a[4];
      load_matrices(keys + piece_at<kDim>(lane % 16, 4 * i + 2 * j + lane / 16), a);
      mma_bf16(c, a, b[2 * j], b[2 * j + 1]);
    }
  }
  __syncwarp();
  load_keys();
  float shrink[2];
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    c[e] = lane / 4 < num_keys ? c[e] * scale : -INFINITY;
    c[2 + e] = lane / 4 + 8 < num_keys ? c[2 + e] * scale : -INFINITY;
    const float largest = fmaxf(mean.largest[e], lanes_max<16, 4>(fmaxf(c[e], c[2 + e])));
    shrink[e] = exp2f(mean.largest[e] - largest);
    mean.largest[e] = largest;
    c[e] = exp2f(c[e] - largest), c[2 + e] = exp2f(c[2 + e] - largest);
    mean.total[e] = mean.total[e] * shrink[e] + c[e] + c[2 + e];
  }
  const uint32_t b[2] = {transposed(pack2(c[0], c[1])), transposed(pack2(c[2], c[3]))};
  wait_groups<1>();
  __syncwarp();
#pragma unroll
  for (int i = 0; i < kDim / 16; ++i) {
    uint32_t a[4];
    load_transposed(values + piece_at<kDim>(lane % 8 + lane / 16 * 8, 2 * i + lane / 8 % 2), a);
#pragma unroll
    for (int j = 0; j < 4; ++j) mean.acc[i][j] *= shrink[j % 2];
    mma_bf16(mean.acc[i], a, b[0], b[1]);
  }
  __syncwarp();
  load_values();
}

// Where columns c .. c + 3 of a token's row of the tiled form lie, c a multiple of four: c and c + 2 here, the other two eight
// further on.
__device__ __forceinline__ int64_t tiled_place(int token, int c, int padded) {
  const int place = (c & 32) + (c >> 2 & 1) * 16 + (c >> 3 & 3) * 2, piece = place >> 3;
  return (int64_t(c / 64) * padded + token) * 64 + ((piece ^ token & 7) << 3 | place & 7);
}

__device__ __forceinline__ void store_tiled(const RowAttention& p, int token, int column, float4 v) {
  const int64_t to = tiled_place(token, column, p.padded);
  *reinterpret_cast<__half2*>(p.out + to) = __floats2half2_rn(v.x * p.inverse, v.z * p.inverse);
  // The neighbouring piece, whose place differs by the swizzle's lowest bit.
  *reinterpret_cast<__half2*>(p.out + (to ^ 8)) = __floats2half2_rn(v.y * p.inverse, v.w * p.inverse);
}

// A part of a sequence's context for a KV head. The first part's block appends the new key and value.
struct Item {
  int token, head, part;
};

__device__ __forceinline__ int blocks_of(int num_keys) { return (num_keys + kBlockTokens - 1) / kBlockTokens; }

// By its own position alone, so that a sequence's bits do not depend on the others.
__device__ __forceinline__ int parts_of(int position) {
  return min(max(blocks_of(position) / kPartBlocks, 1), kMaxParts);
}

// The blocks of the cache that hold a part of an item's `num_keys` keys, for a warp to load its slices of.
template <int kDim>
struct Blocks {
  const int32_t* table;
  int64_t head_at, stride;
  int first, count, num_keys;

  __device__ __forceinline__ Blocks(const RowAttention& p, const Item& item, int parts, int num_keys)
      : table(p.table + int64_t(p.rows[item.token]) * p.table_stride),
        head_at(int64_t(item.head) * kBlockTokens * kDim),
        stride(int64_t(p.kv_heads) * kBlockTokens * kDim),
        num_keys(num_keys) {
    const int all = blocks_of(num_keys), size = (all + parts - 1) / parts;
    first = item.part * size, count = min(size, all - first);
  }
  __device__ __forceinline__ int64_t place(int block) const { return table[block] * stride + head_at; }
  __device__ __forceinline__ int keys_of(int i) const { return num_keys - (first + i) * kBlockTokens; }
  // A group of copies: the warp's slice i of a cache, or nothing. Its next slice comes into L2 meanwhile.
  __device__ __forceinline__ void load(const __nv_bfloat16* cache, int i, uint32_t slice, int lane) const {
    if (i < count) load_slice<kDim>(slice, cache + place(first + i), keys_of(i), lane);
    if (i + kWarps < count && lane == 0) bulk_prefetch(cache + place(first + i + kWarps), Shared<kDim>::kSliceBytes);
    commit_copies();
  }
};

// A thread's four columns of the product: queries, and (the first part) the new key and value.
template <int kDim>
__device__ __forceinline__ float4 load_own(const RowAttention& p, const Item& item) {
  constexpr int kFours = kDim / 4;
  const int num_heads = p.kv_heads * p.group, width = (num_heads + 2 * p.kv_heads) * kDim;
  const int row = threadIdx.x / kFours;
  if (row >= p.group + (item.part == 0 ? 2 : 0)) return make_float4(0, 0, 0, 0);
  const int head = row < p.group ? item.head * p.group + row : num_heads + (row - p.group) * p.kv_heads + item.head;
  return load_product4(p, item.token, head * kDim + threadIdx.x % kFours * 4, width);
}

// own: `load_own`. cos, sin: of the position, column threadIdx.x % (kDim / 2). The warp's first slice is on its way.
template <int kDim>
__device__ void attend(const RowAttention& p, const Item& item, int position, float4 own, float cos, float sin, Shared<kDim>& s,
                       int warp, int lane) {
  constexpr int kHalf = kDim / 2, kFours = kDim / 4;
  static_assert((kHeads + 2) * kFours <= kThreads && kThreads % kHalf == 0);
  const int num_heads = p.kv_heads * p.group, parts = parts_of(position), rows = p.group + (item.part == 0 ? 2 : 0);
  const Blocks<kDim> cached_blocks(p, item, parts, position);
  const int count = cached_blocks.count;
  const uint32_t slice = shared_address(&s.warps[warp]), values = slice + Shared<kDim>::kSliceBytes;
  if (threadIdx.x / kFours < rows) *reinterpret_cast<float4*>(&s.raw[threadIdx.x / kFours][threadIdx.x % kFours * 4]) = own;
  for (int i = threadIdx.x; i < (kHeads - p.group) * kFours; i += kThreads)
    *reinterpret_cast<uint2*>(s.queries + p.group * kDim * 2 + i * 8) = make_uint2(0, 0);
  __syncthreads();
  const int64_t new_at = rows > p.group ? cached_blocks.place(position / kBlockTokens) + position % kBlockTokens * kDim : 0;
  for (int i = threadIdx.x; i < (p.group + min(rows - p.group, 1)) * kHalf; i += kThreads) {
    const int row = i / kHalf, at = i % kHalf;
    const float a = s.raw[row][at], b = s.raw[row][kHalf + at];
    const float both[2] = {a * cos - b * sin, b * cos + a * sin};
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int column = h * kHalf + at;
      const __nv_bfloat16 v = __float2bfloat16_rn(both[h]);
      if (row < p.group) {
        *reinterpret_cast<__nv_bfloat16*>(s.queries + piece_at<kDim>(row, column / 8) + column % 8 * 2) = v;
      } else {
        p.keys[new_at + column] = v;
        s.raw[row][column] = __bfloat162float(v);
      }
    }
  }
  if (rows > p.group && threadIdx.x < kDim) {
    const __nv_bfloat16 v = __float2bfloat16_rn(s.raw[p.group + 1][threadIdx.x]);
    p.values[new_at + threadIdx.x] = v;
    s.raw[p.group + 1][threadIdx.x] = __bfloat162float(v);
  }
  __syncthreads();

  if (rows > p.group && warp < p.group) {  // the new key's scores
    float score = 0;
#pragma unroll
    for (int i = 0; i < kDim / 32; ++i) {
      const int column = i * 32 + lane;
      const auto* q = reinterpret_cast<const __nv_bfloat16*>(s.queries + piece_at<kDim>(warp, column / 8) + column % 8 * 2);
      score += __bfloat162float(*q) * s.raw[p.group][column];
    }
    score = lanes_sum(score) * p.scale;
    if (lane == 0) s.largest[kWarps][warp] = score, s.total[kWarps][warp] = 1;
  }
  if (warp < count) {
    Mean<kDim> mean;
    for (int i = warp; i < count; i += kWarps) {
      add_slice<kDim>(
          slice, values, shared_address(s.queries), min(cached_blocks.keys_of(i), kBlockTokens), p.scale, lane, mean,
          [&] { cached_blocks.load(p.keys, i + kWarps, slice, lane); }, [&] { cached_blocks.load(p.values, i + kWarps, values, lane); });
    }
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int head = 2 * (lane % 4) + e;
      const float total = lanes_sum<16, 4>(mean.total[e]);
      if (lane < 4) s.largest[warp][head] = mean.largest[e], s.total[warp][head] = total;
#pragma unroll
      for (int i = 0; i < kDim / 16; ++i)
#pragma unroll
        for (int r8 = 0; r8 < 2; ++r8) s.warps[warp].means[head][16 * i + lane / 4 + 8 * r8] = mean.acc[i][2 * r8 + e];
    }
  }
  __syncthreads();

  const int head = threadIdx.x / kFours, column = threadIdx.x % kFours * 4, used = min(count, kWarps);
  const bool is_used = head < p.group;
  const int at_head = item.head * p.group + head;
  float4 mean = make_float4(0, 0, 0, 0);
  if (is_used) {
    const bool is_first = item.part == 0;
    float largest = is_first ? s.largest[kWarps][head] : -INFINITY, total = 0;
    for (int w = 0; w < used; ++w) largest = fmaxf(largest, s.largest[w][head]);
    const auto add = [&](float share, float own, float4 v) {
      total += share * own;
      mean = make_float4(mean.x + share * v.x, mean.y + share * v.y, mean.z + share * v.z, mean.w + share * v.w);
    };
    for (int w = 0; w < used; ++w)
      add(exp2f(s.largest[w][head] - largest), s.total[w][head], *reinterpret_cast<const float4*>(&s.warps[w].means[head][column]));
    if (is_first) add(exp2f(s.largest[kWarps][head] - largest), 1, *reinterpret_cast<const float4*>(&s.raw[p.group + 1][column]));
    const float inverse = 1 / total;
    mean = make_float4(mean.x * inverse, mean.y * inverse, mean.z * inverse, mean.w * inverse);
    if (parts == 1) {
      store_tiled(p, item.token, at_head * kDim + column, mean);
    } else {
      const int64_t at = (int64_t(item.part) * p.tokens + item.token) * num_heads + at_head;
      *reinterpret_cast<float4*>(p.means + at * kDim + column) = mean;
      if (column == 0) p.lse[at] = largest + log2f(total);
    }
  }
  if (parts > 1) {
    __threadfence();
    __syncthreads();
    uint32_t* const counter = p.counters + item.token * p.kv_heads + item.head;
    if (threadIdx.x == 0) s.is_last = atomicAdd(counter, 1) == uint32_t(parts - 1);
    __syncthreads();
    if (s.is_last && is_used) {
      __threadfence();
      float largest = -INFINITY, total = 0;
      const auto place = [&](int part) { return (int64_t(part) * p.tokens + item.token) * num_heads + at_head; };
      for (int part = 0; part < parts; ++part) largest = fmaxf(largest, __ldcg(p.lse + place(part)));
      mean = make_float4(0, 0, 0, 0);
      for (int part = 0; part < parts; ++part) {
        const float share = exp2f(__ldcg(p.lse + place(part)) - largest);
        const float4 v = __ldcg(reinterpret_cast<const float4*>(p.means + place(part) * kDim + column));
        total += share;
        mean = make_float4(mean.x + share * v.x, mean.y + share * v.y, mean.z + share * v.z, mean.w + share * v.w);
      }
      const float inverse = 1 / total;
      store_tiled(p, item.token, at_head * kDim + column, make_float4(mean.x * inverse, mean.y * inverse, mean.z * inverse, mean.w * inverse));
    }
    if (s.is_last && threadIdx.x == 0) *counter = 0;
  }
  __syncthreads();  // before another item
}

template <int kDim>
__global__ void __launch_bounds__(kThreads, 2) attend_rows(const __grid_constant__ RowAttention p) {
  extern __shared__ uint8_t shared[];
  Shared<kDim>& s = *reinterpret_cast<Shared<kDim>*>(shared + (128 - shared_address(shared) % 128) % 128);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, items = p.tokens * p.kv_heads;
  const uint32_t slice = shared_address(&s.warps[warp]);
  if (threadIdx.x == 0) let_next_kernel_start();
  const int block = blockIdx.x;
  const Item first{block / p.kv_heads, block % p.kv_heads, 0};
  int ahead = -1;  // the position by which the first item's slices were asked for
  float cos = 0, sin = 0;
  const auto begin = [&](const Item& item, int position) {
    const Blocks<kDim> blocks(p, item, parts_of(position), position);
    blocks.load(p.keys, warp, slice, lane);
    blocks.load(p.values, warp, slice + Shared<kDim>::kSliceBytes, lane);
    const int64_t at = int64_t(position) * (kDim / 2) + threadIdx.x % (kDim / 2);
    cos = p.cos[at], sin = p.sin[at];
  };
  if (block < items) ahead = *static_cast<const volatile int32_t*>(p.positions + first.token);
  if (ahead >= 0) begin(first, ahead);
  wait_for_kernel_before();
  float4 own{};
  if (block < items) own = load_own<kDim>(p, first);
  // Parts beyond the first come last, of one token after the other.
  int more_of[2];  // of tokens `lane` and `lane + 32`
#pragma unroll
  for (int i = 0; i < 2; ++i)
    more_of[i] = 32 * i + lane < p.tokens ? (parts_of(p.positions[32 * i + lane]) - 1) * p.kv_heads : 0;
  const int more = __reduce_add_sync(~0u, more_of[0] + more_of[1]);
  for (int i = block; i < items + more; i += gridDim.x) {
    Item item{i / p.kv_heads, i % p.kv_heads, 0};
    if (i >= items) {
      int left = i - items, token = 0;
      for (;; ++token) {
        const int own_more = __shfl_sync(~0u, token < 32 ? more_of[0] : more_of[1], token % 32);
        if (left < own_more) break;
        left -= own_more;
      }
      item = {token, left % p.kv_heads, 1 + left / p.kv_heads};
    }
    const bool is_first = i == block && i < items;
    if (!is_first) own = load_own<kDim>(p, item);
    const int position = p.positions[item.token];
    if (position < 0) {
      const int row = threadIdx.x / (kDim / 4), at = (item.head * p.group + row) * kDim + threadIdx.x % (kDim / 4) * 4;
      if (row < p.group) store_tiled(p, item.token, at, make_float4(0, 0, 0, 0));
      continue;
    }
    if (!is_first || position != ahead) {
      wait_groups<0>();
      __syncwarp();
      begin(item, position);
    }
    attend<kDim>(p, item, position, own, cos, sin, s, warp, lane);
  }
  wait_groups<0>();
}

template <int kDim>
cudaError_t run(const RowAttention& p, int blocks, cudaStream_t stream) {
  const auto kernel = attend_rows<kDim>;
  const int bytes = sizeof(Shared<kDim>) + 128;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  return launch_early(kernel, dim3(blocks), kThreads, bytes, p, stream);
}

}  // namespace

// As triton_ops.decode_attention.attend_next, for the tiled form, bfloat16 caches and tokens of different sequences. qkv:
// bfloat16 if there is one split. scale: of scores in base 2. At most 64 tokens, 8 query heads of a KV head; dim: 64 or 128.
extern "C" int peregrine_row_attention(const void* qkv, int splits, const float* bias, const float* cos, const float* sin,
                                       const int32_t* positions, const int32_t* rows, const int32_t* table, int table_stride,
                                       void* keys, void* values, float* means, float* lse, uint32_t* counters, void* out,
                                       int tokens, int padded, int kv_heads, int group, int dim, float scale, float inverse,
                                       int blocks, void* stream) {
  if (tokens > kMaxTokens || group > kHeads || splits > kMaxSplits) return cudaErrorInvalidValue;
  const RowAttention p{qkv, bias, cos, sin, positions, rows, table, static_cast<__nv_bfloat16*>(keys),
                       static_cast<__nv_bfloat16*>(values), means, lse, counters, static_cast<__half*>(out),
                       splits, tokens, kv_heads, group, table_stride, padded, scale, inverse};
  const auto s = static_cast<cudaStream_t>(stream);
  return dim == 128 ? run<128>(p, blocks, s) : dim == 64 ? run<64>(p, blocks, s) : cudaErrorInvalidValue;
}
