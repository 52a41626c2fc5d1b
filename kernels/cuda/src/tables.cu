// Ops over whole matrices in fragment order: rows of an embedding table, and dequantized matrices.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "units.cuh"

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

// bfloat16 or float32 [n, k]. One warp a unit.
template <class F, class T>
__global__ void dequantize(Segment matrix, int units, int k, T* out) {
  const int64_t index = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
  const int lane = threadIdx.x % 32, tile = index / units, unit = index % units;
  if (tile >= matrix.num_tiles) return;
  const uint8_t* data = matrix.data + index * matrix.unit_bytes;
  const int row = lane / 4;
  const float factor[2] = {matrix.row_factor[tile * kTileRows + row], matrix.row_factor[tile * kTileRows + row + 8]};
  constexpr int kGroups = F::kGroup == 0 ? 1 : kUnitColumns / F::kGroup;
  const uint8_t* params = data + kCodeBytes<F::kBits> + row * kGroups * (F::kAffine ? 8 : 4);
#pragma unroll
  for (int pair = 0; pair < 2; ++pair) {
    uint32_t a[4][4];
    load_codes<F::kBits>([&](int n) { return *reinterpret_cast<const uint4*>(data + n); },
                         [&](int n) { return *reinterpret_cast<const uint2*>(data + n); }, pair, lane, a);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int column = 128 * pair + 32 * i;
      const int group = F::kGroup == 0 ? 0 : column / (F::kGroup == 0 ? 1 : F::kGroup);
#pragma unroll
      for (int r8 = 0; r8 < 2; ++r8) {
        float scale = factor[r8], offset;
        if constexpr (F::kAffine) {
          const __half2 v = reinterpret_cast<const __half2*>(params)[2 * group + r8];
          scale = __half2float(v.x), offset = __half2float(v.y);
        } else if constexpr (F::kSigned) {
          offset = 0;
        } else {
          scale *= params[4 * group + 2 * r8];
          offset = -scale * params[4 * group + 2 * r8 + 1];
          scale *= 1 << (8 - F::kBits);
        }
        const int n = tile * kTileRows + row + 8 * r8;
        if (n >= matrix.n) continue;
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          const int at = unit * kUnitColumns + column + 8 * (lane % 4) + e;
          const int byte = (a[i][2 * (e / 4) + r8] >> (8 * (e % 4))) & 255;
          const int code = F::kSigned ? static_cast<int8_t>(byte) : r8 == 0 ? byte : byte / kSecondRowFactor<F::kBits>;
          if (at < k) out[static_cast<int64_t>(n) * k + at] = static_cast<T>(scale * code + offset);
        }
      }
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

int peregrine_dequantize(const Segment* matrix, int units, int k, void* out, int is_float32, void* stream) {
  const int64_t warps = static_cast<int64_t>(matrix->num_tiles) * units;
  const int blocks = static_cast<int>((warps + 7) / 8);
  return launch(matrix->format, [&](auto f) {
    const auto s = static_cast<cudaStream_t>(stream);
    if (is_float32) dequantize<decltype(f)><<<blocks, 256, 0, s>>>(*matrix, units, k, static_cast<float*>(out));
    else dequantize<decltype(f)><<<blocks, 256, 0, s>>>(*matrix, units, k, static_cast<__nv_bfloat16*>(out));
  });
}
}
