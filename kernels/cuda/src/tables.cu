// Ops over whole matrices in fragment order: rows of an embedding table, and dequantized matrices.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "values.cuh"

namespace {

// A code by its place, one byte at a time: the layout once more, independent of `load_codes`.
template <int kBits>
__device__ int code_at(const uint8_t* unit, int row, int column) {
  const int tile = column / 64, half = column / 32 % 2, quad = column / 8 % 4, high = column / 4 % 2, byte = column % 4;
  const int lane = 4 * (row % 8) + quad, reg = 2 * high + row / 8, pair = tile / 2, mma = 2 * (tile % 2) + half;
  if constexpr (kBits == 8) return unit[((2 * tile + half) * 32 + lane) * 16 + 4 * reg + byte];
  constexpr int kLow = kBits >= 4 ? 4 : 2;
  int code;
  if constexpr (kLow == 4)
    code = (unit[(tile * 32 + lane) * 16 + 4 * (2 * half + high) + byte] >> (4 * (row / 8))) & 15;
  else
    code = (unit[(pair * 32 + lane) * 16 + 4 * mma + byte] >> (2 * reg)) & 3;
  const uint8_t* plane = unit + kCodeBytes<kLow>;
  if constexpr (kBits - kLow == 1)
    code |= ((plane[lane * 16 + pair * 8 + (tile % 2) * 4 + byte] >> plane_bit(half, high, row / 8)) & 1) << kLow;
  if constexpr (kBits - kLow == 2) code |= ((plane[(pair * 32 + lane) * 16 + 4 * mma + byte] >> (2 * reg)) & 3) << kLow;
  return code;
}

template <class F>
__device__ float value_at(const uint8_t* unit, int row, int column, float row_factor) {
  const int code = code_at<F::kBits>(unit, row, column);
  if constexpr (F::kGroup == 0) return row_factor * static_cast<int8_t>(code);
  constexpr int kGroups = F::kGroup == 0 ? 1 : kUnitColumns / F::kGroup;
  const int at = ((row % 8) * kGroups + column / (F::kGroup == 0 ? 1 : F::kGroup)) * 2 + row / 8;
  const uint8_t* params = unit + kCodeBytes<F::kBits>;
  if constexpr (F::kAffine) {
    const __half2 v = reinterpret_cast<const __half2*>(params)[at];
    return __half2float(v.x) * code + __half2float(v.y);
  } else {
    return row_factor * (static_cast<float>(params[2 * at]) * (code * (1 << (8 - F::kBits)) - params[2 * at + 1]));
  }
}

// out[t] = scale * row token_ids[t]. One block a token; the position moves on where `advance` is set.
template <class F>
__global__ void embed(Segment table, int units, int k, const int* token_ids, float scale, float* out, int* positions,
                      int advance) {
  const int token = blockIdx.x, id = max(token_ids[token], 0);
  const uint8_t* tile = table.data + static_cast<int64_t>(id / kTileRows) * units * table.unit_bytes;
  const float factor = table.row_factor[id];
  for (int column = threadIdx.x; column < k; column += blockDim.x)
    out[static_cast<int64_t>(token) * k + column] =
        scale * value_at<F>(tile + column / kUnitColumns * table.unit_bytes, id % kTileRows, column % kUnitColumns, factor);
  if (threadIdx.x == 0 && advance && positions[token] >= 0) ++positions[token];
}

// Eight neighbouring values of a row, stored at once.
__device__ __forceinline__ void store8(__nv_fp8_e4m3* to, float4 a, float4 b) {
  *reinterpret_cast<uint2*>(to) = make_uint2(to_e4m3(a), to_e4m3(b));
}

__device__ __forceinline__ void store8(__nv_bfloat16* to, float4 a, float4 b) {
  const float2 v[4] = {{a.x, a.y}, {a.z, a.w}, {b.x, b.y}, {b.z, b.w}};
  __nv_bfloat162 w[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) w[i] = __float22bfloat162_rn(v[i]);
  *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(w);
}

__device__ __forceinline__ void store8(float* to, float4 a, float4 b) {
  reinterpret_cast<float4*>(to)[0] = a, reinterpret_cast<float4*>(to)[1] = b;
}

// out [rows, k] of 8, 16 or 32 bits a value; one warp a unit. A lane stores 8 columns at a time, four lanes a sector.
// With 8 bits a value is W / (row_factor * unit), and row_scale [rows] becomes row_factor * unit.
template <class F, class T>
__global__ void __launch_bounds__(256)
    dequantize(Pieces pieces, int units, int k, T* out, float* row_scale, float unit, float inverse_unit) {
  const int index = (blockIdx.x * blockDim.x + threadIdx.x) / 32, lane = threadIdx.x % 32, at = index % units;
  int tile = index / units, piece = 0;
  while (piece < pieces.count && tile >= pieces.segments[piece].num_tiles) tile -= pieces.segments[piece++].num_tiles;
  if (piece == pieces.count) return;
  const Segment& matrix = pieces.segments[piece];
  const uint8_t* data = matrix.data + (static_cast<int64_t>(tile) * units + at) * matrix.unit_bytes;
  uint32_t codes[2][4][4];
#pragma unroll
  for (int pair = 0; pair < 2; ++pair)
    load_codes<F::kBits>([&](int n) { return __ldcs(reinterpret_cast<const uint4*>(data + n)); },
                         [&](int n) { return __ldcs(reinterpret_cast<const uint2*>(data + n)); }, pair, lane, codes[pair]);
  constexpr int kWords = kParameterWords<F>;
  uint32_t params[kWords] = {};
  const int row = lane / 4;
  if constexpr (!F::kSigned) {
    const uint32_t* from = reinterpret_cast<const uint32_t*>(data + kCodeBytes<F::kBits>) + row * kWords;
#pragma unroll
    for (int i = 0; i < kWords; ++i) params[i] = __ldcs(from + i);
  }
  const int steps = (k - at * kUnitColumns) / 32;  // that are there, of 32 columns
#pragma unroll
  for (int r8 = 0; r8 < 2; ++r8) {
    const int n = tile * kTileRows + row + 8 * r8;
    if (n >= matrix.n) continue;
    const int64_t to_row = pieces.first_rows[piece] + n;
    const float row_factor = matrix.row_factor[n], factor = sizeof(T) == 1 ? inverse_unit : row_factor;
    if (sizeof(T) == 1 && at == 0 && lane % 4 == 0) row_scale[to_row] = row_factor * unit;
    T* to = out + to_row * k + at * kUnitColumns + 8 * (lane % 4);
    constexpr int kSteps = F::kGroup == 0 ? 8 : F::kGroup / 32;
    Line line{};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i % kSteps == 0) line = line_of<F>(params, i / kSteps, r8, factor);
      const uint32_t* words = codes[i / 4][i % 4];
      if (i < steps) store8(to + 32 * i, values_of<F>(words[r8], r8, line), values_of<F>(words[2 + r8], r8, line));
    }
  }
}

