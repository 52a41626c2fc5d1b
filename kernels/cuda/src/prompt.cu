// Products of prompt chunks straight from packed weights: e4m3 operands on Hopper's warpgroup tensor cores.
//
// A block computes 128 or 256 rows of the matrix for a tile of tokens: 8 or 16 warps unpack a tile of 16 rows each, unit by
// unit, into registers, which are operand A as they lie there (warpgroups, wgmma); a producer warp streams packed
// units and activations through a ring in shared memory. So weights are read as packed, once for a tile of tokens.
//
// Activations: e4m3 [2 * units][padded tokens][128 bytes], 128 columns a line, in the order of the weights' fragments
// (column 8 q + 4 h + b of 32 at 16 h + 4 q + b), 16-byte pieces swizzled by the token (kernels/prefill.py).
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <type_traits>

#include "values.cuh"

namespace {

constexpr int kMaxRing = 6;
constexpr int kPadding = 4;  // floats behind a token's row of results: no bank conflicts
constexpr int kSharedBytes = 227 * 1024 - 1024;

// Sixteen warps that consume take their registers from a warpgroup that does not need them.
template <int kTiles>
constexpr int kThreadsOf = 32 * kTiles + (kTiles == 16 ? 128 : 32);

struct Prompt {
  Pieces pieces;
  int32_t units, units_per_split, tokens, padded, n, stages;
  const uint8_t* x;
  const float* token_scale;  // [tokens]
  void* out;                 // bfloat16 [tokens, n], or float32 [splits, tokens, n]
  float unit, inverse_unit;
};

__device__ __forceinline__ void wgmma(float (&d)[32], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
      "{%32, %33, %34, %35}, %36, 1, 1, 1;"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
        "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
        "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
        "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

__device__ __forceinline__ void wgmma(float (&d)[64], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
      "{%64, %65, %66, %67}, %68, 1, 1, 1;"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
        "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
        "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
        "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]),
        "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]),
        "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]),
        "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]),
        "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Rows of 128 bytes, swizzled, eight of them 1,024 bytes apart from the next eight.
__device__ __forceinline__ uint64_t descriptor(uint32_t address) {
  return static_cast<uint64_t>(address >> 4 & 0x3fff) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}

template <int kTiles>
__device__ __forceinline__ void consumers_wait() {
  asm volatile("bar.sync 1, %0;" ::"n"(32 * kTiles) : "memory");
}

template <int kTiles, int kTokens>
__host__ __device__ constexpr int stage_bytes(int unit_bytes) {
  return (2 * 128 * kTokens + kTiles * unit_bytes + 1023) / 1024 * 1024;
}

struct Place {
  const Segment* matrix;  // null: there is no such tile
  int tile;
};

__device__ __forceinline__ Place place_of_tile(const Pieces& pieces, int tile) {
  for (int i = 0; i < pieces.count; ++i) {
    if (tile < pieces.segments[i].num_tiles) return {&pieces.segments[i], tile};
    tile -= pieces.segments[i].num_tiles;
  }
  return {nullptr, 0};
}

template <class F, int kTiles, int kTokens>
__device__ void produce(const Prompt& p, uint8_t* ring, uint64_t* full, uint64_t* empty, int begin, int end, int lane) {
  const int unit_bytes = p.pieces.segments[0].unit_bytes;
  const Place place = place_of_tile(p.pieces, blockIdx.y * kTiles + min(lane, kTiles - 1));
  const bool has_tile = lane < kTiles && place.matrix != nullptr;
  const uint8_t* data = nullptr;
  if (has_tile) data = place.matrix->data + static_cast<int64_t>(place.tile) * p.units * unit_bytes;
  const int bytes = 2 * 128 * kTokens + __popc(__ballot_sync(~0u, has_tile)) * unit_bytes;
  for (int u = begin; u < end; ++u) {
    const int stage = (u - begin) % p.stages, round = (u - begin) / p.stages;
    uint8_t* to = ring + stage * stage_bytes<kTiles, kTokens>(unit_bytes);
    if (lane == 0) {
      mbarrier_wait(&empty[stage], (round & 1) ^ 1);
      mbarrier_arrive_expect(&full[stage], bytes);
    }
    __syncwarp();
    if (has_tile) {
      bulk_copy(to + 2 * 128 * kTokens + lane * unit_bytes, data + static_cast<int64_t>(u) * unit_bytes, unit_bytes,
                &full[stage]);
    } else if (lane >= kTiles && lane < kTiles + 2) {
      const int half = lane - kTiles;
      const int64_t line = static_cast<int64_t>(2 * u + half) * p.padded + blockIdx.x * kTokens;
      bulk_copy(to + half * 128 * kTokens, p.x + line * 128, 128 * kTokens, &full[stage]);
    }
  }
}

template <class F, int kTiles, int kTokens>
__device__ void consume(const Prompt& p, uint8_t* ring, uint64_t* full, uint64_t* empty, int begin, int end, int warp,
                        int lane) {
  const int unit_bytes = p.pieces.segments[0].unit_bytes;
  constexpr int kWords = kParameterWords<F>, kSteps = F::kGroup == 0 ? 8 : F::kGroup / 32;
  float acc[kTokens / 2];
#pragma unroll
  for (int i = 0; i < kTokens / 2; ++i) acc[i] = 0;
  // While the tensor cores work on `fragments`, the next ones are unpacked; they move over when those are done with.
  // More warps hide more, and leave fewer registers.
  constexpr int kBatch = kTiles > 8 ? 2 : 4;  // steps of 32 columns
  uint32_t fragments[kBatch][4], next[kBatch][4];
  const uint32_t zero = static_cast<uint32_t>(p.units) >> 31;  // unknown to the compiler, which would drop a plain copy
  const auto stage_at = [&](int u) { return ring + (u - begin) % p.stages * stage_bytes<kTiles, kTokens>(unit_bytes); };
  Line lines[2] = {};
  uint32_t params[kWords], codes[4][4];
  const auto unpack = [&](const uint8_t* unit, auto first) {
    constexpr int kFirst = decltype(first)::value;
    if constexpr (kFirst == 0) {
      const uint32_t* words = reinterpret_cast<const uint32_t*>(unit + kCodeBytes<F::kBits>) + lane / 4 * kWords;
#pragma unroll
      for (int i = 0; i < kWords; ++i) params[i] = words[i];
    }
    if constexpr (kFirst % 4 == 0)
      load_codes<F::kBits>([&](int n) { return *reinterpret_cast<const uint4*>(unit + n); },
                           [&](int n) { return *reinterpret_cast<const uint2*>(unit + n); }, kFirst / 4, lane, codes);
#pragma unroll
    for (int i = 0; i < kBatch; ++i)
#pragma unroll
      for (int r8 = 0; r8 < 2; ++r8) {
        const int step = kFirst + i;
        if (step % kSteps == 0) lines[r8] = line_of<F>(params, step / kSteps, r8, p.inverse_unit);
#pragma unroll
        for (int h = 0; h < 2; ++h)
          next[i][2 * h + r8] = to_e4m3(values_of<F>(codes[step % 4][2 * h + r8], r8, lines[r8]));
      }
  };
  const auto multiply = [&](const uint8_t* stage, int first) {
#pragma unroll
    for (int i = 0; i < kBatch; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j)
        asm volatile("xor.b32 %0, %1, %2;" : "=r"(fragments[i][j]) : "r"(next[i][j]), "r"(zero));
    wgmma_fence();
    const uint32_t x = shared_address(stage) + first / 4 * 128 * kTokens;
#pragma unroll
    for (int i = 0; i < kBatch; ++i) wgmma(acc, fragments[i], descriptor(x + 32 * (first % 4 + i)));
    wgmma_commit();
  };
  const int weights_at = 2 * 128 * kTokens + warp * unit_bytes;
  if (begin < end) {
    mbarrier_wait(&full[0], 0);
    unpack(ring + weights_at, std::integral_constant<int, 0>{});
  }
  for (int u = begin; u < end; ++u) {
    const uint8_t* const stage = stage_at(u);
    wgmma_wait<0>();
    if (u > begin && lane == 0) mbarrier_arrive(&empty[(u - begin - 1) % p.stages]);
    multiply(stage, 0);
    if constexpr (kBatch == 2) {
      unpack(stage + weights_at, std::integral_constant<int, 2>{});
      wgmma_wait<0>();
      multiply(stage, 2);
    }
    unpack(stage + weights_at, std::integral_constant<int, 4>{});
    wgmma_wait<0>();
    multiply(stage, 4);
    if constexpr (kBatch == 2) {
      unpack(stage + weights_at, std::integral_constant<int, 6>{});
      wgmma_wait<0>();
      multiply(stage, 6);
    }
    if (u + 1 < end) {
      mbarrier_wait(&full[(u + 1 - begin) % p.stages], (u + 1 - begin) / p.stages & 1);
      unpack(stage_at(u + 1) + weights_at, std::integral_constant<int, 0>{});
    }
  }
  wgmma_wait<0>();
  consumers_wait<kTiles>();  // nobody reads the ring any more; all that was asked for has come
  float* const results = reinterpret_cast<float*>(ring);
  constexpr int kRows = kTileRows * kTiles, kStride = kRows + kPadding;
  const Place place = place_of_tile(p.pieces, blockIdx.y * kTiles + warp);
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
  consumers_wait<kTiles>();
  constexpr int kParts = kRows / 128;  // of a token's results, one for a warp
  const int at_row = warp % kParts * 128 + 4 * lane, column = p.pieces.first_rows[0] + blockIdx.y * kRows + at_row;
  const Segment& last = p.pieces.segments[p.pieces.count - 1];
  if (column >= p.pieces.first_rows[p.pieces.count - 1] + last.n) return;
  for (int t = warp / kParts; t < kTokens; t += kTiles / kParts) {
    const int token = blockIdx.x * kTokens + t;
    if (token >= p.tokens) break;
    float4 v = *reinterpret_cast<const float4*>(results + t * kStride + at_row);
    const float scale = p.token_scale[token];
    v = make_float4(v.x * scale, v.y * scale, v.z * scale, v.w * scale);
    const int64_t at = (static_cast<int64_t>(blockIdx.z) * p.tokens + token) * p.n + column;
    if (gridDim.z == 1) {
      const __nv_bfloat162 pairs[2] = {__floats2bfloat162_rn(v.x, v.y), __floats2bfloat162_rn(v.z, v.w)};
      *reinterpret_cast<uint2*>(static_cast<__nv_bfloat16*>(p.out) + at) = *reinterpret_cast<const uint2*>(pairs);
    } else {
      *reinterpret_cast<float4*>(static_cast<float*>(p.out) + at) = v;
    }
  }
}

template <class F, int kTiles, int kTokens>
__global__ void __launch_bounds__(kThreadsOf<kTiles>, 1) prompt_matmul(const __grid_constant__ Prompt p) {
  extern __shared__ uint8_t shared[];
  __shared__ uint64_t full[kMaxRing], empty[kMaxRing];
  uint8_t* const ring = shared + (1024 - shared_address(shared) % 1024) % 1024;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int begin = blockIdx.z * p.units_per_split, end = min(begin + p.units_per_split, p.units);
  if (threadIdx.x == 0) {
    for (int i = 0; i < p.stages; ++i) mbarrier_init(&full[i], 1), mbarrier_init(&empty[i], kTiles);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  if (warp >= kTiles) {
    if constexpr (kTiles == 16) asm volatile("setmaxnreg.dec.sync.aligned.u32 32;");
    if (warp == kTiles) produce<F, kTiles, kTokens>(p, ring, full, empty, begin, end, lane);
  } else {
    if constexpr (kTiles == 16) asm volatile("setmaxnreg.inc.sync.aligned.u32 112;");
    consume<F, kTiles, kTokens>(p, ring, full, empty, begin, end, warp, lane);
  }
}

template <class F, int kTiles, int kTokens>
cudaError_t run(Prompt p, int splits, cudaStream_t stream) {
  const int stage = stage_bytes<kTiles, kTokens>(p.pieces.segments[0].unit_bytes);
  p.stages = std::min(kMaxRing, kSharedBytes / stage);
  const int bytes = p.stages * stage + 1024;
  const cudaError_t error =
      cudaFuncSetAttribute(prompt_matmul<F, kTiles, kTokens>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  int tiles = 0;
  for (int i = 0; i < p.pieces.count; ++i) tiles += p.pieces.segments[i].num_tiles;
  const dim3 grid(p.padded / kTokens, (tiles + kTiles - 1) / kTiles, splits);
  prompt_matmul<F, kTiles, kTokens><<<grid, kThreadsOf<kTiles>, bytes, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace

// Formats of at most 4 bits. `padded`: tokens of x, a multiple of `tile`, which is 64 or 128. rows: of a block, 128 or 256.
extern "C" int peregrine_prompt(const Pieces* pieces, int units, int tokens, int padded, int tile, int rows, int n, int splits,
                                const void* x, const float* token_scale, void* out, float unit, void* stream) {
  const Prompt p{*pieces, units, (units + splits - 1) / splits, tokens, padded, n, 0, static_cast<const uint8_t*>(x),
                 token_scale, out, unit, 1 / unit};
  cudaError_t error = cudaErrorInvalidValue;
  with_format(pieces->segments[0].format, [&](auto f) {
    using F = decltype(f);
    if constexpr (F::kBits <= 4) {
      const auto s = static_cast<cudaStream_t>(stream);
      if (tile == 64 && rows == 128) error = run<F, 8, 64>(p, splits, s);
      if (tile == 64 && rows == 256) error = run<F, 16, 64>(p, splits, s);
      if (tile == 128 && rows == 128) error = run<F, 8, 128>(p, splits, s);
      if (tile == 128 && rows == 256) error = run<F, 16, 128>(p, splits, s);
    }
  });
  return error;
}
