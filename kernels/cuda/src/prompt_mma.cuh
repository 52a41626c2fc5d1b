// Products of up to 16 tokens: each warp by itself, so that none waits for its warpgroup. wgmma takes some 42 cycles for 16
// columns however few the tokens are (docs/benchmarks/kernel-notes.md); two mma.m16n8k16 take 12.
#pragma once

#include "prompt_ring.cuh"

__device__ __forceinline__ void mma_half(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four matrices of eight rows of 16 bytes, each lane the address of a row.
__device__ __forceinline__ void load_matrices(uint32_t address, uint32_t (&v)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
               : "r"(address));
}

// As accumulate_wgmma, for one warp by itself; a stage of activations is a unit of `padded` tokens.
template <class F, int kTokens>
__device__ void accumulate_mma(const Ring& weights, const Ring& x, int count, int at, int padded, __half2 inverse_unit,
                               int lane, float (&acc)[kTokens / 2]) {
  static_assert(kTokens % 16 == 0);
  constexpr int kWords = kParameterWords<F>, kSteps = F::kGroup == 0 ? 8 : F::kGroup / 32;
  float c[kTokens / 8][4] = {};
  // A lane's row of the matrices of 8 tokens x 8 columns: tokens first, then columns, in the order of two operands B.
  const int row = lane % 8, token = lane / 16 * 8 + row;
  const uint32_t tokens = shared_address(x.data) + token * 128, place = (lane / 8 % 2 ^ row) * 16;
  Turn unit;
  for (int u = 0; u < count; ++u, unit.next(weights)) {
    unit.wait_full(weights);
    unit.wait_full(x);
    const uint32_t data = shared_address(unit.data(weights)) + at, from = tokens + unit.stage * x.stage_bytes;
    uint32_t params[kWords];
    if constexpr (!F::kSigned) {
#pragma unroll
      for (int i = 0; i < kWords; ++i)
        params[i] = __float_as_uint(shared4(data + kCodeBytes<F::kBits> + (lane / 4 * kWords + i) * 4));
    }
    HalfLine lines[2] = {};
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      uint32_t codes[4][4];
      load_codes<F::kBits, F::kBits == 4 && !F::kAffine>([&](int n) { return shared16(data + n); },
                                                         [&](int n) { return shared8(data + n); }, pair, lane, codes);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t line = from + (2 * pair + half) * 128 * padded;
#pragma unroll
        for (int i = 0; i < 4; ++i) {  // 16 columns
          const int piece = 4 * pair + 2 * half + i / 2;
          if (i % 2 == 0 && piece % kSteps == 0)
#pragma unroll
            for (int r8 = 0; r8 < 2; ++r8) lines[r8] = half_line_of<F>(params, piece / kSteps, r8, inverse_unit);
          uint32_t values[2][2];
          const uint32_t(&own)[4] = codes[2 * half + i / 2];
          halves_of<F>(own[2 * (i % 2)], own[2 * (i % 2) + 1], lines, values);
          const uint32_t a[4] = {values[0][0], values[1][0], values[0][1], values[1][1]};
#pragma unroll
          for (int j = 0; j < kTokens / 16; ++j) {
            uint32_t b[4];
            load_matrices(line + j * 2048 + (place ^ i * 32), b);
            mma_half(c[2 * j], a, b[0], b[1]);
            mma_half(c[2 * j + 1], a, b[2], b[3]);
          }
        }
      }
    }
    __syncwarp();
    if (lane == 0) mbarrier_arrive(&weights.empty[unit.stage]);
  }
#pragma unroll
  for (int j = 0; j < kTokens / 8; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) acc[4 * j + i] = c[j][i];
}
