// Products of some hundred tokens and more straight from packed weights, in e4m3 on Hopper's tensor cores.
//
// A block computes 128 rows of the matrix for a tile of up to 256 tokens: two warpgroups unpack 64 rows each into registers,
// which are operand A as they lie there, while the tensor cores multiply what they unpacked before (3.6 instructions a weight
// and tile of tokens). One warp streams packed units, another one activations through rings in shared memory. So weights are
// never written unpacked.
//
// Two blocks, one above the other, are a cluster: each fetches half of the activations that both need and sends them to both.
// Alone, a block would ask L2 for 40 bytes a cycle, which is more than there are.
//
// Activations: e4m3 [2 * units][padded tokens][128], 128 columns a line, in the order of the weights' fragments (column
// 8 q + 4 h + 2 i + j of 32 at 16 h + 4 q + 2 j + i), 16-byte pieces swizzled by the token (kernels/prefill.py).
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "cluster.cuh"
#include "early_launch.cuh"
#include "prompt_wgmma.cuh"
#include "wgmma_e4m3.cuh"

namespace {

constexpr int kTiles = 8, kRows = kTiles * kTileRows, kBlocks = 2;  // of a block; of a cluster
constexpr int kMaxRing = 8;
constexpr int kLineColumns = 128, kUnitLines = kUnitColumns / kLineColumns;
constexpr int kStride = kRows + 4;  // floats of a token's row of results: no bank conflicts
constexpr int kSharedBytes = (228 - 1 - 2) * 1024;  // what a block may have, but for barriers and what aligns the rings

struct PromptFp8 {
  Pieces pieces;
  int32_t units, tokens, padded, n, weight_stages, x_stages, token_tiles;
  const uint8_t* x;
  const float* token_scale;  // [tokens]
  __nv_bfloat16* out;        // [tokens, n]
  float unit, inverse_unit;
};

// The block's part of the product.
struct Part {
  int rows, first_token;  // number of its 128 rows; first of its tokens
};

__device__ __forceinline__ Part part_of_block(const PromptFp8& p, int tile_tokens) {
  // Clusters of the same rows are neighbours, so that the second one finds the weights in L2.
  const int cluster = blockIdx.x / kBlocks, pair = cluster / p.token_tiles;
  return {pair * kBlocks + static_cast<int>(blockIdx.x) % kBlocks, cluster % p.token_tiles * tile_tokens};
}

__device__ void stream_weights(const PromptFp8& p, const Ring& ring, int rows, int lane) {
  const int unit_bytes = p.pieces.segments[0].unit_bytes;
  const Place place = place_of_tile(p.pieces, rows * kTiles + min(lane, kTiles - 1));
  const bool has_tile = lane < kTiles && place.matrix != nullptr;
  const uint8_t* data = nullptr;
  if (has_tile) data = place.matrix->data + static_cast<int64_t>(place.tile) * p.units * unit_bytes;
  const int bytes = __popc(__ballot_sync(~0u, has_tile)) * unit_bytes;
  Turn turn;
  for (int u = 0; u < p.units; ++u, turn.next(ring)) {
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

// One thread: this block's half of each line, into both blocks.
template <int kTokens>
__device__ void stream_activations(const PromptFp8& p, const Ring& ring, int first_token) {
  constexpr int kHalf = kTokens / kBlocks;
  const int rank = blockIdx.x % kBlocks, own_first = first_token + rank * kHalf;
  const int all = min(kTokens, p.padded - first_token), own = max(0, min(kHalf, p.padded - own_first));
  Turn turn;
  for (int line = 0; line < kUnitLines * p.units; ++line, turn.next(ring)) {
    turn.wait_empty(ring);
    mbarrier_arrive_expect(&ring.full[turn.stage], all * kLineColumns);
    if (own > 0)
      bulk_copy_to_all<(1 << kBlocks) - 1>(turn.data(ring) + rank * kHalf * kLineColumns,
                                           p.x + (static_cast<int64_t>(line) * p.padded + own_first) * kLineColumns,
                                           own * kLineColumns, &ring.full[turn.stage]);
  }
}

// A warp is done with a stage of activations, which either block's half of the next line will overwrite.
__device__ __forceinline__ void release(uint64_t* empty, int lane) {
  __syncwarp();
  if (lane < kWarpArrivals)
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) cluster_arrive(empty, block);
}

template <class F>
__device__ __forceinline__ HalfLine e4m3_line_of(const uint32_t (&params)[kParameterWords<F>], int group, int r8,
                                                 __half2 inverse_unit) {
  HalfLine line = half_line_of<F>(params, group, r8, inverse_unit);
  if constexpr (!F::kAffine) line.scale = __hmul2(line.scale, inverse_unit), line.offset = __hmul2(line.offset, inverse_unit);
  return line;
}

__device__ __forceinline__ uint32_t to_e4m3(const uint32_t (&halves)[2]) {
  uint32_t out;
  asm("{\n"
      ".reg .b16 low, high;\n"
      "cvt.rn.satfinite.e4m3x2.f16x2 low, %1;\n"
      "cvt.rn.satfinite.e4m3x2.f16x2 high, %2;\n"
      "mov.b32 %0, {low, high};\n"
      "}\n"
      : "=r"(out)
      : "r"(halves[0]), "r"(halves[1]));
  return out;
}

// acc += the warp's tile of 16 rows times the activations: for token 8 j + 2 (lane % 4) + e and row lane / 4 + 8 r at
// 4 j + 2 r + e. All warps of a warpgroup call it together.
template <class F, int kTokens>
__device__ void accumulate(const PromptFp8& p, const Ring& weights, const Ring& x, int warp, int lane, float (&acc)[kTokens / 2]) {
  constexpr int kWords = kParameterWords<F>, kSteps = F::kGroup / 32;
  const int at = warp * p.pieces.segments[0].unit_bytes;
  const __half2 inverse_unit = __float2half2_rn(p.inverse_unit);
  // While the tensor cores work on one set of fragments, of 64 columns, the next one is unpacked.
  uint32_t fragments[2][2][4], params[kWords], codes[4][4];
  HalfLine lines[2] = {};
  const auto unpack = [&](const uint8_t* unit, auto number) {
    constexpr int kStep = decltype(number)::value;
    if constexpr (kStep == 0) {
      const uint32_t* words = reinterpret_cast<const uint32_t*>(unit + kCodeBytes<F::kBits>) + lane / 4 * kWords;
#pragma unroll
      for (int i = 0; i < kWords; ++i) params[i] = words[i];
    }
    if constexpr (kStep % 2 == 0)
      load_codes<F::kBits, F::kBits == 4 && !F::kAffine>(
          [&](int n) { return *reinterpret_cast<const uint4*>(unit + n); },
          [&](int n) { return *reinterpret_cast<const uint2*>(unit + n); }, kStep / 2, lane, codes);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int piece = 2 * kStep + i;  // of 32 columns
      if (piece % kSteps == 0)
#pragma unroll
        for (int r8 = 0; r8 < 2; ++r8) lines[r8] = e4m3_line_of<F>(params, piece / kSteps, r8, inverse_unit);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        uint32_t values[2][2];
        halves_of<F>(codes[piece % 4][2 * h], codes[piece % 4][2 * h + 1], lines, values);
#pragma unroll
        for (int r8 = 0; r8 < 2; ++r8) fragments[kStep % 2][i][2 * h + r8] = to_e4m3(values[r8]);
      }
    }
  };
  const uint32_t first_line = descriptor(shared_address(x.data));
  Turn unit, line;
  int line_before = -1;
  unit.wait_full(weights);
  unpack(unit.data(weights) + at, std::integral_constant<int, 0>{});
  for (int u = 0; u < p.units; ++u) {
    const auto step = [&](auto number) {
      constexpr int kStep = decltype(number)::value, kHalf = kStep % 2;  // of a line
      if constexpr (kHalf == 0) line.wait_full(x);
      const uint32_t b = first_line + line.stage * (kLineColumns / 16 * kTokens) + kHalf * 4;
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < 2; ++i) wgmma_e4m3(acc, fragments[kStep % 2][i], whole(b + 2 * i));
      wgmma_commit();
      wgmma_wait<1>();  // the other set is free, and with a line's first step the line before
      if constexpr (kHalf == 0) {
        if (line_before >= 0) release(&x.empty[line_before], lane);
        line_before = line.stage;
      } else {
        line.next(x);
      }
      if constexpr (kStep + 1 < 4) {
        unpack(unit.data(weights) + at, std::integral_constant<int, kStep + 1>{});
      } else {
        warp_arrive(&weights.empty[unit.stage], lane);
        unit.next(weights);
        if (u + 1 < p.units) {
          unit.wait_full(weights);
          unpack(unit.data(weights) + at, std::integral_constant<int, 0>{});
        }
      }
    };
    for_steps(step, std::make_integer_sequence<int, 4>{});
  }
  wgmma_wait<0>();
}

