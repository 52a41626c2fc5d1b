// Products of 16 to some hundred tokens straight from packed weights, on Hopper's warpgroup tensor cores in float16.
//
// A block computes 128 or 256 rows of the matrix for a tile of tokens: 8 or 16 warps unpack a tile of 16 rows each, 32
// columns at a time, into registers, which are operand A as they lie there (warpgroups, wgmma). One warp streams packed
// units, another one activations through rings in shared memory. So weights are read as packed, once for a tile of tokens,
// and the first of them before the kernel before has ended (programmatic dependent launch): they depend on nothing.
//
// Activations: float16 [4 * units][padded tokens][64], 64 columns a line, in the order of the weights' fragments (column
// 8 q + 4 h + 2 i + j of 32 at 16 h + 8 j + 2 q + i), 16-byte pieces swizzled by the token (kernels/prefill.py).
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <utility>

#include "values.cuh"

namespace {

constexpr int kMaxRing = 16;
constexpr int kPadding = 4;  // floats behind a token's row of results: no bank conflicts
// Of a multiprocessor's 228 KB a block takes 1 KB more; and barriers, and what aligns the rings.
constexpr int kSharedBytes = (228 - 1 - 2) * 1024, kHalfSharedBytes = (114 - 1 - 2) * 1024;
constexpr int kLines = kUnitColumns / 64;  // of activations in a unit

// Two blocks of 128 rows share a multiprocessor where their accumulators leave room for it.
template <int kTiles, int kTokens>
constexpr int kBlocksOf = kTiles == 8 && kTokens <= 64 ? 2 : 1;

// The warpgroup behind those that unpack streams; it gives its registers to them.
template <int kTiles>
constexpr int kThreadsOf = 32 * kTiles + 128;

struct Prompt {
  Pieces pieces;
  int32_t units, units_per_split, tokens, padded, n, weight_stages, x_stages, is_wide;
  const uint8_t* x;
  const float* token_scale;  // [tokens]
  void* out;                 // bfloat16 [tokens, n], or (is_wide) float32 [splits, tokens, n]
  float unit, inverse_unit;
};

__device__ __forceinline__ void wgmma(float (&d)[16], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n32k16.f32.f16.f16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
      "{%16, %17, %18, %19}, %20, 1, 1, 1, 0;"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
        "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

__device__ __forceinline__ void wgmma(float (&d)[32], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
      "{%32, %33, %34, %35}, %36, 1, 1, 1, 0;"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
        "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
        "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
        "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

__device__ __forceinline__ void wgmma(float (&d)[64], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
      "{%64, %65, %66, %67}, %68, 1, 1, 1, 0;"
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

// Low half of the descriptor of rows of 128 bytes, swizzled, eight of them 1,024 bytes apart from the next eight. It counts
// 16 bytes.
__device__ __forceinline__ uint32_t descriptor(uint32_t address) { return (address >> 4 & 0x3fff) | 1u << 16; }
__device__ __forceinline__ uint64_t whole(uint32_t descriptor) { return 64ull << 32 | 1ull << 62 | descriptor; }

template <int kTiles>
__device__ __forceinline__ void consumers_wait() {
  asm volatile("bar.sync 1, %0;" ::"n"(32 * kTiles) : "memory");
}

// What the kernels before in the stream wrote is there; the next kernel may start up to its own wait.
__device__ __forceinline__ void wait_for_kernel_before() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ __forceinline__ void let_next_kernel_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

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

// A ring of stages that one warp fills and kTiles warps empty.
struct Ring {
  uint8_t* data;
  uint64_t *full, *empty;
  int stages, stage_bytes;
};

// Where a warp is in a ring: counted, because a division costs as much as unpacking a column.
struct Turn {
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void next(const Ring& ring) {
    if (++stage == ring.stages) stage = 0, parity ^= 1;
  }
  __device__ __forceinline__ uint8_t* data(const Ring& ring) const { return ring.data + stage * ring.stage_bytes; }
  __device__ __forceinline__ void wait_full(const Ring& ring) const { mbarrier_wait(&ring.full[stage], parity); }
  __device__ __forceinline__ void wait_empty(const Ring& ring) const { mbarrier_wait(&ring.empty[stage], parity ^ 1); }
};

template <int kTiles>
__device__ void stream_weights(const Prompt& p, const Ring& ring, int begin, int end, int lane) {
  const int unit_bytes = p.pieces.segments[0].unit_bytes;
  const Place place = place_of_tile(p.pieces, blockIdx.y * kTiles + min(lane, kTiles - 1));
  const bool has_tile = lane < kTiles && place.matrix != nullptr;
  const uint8_t* data = nullptr;
  if (has_tile) data = place.matrix->data + static_cast<int64_t>(place.tile) * p.units * unit_bytes;
  const int bytes = __popc(__ballot_sync(~0u, has_tile)) * unit_bytes;
  Turn turn;
  for (int u = begin; u < end; ++u, turn.next(ring)) {
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

template <int kTokens>
__device__ void stream_activations(const Prompt& p, const Ring& ring, int begin, int end) {
  const int first = blockIdx.x * kTokens, bytes = 128 * min(kTokens, p.padded - first);
  Turn turn;
  for (int line = kLines * begin; line < kLines * end; ++line, turn.next(ring)) {
    turn.wait_empty(ring);
    mbarrier_arrive_expect(&ring.full[turn.stage], bytes);
    bulk_copy(turn.data(ring), p.x + (static_cast<int64_t>(line) * p.padded + first) * 128, bytes, &ring.full[turn.stage]);
  }
}

template <class Step, int... kSteps>
__device__ __forceinline__ void for_steps(Step step, std::integer_sequence<int, kSteps...>) {
  (step(std::integral_constant<int, kSteps>{}), ...);
}

template <class F, int kTiles, int kTokens>
__device__ void consume(const Prompt& p, const Ring& weights, const Ring& x, uint8_t* shared, int begin, int end, int warp,
                        int lane) {
  constexpr int kWords = kParameterWords<F>, kSteps = F::kGroup == 0 ? 8 : F::kGroup / 32;
  const int unit_bytes = p.pieces.segments[0].unit_bytes, count = end - begin;
  float acc[kTokens / 2];
#pragma unroll
  for (int i = 0; i < kTokens / 2; ++i) acc[i] = 0;
  // While the tensor cores work on one set of fragments, the next one is unpacked. A set is 64 columns where registers allow
  // it, which halves the waits, or 32.
  constexpr int kPieces = kTokens <= 64 ? 2 : 1, kStepCount = 8 / kPieces;
  uint32_t fragments[2][kPieces][2][4], params[kWords], codes[4][4];
  HalfLine lines[2] = {};
  const __half2 inverse_unit = __float2half2_rn(p.inverse_unit);
  const auto unpack = [&](const uint8_t* unit, auto number) {
    constexpr int kStep = decltype(number)::value;
    if constexpr (kStep == 0 && !F::kSigned) {
      const uint32_t* words = reinterpret_cast<const uint32_t*>(unit + kCodeBytes<F::kBits>) + lane / 4 * kWords;
#pragma unroll
      for (int i = 0; i < kWords; ++i) params[i] = words[i];
    }
    if constexpr (kStep * kPieces % 4 == 0)
      load_codes<F::kBits, F::kBits == 4 && !F::kAffine>(
          [&](int n) { return *reinterpret_cast<const uint4*>(unit + n); },
          [&](int n) { return *reinterpret_cast<const uint2*>(unit + n); }, kStep * kPieces / 4, lane, codes);
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const int piece = kStep * kPieces + i;  // of 32 columns
      if (piece % kSteps == 0)
#pragma unroll
        for (int r8 = 0; r8 < 2; ++r8) lines[r8] = half_line_of<F>(params, piece / kSteps, r8, inverse_unit);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        uint32_t values[2][2];
        halves_of<F>(codes[piece % 4][2 * h], codes[piece % 4][2 * h + 1], lines, values);
        uint32_t(&fragment)[4] = fragments[kStep % 2][i][h];
        fragment[0] = values[0][0], fragment[1] = values[1][0], fragment[2] = values[0][1], fragment[3] = values[1][1];
      }
    }
  };
  const int at = warp * unit_bytes;
  const uint32_t first_line = descriptor(shared_address(x.data));
  Turn unit, line;
  int line_before = -1;
  unit.wait_full(weights);
  unpack(unit.data(weights) + at, std::integral_constant<int, 0>{});
  for (int u = 0; u < count; ++u) {
    const auto step = [&](auto number) {
      constexpr int kStep = decltype(number)::value, kHalf = kStep * kPieces % 2;  // of a line
      if constexpr (kHalf == 0) line.wait_full(x);
      const uint32_t b = first_line + line.stage * (8 * kTokens) + kHalf * 4;
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < kPieces; ++i)
#pragma unroll
        for (int h = 0; h < 2; ++h) wgmma(acc, fragments[kStep % 2][i][h], whole(b + 4 * i + 2 * h));
      wgmma_commit();
      wgmma_wait<1>();  // the other set is free, and with a line's first step the line before
      if constexpr (kHalf == 0) {
        if (line_before >= 0 && lane == 0) mbarrier_arrive(&x.empty[line_before]);
        line_before = line.stage;
      }
      if constexpr (kHalf == 1 || kPieces == 2) line.next(x);
      if constexpr (kStep + 1 < kStepCount) {
        unpack(unit.data(weights) + at, std::integral_constant<int, kStep + 1>{});
      } else {
        __syncwarp();
        if (lane == 0) mbarrier_arrive(&weights.empty[unit.stage]);
        unit.next(weights);
        if (u + 1 < count) {
          unit.wait_full(weights);
          unpack(unit.data(weights) + at, std::integral_constant<int, 0>{});
        }
      }
    };
    for_steps(step, std::make_integer_sequence<int, kStepCount>{});
  }
  wgmma_wait<0>();
  wait_for_kernel_before();
  consumers_wait<kTiles>();  // nobody reads the rings any more; all that was asked for has come
  float* const results = reinterpret_cast<float*>(shared);
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
  const Segment& last = p.pieces.segments[p.pieces.count - 1];
  const int at_row = warp % kParts * 128 + 4 * lane, column = p.pieces.first_rows[0] + blockIdx.y * kRows + at_row;
  const int num_columns = min(4, p.pieces.first_rows[p.pieces.count - 1] + last.n - column);
  if (num_columns <= 0) return;
  for (int t = warp / kParts; t < kTokens; t += kTiles / kParts) {
    const int token = blockIdx.x * kTokens + t;
    if (token >= p.tokens) break;
    float4 v = *reinterpret_cast<const float4*>(results + t * kStride + at_row);
    const float scale = p.token_scale[token];
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

template <class F, int kTiles, int kTokens>
__global__ void __launch_bounds__(kThreadsOf<kTiles>, kBlocksOf<kTiles, kTokens>)
    prompt_matmul(const __grid_constant__ Prompt p) {
  extern __shared__ uint8_t shared[];
  __shared__ uint64_t barriers[4][kMaxRing];
  uint8_t* const data = shared + (1024 - shared_address(shared) % 1024) % 1024;
  const int x_bytes = p.x_stages * 128 * kTokens;
  const Ring x{data, barriers[0], barriers[1], p.x_stages, 128 * kTokens};
  const Ring weights{data + x_bytes, barriers[2], barriers[3], p.weight_stages, kTiles * p.pieces.segments[0].unit_bytes};
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int begin = blockIdx.z * p.units_per_split, end = min(begin + p.units_per_split, p.units);
  if (threadIdx.x == 0) {
    let_next_kernel_start();
    for (int i = 0; i < x.stages; ++i) mbarrier_init(&x.full[i], 1), mbarrier_init(&x.empty[i], kTiles);
    for (int i = 0; i < weights.stages; ++i) mbarrier_init(&weights.full[i], 1), mbarrier_init(&weights.empty[i], kTiles);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  if (warp >= kTiles) {
    if constexpr (kTiles == 16) asm volatile("setmaxnreg.dec.sync.aligned.u32 32;");
    else if constexpr (kBlocksOf<kTiles, kTokens> == 2) asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
    if (warp == kTiles) {
      stream_weights<kTiles>(p, weights, begin, end, lane);
    } else if (warp == kTiles + 1 && lane == 0) {
      wait_for_kernel_before();
      stream_activations<kTokens>(p, x, begin, end);
    }
  } else {
    if constexpr (kTiles == 16) asm volatile("setmaxnreg.inc.sync.aligned.u32 112;");
    else if constexpr (kBlocksOf<kTiles, kTokens> == 2) asm volatile("setmaxnreg.inc.sync.aligned.u32 104;");
    consume<F, kTiles, kTokens>(p, weights, x, data, begin, end, warp, lane);
  }
}

template <class F, int kTiles, int kTokens>
cudaError_t run(Prompt p, int splits, cudaStream_t stream) {
  constexpr int kLine = 128 * kTokens, kRoom = kBlocksOf<kTiles, kTokens> == 2 ? kHalfSharedBytes : kSharedBytes;
  const int unit = kTiles * p.pieces.segments[0].unit_bytes;
  // Weights one unit further ahead: they come from memory, activations from L2.
  p.weight_stages = std::min({kMaxRing, kRoom / (unit + kLines * kLine) + 1, (kRoom - 4 * kLine) / unit});
  p.x_stages = std::min(kMaxRing, (kRoom - p.weight_stages * unit) / kLine);
  const int bytes = p.weight_stages * unit + p.x_stages * kLine + 1024;
  const auto kernel = prompt_matmul<F, kTiles, kTokens>;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  int tiles = 0;
  for (int i = 0; i < p.pieces.count; ++i) tiles += p.pieces.segments[i].num_tiles;
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3((p.tokens + kTokens - 1) / kTokens, (tiles + kTiles - 1) / kTiles, splits);
  config.blockDim = dim3(kThreadsOf<kTiles>);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, p);
}

}  // namespace

// padded: tokens of x, a multiple of 8. tile: tokens of a block (32, 64 or 128); rows: of a block (128 or 256). No split is
// empty.
extern "C" int peregrine_prompt(const Pieces* pieces, int units, int tokens, int padded, int tile, int rows, int n,
                                int splits, int is_wide, const void* x, const float* token_scale, void* out, float unit,
                                void* stream) {
  const Prompt p{*pieces, units, (units + splits - 1) / splits, tokens, padded, n, 0, 0, is_wide,
                 static_cast<const uint8_t*>(x), token_scale, out, unit, 1 / unit};
  cudaError_t error = cudaErrorInvalidValue;
  if ((splits - 1) * p.units_per_split >= units) return error;
  with_format(pieces->segments[0].format, [&](auto f) {
    using F = decltype(f);
    const auto s = static_cast<cudaStream_t>(stream);
    if (tile == 32 && rows == 128) error = run<F, 8, 32>(p, splits, s);
    if (tile == 32 && rows == 256) error = run<F, 16, 32>(p, splits, s);
    if (tile == 64 && rows == 128) error = run<F, 8, 64>(p, splits, s);
    if (tile == 64 && rows == 256) error = run<F, 16, 64>(p, splits, s);
    if (tile == 128 && rows == 128) error = run<F, 8, 128>(p, splits, s);
    if (tile == 128 && rows == 256) error = run<F, 16, 128>(p, splits, s);
  });
  return error;
}
