// Products of some to some hundred tokens straight from packed weights, on Hopper's tensor cores in float16.
//
// A block computes 128 or 256 rows of the matrix for a tile of tokens, of up to 16 tokens up to 512: 8 or 16 warps unpack
// tiles of 16 rows into registers, which are operand A of their warpgroup's products as they lie there (prompt_wgmma.cuh,
// prompt_narrow.cuh). One warp streams packed units, another one activations through rings in shared memory. So
// weights are read as packed, once for a tile of tokens, and the first of them before the kernel before has ended
// (programmatic dependent launch): they depend on nothing.
//
// Activations: float16 [4 * units][padded tokens][64], 64 columns a line, in the order of the weights' fragments (column
// 8 q + 4 h + 2 i + j of 32 at 16 h + 8 j + 2 q + i), 16-byte pieces swizzled by the token (kernels/prefill.py).
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "early_launch.cuh"
#include "prompt_narrow.cuh"
#include "prompt_wgmma.cuh"

namespace {

constexpr int kMaxRing = 16;
constexpr int kInFlight = 2;  // units of weights that a block waits for
constexpr int kPadding = 4;   // floats behind a token's row of results: no bank conflicts
// Of a multiprocessor's 228 KB a block takes 1 KB more; and barriers, factors, and what aligns the rings.
constexpr int kSharedBytes = (228 - 1 - 4) * 1024, kHalfSharedBytes = (114 - 1 - 3) * 1024;

// Two blocks of 128 rows share a multiprocessor where their accumulators leave room for it.
template <int kWarps, int kTokens>
constexpr int kBlocksOf = kWarps == 8 && kTokens <= 64 ? 2 : 1;

// Products of so few tokens. A block of 16 warps then has up to two tiles a warp, so that each multiprocessor gets as many rows
// of a matrix as the next one.
template <int kTokens>
constexpr bool kIsNarrow = kTokens == kNarrowTokens;
template <int kWarps, int kTokens>
constexpr int kSets = kIsNarrow<kTokens> && kWarps == 16 ? 2 : 1;

// Threads of the warpgroup that streams (and sums up), behind the warps that unpack, to which it gives registers.
constexpr int kStreamers = 128;

struct Prompt {
  Pieces pieces;
  int32_t units, units_per_split, tokens, padded, n, weight_stages, x_stages, is_wide, tiles;
  const uint8_t* x;
  const float* token_scale;  // [tokens]
  void* out;                 // bfloat16 [tokens, n], or (is_wide) float32 [splits, tokens, n]
  float unit, inverse_unit;
  // The product of two pieces, act(gate) * up: then `out` is the next product's x, of n columns, and holds the values times
  // `out_factor`.
  int32_t is_gated, activation;
  float out_factor;
};

template <int kWarps>
__device__ __forceinline__ void consumers_wait() {
  asm volatile("bar.sync 1, %0;" ::"n"(32 * kWarps) : "memory");
}

// One of the block's tiles; of a gated product the first half are gate's, the others the same ones of up.
__device__ __forceinline__ Place place_in_block(const Prompt& p, int i) {
  if (!p.is_gated) return place_of_tile(p.pieces, blockIdx.y * p.tiles + i);
  const int half = p.tiles / 2, tile = blockIdx.y * half + (i < half ? i : i - half);
  const Segment& matrix = p.pieces.segments[i < half ? 0 : 1];
  return {tile < matrix.num_tiles ? &matrix : nullptr, tile};
}

__device__ void stream_weights(const Prompt& p, const Ring& ring, int begin, int end, int lane) {
  const int unit_bytes = p.pieces.segments[0].unit_bytes;
  const Place place = place_in_block(p, min(lane, p.tiles - 1));
  const bool has_tile = lane < p.tiles && place.matrix != nullptr;
  const uint8_t* data = nullptr;
  if (has_tile) data = place.matrix->data + static_cast<int64_t>(place.tile) * p.units * unit_bytes;
  const int bytes = __popc(__ballot_sync(~0u, has_tile)) * unit_bytes;
  Turn turn, landing;
  int landed = 0;
  for (int u = begin; u < end; ++u, turn.next(ring)) {
    // What is asked for beyond memory's pace queues up before the activations; at first, before what the kernels before read.
    const int most = u - begin < ring.stages ? 1 : kInFlight;
    for (; landed < u - begin + 1 - most; ++landed, landing.next(ring)) landing.wait_full(ring);
    if (lane == 0) {
      turn.wait_empty(ring);
      mbarrier_arrive_expect(&ring.full[turn.stage], bytes);
    }
    __syncwarp();
    if (has_tile)
      bulk_copy(turn.data(ring) + lane * unit_bytes, data + static_cast<int64_t>(u) * unit_bytes, unit_bytes,
                &ring.full[turn.stage]);
  }
}

// A stage is a line of the block's tokens, or (narrow) a unit of all tokens.
template <int kTokens>
__device__ void stream_activations(const Prompt& p, const Ring& ring, int begin, int end) {
  constexpr int kStageLines = kIsNarrow<kTokens> ? kLines : 1;
  const int first = blockIdx.x * kTokens, bytes = 128 * min(kTokens, p.padded - first);
  const bool is_whole = p.padded == kTokens;  // all lines of a stage lie one behind the other
  Turn turn;
  for (int line = kLines * begin; line < kLines * end; line += kStageLines, turn.next(ring)) {
    turn.wait_empty(ring);
    mbarrier_arrive_expect(&ring.full[turn.stage], kStageLines * bytes);
    for (int i = 0; i < (is_whole ? 1 : kStageLines); ++i)
      bulk_copy(turn.data(ring) + i * 128 * kTokens, p.x + (static_cast<int64_t>(line + i) * p.padded + first) * 128,
                is_whole ? kStageLines * bytes : bytes, &ring.full[turn.stage]);
  }
}

// What results are multiplied by: read long before, for a trip to memory takes as long as several units.
template <int kWarps, int kTokens>
struct Factors {
  float rows[kSets<kWarps, kTokens> * kWarps * kTileRows], tokens[kTokens];
};

// Writes a block's results [tokens][stride], still without their tokens' scales.
template <int kWarps>
__device__ void store_product(const Prompt& p, const float* results, const float* scales, int stride, int first_token,
                              int num_tokens, int warp, int lane) {
  const int rows = kTileRows * p.tiles;
  const int parts = (rows + 127) / 128;  // of a token's results, one for a warp
  const Segment& last = p.pieces.segments[p.pieces.count - 1];
  const int at_row = warp % parts * 128 + 4 * lane, column = p.pieces.first_rows[0] + blockIdx.y * rows + at_row;
  const int num_columns = min(4, p.pieces.first_rows[p.pieces.count - 1] + last.n - column);
  if (num_columns <= 0 || at_row >= rows || warp >= kWarps / parts * parts) return;
  for (int t = warp / parts; t < num_tokens; t += kWarps / parts) {
    const int token = first_token + t;
    float4 v = *reinterpret_cast<const float4*>(results + t * stride + at_row);
    const float scale = scales[t];
    v = make_float4(v.x * scale, v.y * scale, v.z * scale, v.w * scale);
    const int64_t to = (static_cast<int64_t>(blockIdx.z) * p.tokens + token) * p.n + column;
    if (num_columns < 4 || p.n % 4 != 0) {  // a vocabulary of any size
      const float parts[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (i < num_columns) {
          if (p.is_wide) static_cast<float*>(p.out)[to + i] = parts[i];
          else static_cast<__nv_bfloat16*>(p.out)[to + i] = __float2bfloat16_rn(parts[i]);
        }
    } else if (p.is_wide) {
      *reinterpret_cast<float4*>(static_cast<float*>(p.out) + to) = v;
    } else {
      const __nv_bfloat162 pairs[2] = {__floats2bfloat162_rn(v.x, v.y), __floats2bfloat162_rn(v.z, v.w)};
      *reinterpret_cast<uint2*>(static_cast<__nv_bfloat16*>(p.out) + to) = *reinterpret_cast<const uint2*>(pairs);
    }
  }
}

template <int kWarps>
__device__ void store_gated(const Prompt& p, const float* results, const float* scales, int stride, int first_token,
                            int num_tokens, int warp, int lane) {
  const int half = kTileRows * p.tiles / 2;
  for (int t = warp; t < num_tokens; t += kWarps) {
    const int token = first_token + t;
    const float scale = scales[t];
    const float *gate = results + t * stride, *up = gate + half;
    for (int i = lane; i < half / 2; i += 32) {
      const int c = i / 2 * 4 + i % 2, column = blockIdx.y * half + c;  // and c + 2: neighbours in the order of fragments
      if (column >= p.n) break;
      float v[2];
#pragma unroll
      for (int j = 0; j < 2; ++j)
        v[j] = activate(gate[c + 2 * j] * scale, p.activation) * (up[c + 2 * j] * scale) * p.out_factor;
      const int place = (column & 32) + (column >> 2 & 1) * 16 + (column & 1) * 8 + (column >> 3 & 3) * 2;
      const int64_t line = static_cast<int64_t>(column / 64) * p.padded + token;
      __half* const to = static_cast<__half*>(p.out) + line * 64 + ((place >> 3 ^ token & 7) << 3 | place & 7);
      *reinterpret_cast<__half2*>(to) = __floats2half2_rn(v[0], v[1]);
    }
  }
}

template <class F, int kWarps, int kTokens>
__device__ void consume(const Prompt& p, const Ring& weights, const Ring& x, const Ring& sums, uint8_t* shared,
                        Factors<kWarps, kTokens>& factors, int count, int warp, int lane) {
  constexpr int kOwn = kSets<kWarps, kTokens>;
  const int first_token = blockIdx.x * kTokens, num_tokens = min(kTokens, p.tokens - first_token);
  int at[kOwn], own = kOwn;  // where the warp's tiles lie in a stage; how many its warpgroup has
  if constexpr (kOwn > 1) own = (p.tiles - warp / 4 * 4 + kWarps - 1) / kWarps;
#pragma unroll
  for (int set = 0; set < kOwn; ++set) {
    const int i = kWarps * set + warp;
    const Place place = i < p.tiles ? place_in_block(p, i) : Place{nullptr, 0};
    at[set] = min(i, p.tiles - 1) * p.pieces.segments[0].unit_bytes;
    if (lane >= kTileRows) continue;
    float* const to = &factors.rows[i * kTileRows + lane];
    if (place.matrix != nullptr) copy4_async(to, place.matrix->row_factor + place.tile * kTileRows + lane);
    else *to = 0;
  }
  Turn().wait_full(x);  // then the kernel before has ended
  for (int t = warp * 32 + lane; t < num_tokens; t += 32 * kWarps) copy4_async(&factors.tokens[t], p.token_scale + first_token + t);
  float acc[kOwn][kTokens / 2] = {};
  if constexpr (kIsNarrow<kTokens>) accumulate_narrow<F>(weights, x, sums, count, at, own, p.inverse_unit, lane, acc);
  else accumulate_wgmma<F, kTokens>(weights, x, count, at[0], __float2half2_rn(p.inverse_unit), lane, acc[0]);
  wait_for_kernel_before();
  wait_copies();
  consumers_wait<kWarps>();  // nobody reads the rings any more; all that was asked for has come
  float* const results = reinterpret_cast<float*>(shared);
  const int stride = kTileRows * p.tiles + kPadding;
#pragma unroll
  for (int set = 0; set < kOwn; ++set) {
    const int i = kWarps * set + warp;
    if (i >= p.tiles) break;
#pragma unroll
    for (int r8 = 0; r8 < 2; ++r8) {
      const int row = i * kTileRows + lane / 4 + 8 * r8;
      const float scale = factors.rows[row] * p.unit;
#pragma unroll
      for (int j = 0; j < kTokens / 8; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e)
          results[(8 * j + 2 * (lane % 4) + e) * stride + row] = acc[set][4 * j + 2 * r8 + e] * scale;
    }
  }
  consumers_wait<kWarps>();
  if (!p.is_gated) store_product<kWarps>(p, results, factors.tokens, stride, first_token, num_tokens, warp, lane);
  else store_gated<kWarps>(p, results, factors.tokens, stride, first_token, num_tokens, warp, lane);
}

template <class F, int kWarps, int kTokens>
__global__ void __launch_bounds__(32 * kWarps + kStreamers, kBlocksOf<kWarps, kTokens>)
    prompt_matmul(const __grid_constant__ Prompt p) {
  extern __shared__ uint8_t shared[];
  __shared__ uint64_t barriers[5][kMaxRing];
  __shared__ Factors<kWarps, kTokens> factors;
  uint8_t* const data = shared + (1024 - shared_address(shared) % 1024) % 1024;
  constexpr int kXStage = kIsNarrow<kTokens> ? kXUnitBytes : 128 * kTokens;
  const Ring weights{data + p.x_stages * kXStage, barriers[0], barriers[1], p.weight_stages,
                     p.tiles * p.pieces.segments[0].unit_bytes};
  // A narrow block's warps are done with a unit's activations when they are done with its weights.
  const Ring x{data, barriers[2], kIsNarrow<kTokens> ? weights.empty : barriers[3], p.x_stages, kXStage};
  const Ring sums{weights.data + p.weight_stages * weights.stage_bytes, barriers[4], weights.empty, p.weight_stages,
                  kIsNarrow<kTokens> ? kSumsBytes<F> : 0};
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int begin = blockIdx.z * p.units_per_split, end = min(begin + p.units_per_split, p.units);
  if (threadIdx.x == 0) {
    let_next_kernel_start();
    for (int i = 0; i < x.stages; ++i) mbarrier_init(&x.full[i], 1), mbarrier_init(&x.empty[i], kWarps * kWarpArrivals);
    for (int i = 0; i < sums.stages; ++i) mbarrier_init(&sums.full[i], kWarpArrivals);
    for (int i = 0; i < weights.stages; ++i) mbarrier_init(&weights.full[i], 1), mbarrier_init(&weights.empty[i], kWarps * kWarpArrivals);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  constexpr bool kIsPaired = kBlocksOf<kWarps, kTokens> == 2;
  if (warp >= kWarps) {
    if constexpr (kIsNarrow<kTokens>) asm volatile("setmaxnreg.dec.sync.aligned.u32 64;");
    else if constexpr (kWarps == 16) asm volatile("setmaxnreg.dec.sync.aligned.u32 32;");
    else if constexpr (kIsPaired) asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
    if (warp == kWarps) {
      stream_weights(p, weights, begin, end, lane);
    } else if (warp == kWarps + 1 && lane == 0) {
      wait_for_kernel_before();
      stream_activations<kTokens>(p, x, begin, end);
    } else if (kIsNarrow<kTokens> && warp == kWarps + 2) {
      if constexpr (kIsNarrow<kTokens>) sum_activations<F>(x, sums, end - begin, lane);
    }
  } else {
    if constexpr (kIsNarrow<kTokens> && kIsPaired) asm volatile("setmaxnreg.inc.sync.aligned.u32 88;");
    else if constexpr (kIsNarrow<kTokens>) asm volatile("setmaxnreg.inc.sync.aligned.u32 104;");
    else if constexpr (kWarps == 16) asm volatile("setmaxnreg.inc.sync.aligned.u32 112;");
    else if constexpr (kIsPaired) asm volatile("setmaxnreg.inc.sync.aligned.u32 104;");
    consume<F, kWarps, kTokens>(p, weights, x, sums, data, factors, end - begin, warp, lane);
  }
}

template <class F, int kWarps, int kTokens>
cudaError_t run(Prompt p, int splits, cudaStream_t stream) {
  constexpr int kLine = 128 * kTokens, kRoom = kBlocksOf<kWarps, kTokens> == 2 ? kHalfSharedBytes : kSharedBytes;
  constexpr int kBeside = sizeof(Factors<kWarps, kTokens>) + 5 * kMaxRing * sizeof(uint64_t) + 1024;
  static_assert(kBlocksOf<kWarps, kTokens> * (kRoom + kBeside + 1024) <= 228 * 1024, "the blocks do not fit");
  const int unit = p.tiles * p.pieces.segments[0].unit_bytes;
  int sums = 0;
  if constexpr (kIsNarrow<kTokens>) {
    p.x_stages = p.weight_stages = std::min(kMaxRing, kRoom / (unit + kXUnitBytes + kSumsBytes<F>));
    sums = p.weight_stages * kSumsBytes<F>;
  } else {  // weights one unit further ahead: they come from memory, activations from L2
    p.weight_stages = std::min({kMaxRing, kRoom / (unit + kLines * kLine) + 1, (kRoom - kLines * kLine) / unit});
    p.x_stages = std::min(kMaxRing, (kRoom - p.weight_stages * unit) / kLine);
  }
  constexpr int kXStage = kIsNarrow<kTokens> ? kXUnitBytes : kLine;
  const int bytes = p.weight_stages * unit + p.x_stages * kXStage + sums + 1024;
  const auto kernel = prompt_matmul<F, kWarps, kTokens>;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  int tiles = 0;
  for (int i = 0; i < p.pieces.count; ++i) tiles += p.pieces.segments[i].num_tiles;
  const dim3 grid((p.tokens + kTokens - 1) / kTokens, (tiles + p.tiles - 1) / p.tiles, splits);
  return launch_early(kernel, grid, 32 * kWarps + kStreamers, bytes, p, stream);
}

}  // namespace

// padded: tokens of x, a multiple of 8. tile: tokens of a block (16, 32, 64 or 128); rows: of a block, 128 or 256, or for tiles
// of 16, which take all tokens, any multiple of 16 from 128 to 512. No split is empty. Gated: one split, two
// pieces of n rows, of both of which a block has as many.
extern "C" int peregrine_prompt(const Pieces* pieces, int units, int tokens, int padded, int tile, int rows, int n,
                                int splits, int is_wide, const void* x, const float* token_scale, void* out, float unit,
                                int is_gated, int activation, float out_factor, void* stream) {
  const Prompt p{*pieces, units, (units + splits - 1) / splits, tokens, padded, n, 0, 0, is_wide, rows / kTileRows,
                 static_cast<const uint8_t*>(x), token_scale, out, unit, 1 / unit,
                 is_gated, activation, out_factor};
  cudaError_t error = cudaErrorInvalidValue;
  if ((splits - 1) * p.units_per_split >= units) return error;
  const bool is_narrow = padded <= 16 && rows >= 128 && rows <= 512 && rows % kTileRows == 0;
  const bool fits = tile == 16 ? is_narrow : rows == 128 || rows == 256;
  if (!fits || (is_gated && (splits > 1 || pieces->count != 2 || rows % 32 != 0))) return error;
  with_format(pieces->segments[0].format, [&](auto f) {
    using F = decltype(f);
    const auto s = static_cast<cudaStream_t>(stream);
    const bool is_half = rows <= 128;
    if (tile == 16) error = is_half ? run<F, 8, 16>(p, splits, s) : run<F, 16, 16>(p, splits, s);
    if (tile == 32) error = is_half ? run<F, 8, 32>(p, splits, s) : run<F, 16, 32>(p, splits, s);
    if (tile == 64) error = is_half ? run<F, 8, 64>(p, splits, s) : run<F, 16, 64>(p, splits, s);
    if (tile == 128) error = is_half ? run<F, 8, 128>(p, splits, s) : run<F, 16, 128>(p, splits, s);
  });
  return error;
}