template <class F, int kTokens>
__device__ void consume(const PromptFp8& p, const Ring& weights, const Ring& x, float* results, Part part, int warp, int lane) {
  float acc[kTokens / 2] = {};
  accumulate<F, kTokens>(p, weights, x, warp, lane, acc);
  named_barrier(1, 32 * kTiles);  // nobody reads the rings any more; all that was asked for has come
  const Place place = place_of_tile(p.pieces, part.rows * kTiles + warp);
#pragma unroll
  for (int r8 = 0; r8 < 2; ++r8) {
    const int row = lane / 4 + 8 * r8;
    const float scale = place.matrix ? place.matrix->row_factor[place.tile * kTileRows + row] * p.unit : 0;
#pragma unroll
    for (int j = 0; j < kTokens / 8; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e)
        results[(8 * j + 2 * (lane % 4) + e) * kStride + warp * kTileRows + row] = acc[4 * j + 2 * r8 + e] * scale;
  }
  named_barrier(1, 32 * kTiles);
  const Segment& last = p.pieces.segments[p.pieces.count - 1];
  const int column = p.pieces.first_rows[0] + part.rows * kRows + 4 * lane;
  if (column >= p.pieces.first_rows[p.pieces.count - 1] + last.n) return;
  wait_for_kernel_before();  // which may still read what this one writes
  for (int t = warp; t < min(kTokens, p.tokens - part.first_token); t += kTiles) {
    const int token = part.first_token + t;
    const float4 v = *reinterpret_cast<const float4*>(results + t * kStride + 4 * lane);
    const float scale = p.token_scale[token];
    const __nv_bfloat162 pairs[2] = {__floats2bfloat162_rn(v.x * scale, v.y * scale),
                                     __floats2bfloat162_rn(v.z * scale, v.w * scale)};
    *reinterpret_cast<uint2*>(p.out + static_cast<int64_t>(token) * p.n + column) = *reinterpret_cast<const uint2*>(pairs);
  }
}