template <class Fn>
int launch(int format, Fn fn) {
  return with_format(format, fn) ? cudaGetLastError() : cudaErrorInvalidValue;
}

}  // namespace

extern "C" {

int peregrine_embed(const Segment* table, int units, int k, const int* token_ids, float scale, float* out,
                    int* positions, int advance, int tokens, void* stream) {
  return launch(table->format, [&](auto f) {
    embed<decltype(f)><<<tokens, 512, 0, static_cast<cudaStream_t>(stream)>>>(*table, units, k, token_ids, scale, out,
                                                                             positions, advance);
  });
}

// value_bits: 8 (e4m3, with row_scale), 16 (bfloat16) or 32.
int peregrine_dequantize(const Pieces* pieces, int units, int k, int value_bits, void* out, float* row_scale,
                         float unit, void* stream) {
  int tiles = 0;
  for (int i = 0; i < pieces->count; ++i) tiles += pieces->segments[i].num_tiles;
  const int blocks = (tiles * units + 7) / 8;
  return launch(pieces->segments[0].format, [&](auto f) {
    const auto run = [&](auto* to) {
      dequantize<decltype(f)><<<blocks, 256, 0, static_cast<cudaStream_t>(stream)>>>(*pieces, units, k, to, row_scale,
                                                                                    unit, 1 / unit);
    };
    if (value_bits == 8) run(static_cast<__nv_fp8_e4m3*>(out));
    else if (value_bits == 16) run(static_cast<__nv_bfloat16*>(out));
    else run(static_cast<float*>(out));
  });
}
}