template <class F, int kTokens>
__global__ void __launch_bounds__(32 * kTiles + 128, 1) __cluster_dims__(kBlocks, 1, 1)
    prompt_fp8(const __grid_constant__ PromptFp8 p) {
  extern __shared__ uint8_t shared[];
  __shared__ uint64_t barriers[4][kMaxRing];
  uint8_t* const data = shared + (1024 - shared_address(shared) % 1024) % 1024;
  constexpr int kLine = kLineColumns * kTokens;
  const Ring x{data, barriers[0], barriers[1], p.x_stages, kLine};
  const Ring weights{data + p.x_stages * kLine, barriers[2], barriers[3], p.weight_stages,
                     kTiles * p.pieces.segments[0].unit_bytes};
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Part part = part_of_block(p, kTokens);
  if (threadIdx.x == 0) {
    let_next_kernel_start();
    for (int i = 0; i < x.stages; ++i)
      mbarrier_init(&x.full[i], 1), mbarrier_init(&x.empty[i], kBlocks * kTiles * kWarpArrivals);
    for (int i = 0; i < weights.stages; ++i)
      mbarrier_init(&weights.full[i], 1), mbarrier_init(&weights.empty[i], kTiles * kWarpArrivals);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  cluster_sync();
  if (warp >= kTiles) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (warp == kTiles) {
      stream_weights(p, weights, part.rows, lane);
    } else if (warp == kTiles + 1 && lane == 0) {
      wait_for_kernel_before();
      stream_activations<kTokens>(p, x, part.first_token);
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    consume<F, kTokens>(p, weights, x, reinterpret_cast<float*>(data), part, warp, lane);
  }
  cluster_sync();  // the other block may still send something here
}

template <class F, int kTokens>
cudaError_t run(PromptFp8 p, cudaStream_t stream) {
  constexpr int kLine = kLineColumns * kTokens;
  const int unit = kTiles * p.pieces.segments[0].unit_bytes;
  // Weights come from memory, activations from L2: two lines are a unit, and there is one unit more.
  p.weight_stages = std::min(kMaxRing, (kSharedBytes + kUnitLines * kLine) / (unit + kUnitLines * kLine));
  p.x_stages = std::min(kMaxRing, (kSharedBytes - p.weight_stages * unit) / kLine);
  p.token_tiles = (p.tokens + kTokens - 1) / kTokens;
  const int bytes = std::max(p.weight_stages * unit + p.x_stages * kLine, kTokens * kStride * 4) + 1024;
  const auto kernel = prompt_fp8<F, kTokens>;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  int tiles = 0;
  for (int i = 0; i < p.pieces.count; ++i) tiles += p.pieces.segments[i].num_tiles;
  const int pairs = (tiles + kBlocks * kTiles - 1) / (kBlocks * kTiles);
  return launch_early(kernel, dim3(kBlocks * pairs * p.token_tiles), 32 * kTiles + 128, bytes, p, stream);
}

}  // namespace

// Formats of at most 4 bits. padded: tokens of x, a multiple of 8. tile: tokens of a block, 128, 192 or 256. n: a multiple of 4.
extern "C" int peregrine_prompt_fp8(const Pieces* pieces, int units, int tokens, int padded, int tile, int n, const void* x,
                                    const float* token_scale, void* out, float unit, void* stream) {
  const PromptFp8 p{*pieces, units, tokens, padded, n, 0, 0, 0, static_cast<const uint8_t*>(x), token_scale,
                    static_cast<__nv_bfloat16*>(out), unit, 1 / unit};
  cudaError_t error = cudaErrorInvalidValue;
  if (n % 4 != 0 || padded % 8 != 0) return error;
  with_format(pieces->segments[0].format, [&](auto f) {
    using F = decltype(f);
    if constexpr (F::kBits <= 4) {
      const auto s = static_cast<cudaStream_t>(stream);
      if (tile == 128) error = run<F, 128>(p, s);
      if (tile == 192) error = run<F, 192>(p, s);
      if (tile == 256) error = run<F, 256>(p, s);
    }
  });
  return error;
}
