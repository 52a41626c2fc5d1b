// Products of up to 16 tokens: each warp by itself, so that none waits for its warpgroup.
//
// Codes are float16 as they lie: below 2^10 the bits of an integer are the subnormal number integer * 2^-24, which tensor
// cores multiply exactly. So a group of columns is summed as codes, and closed with its scale and zero point in float32:
// sum of v x = scale * (sum of c x) - scale * zero * (sum of x). One warp of the block sums the activations up for all.
#pragma once

#include "prompt_ring.cuh"

constexpr int kMmaTokens = 16;

// Sums of a unit's activations by group, float32 [groups][kMmaTokens], are a stage of their ring.
template <class F>
constexpr int kSumsBytes = F::kNumGroups * kMmaTokens * 4;

__device__ __forceinline__ void mma_half(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The same onto zeros.
__device__ __forceinline__ void first_mma_half(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%10,%10,%10};"
      : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(0.0f));
}

// Four matrices of eight rows of 16 bytes, each lane the address of a row.
__device__ __forceinline__ void load_matrices(uint32_t address, uint32_t (&v)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
               : "r"(address));
}

// Operand A of 16 columns: codes of both rows of a lane, from registers of `load_codes` (of 4 bits, raw, the first alone).
template <class F>
__device__ __forceinline__ void code_halves(uint32_t first, uint32_t second, uint32_t (&a)[4]) {
  if constexpr (F::kBits == 4) {
    const uint32_t odd = first >> 8;
    a[0] = first & 0x000f000fu, a[1] = first & 0x00f000f0u, a[2] = odd & 0x000f000fu, a[3] = odd & 0x00f000f0u;
  } else {
    if constexpr (F::kSigned) first ^= 0x80808080u, second ^= 0x80808080u;
    a[0] = __byte_perm(first, 0, 0x4240), a[1] = __byte_perm(second, 0, 0x4240);
    a[2] = __byte_perm(first, 0, 0x4341), a[3] = __byte_perm(second, 0, 0x4341);
  }
}

// What sums of codes and of activations are multiplied by, of row lane / 4 + 8 r8 in a group.
struct GroupFactors {
  float codes, x;
};

template <class F>
__device__ __forceinline__ GroupFactors group_factors(const uint32_t (&params)[kParameterWords<F>], int group, int r8,
                                                      float inverse_unit) {
  const float one = 16777216.0f / (r8 == 0 ? 1 : kSecondRowFactor<F::kBits>);  // 2^24
  if constexpr (F::kAffine) {
    const float2 v = __half22float2(as_half2(params[2 * group + r8]));
    return {v.x * (one * inverse_unit), v.y * inverse_unit};
  } else if constexpr (F::kSigned) {
    return {one, -128.0f};
  } else {
    const float scale = byte_to_float(params[group], 2 * r8), zero = byte_to_float(params[group], 2 * r8 + 1);
    return {scale * (one * (1 << (8 - F::kBits))), -scale * zero};
  }
}

// One warp: the sums of every stage of x, of `padded` tokens.
template <class F>
__device__ void sum_activations(const Ring& x, const Ring& sums, int count, int padded, int lane) {
  const int token = lane / 2, half = lane % 2;  // of a line
  Turn turn;
  for (int u = 0; u < count; ++u, turn.next(x)) {
    turn.wait_full(x);
    const uint32_t from = shared_address(turn.data(x)) + min(token, padded - 1) * 128;
    float* const to = reinterpret_cast<float*>(turn.data(sums)) + token;
    float total = 0;
#pragma unroll
    for (int line = 0; line < kLines; ++line) {
      float own = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint4 v = shared16(from + line * 128 * padded + ((4 * half + i) ^ (token % 8)) * 16);
        const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float2 pair = __half22float2(as_half2(words[j]));
          own += pair.x + pair.y;
        }
      }
      if constexpr (F::kNumGroups == 8) {
        to[(2 * line + half) * kMmaTokens] = own;
      } else {
        total += own + __shfl_xor_sync(~0u, own, 1);
        constexpr int kGroupLines = kLines / F::kNumGroups;
        if (line % kGroupLines == kGroupLines - 1) {
          if (half == 0) to[line / kGroupLines * kMmaTokens] = total;
          total = 0;
        }
      }
    }
    __syncwarp();
    if (lane == 0) mbarrier_arrive(&sums.full[turn.stage]);
  }
}

// As accumulate_wgmma, for one warp by itself; stages are units of all `padded` tokens.
template <class F>
__device__ void accumulate_mma(const Ring& weights, const Ring& x, const Ring& sums, int count, int at, int padded,
                               float inverse_unit, int lane, float (&acc)[kMmaTokens / 2]) {
  constexpr int kWords = kParameterWords<F>, kSteps = F::kGroup == 0 ? 8 : F::kGroup / 32;
  float c[2][4];
  // A lane's row of the matrices of 8 tokens x 8 columns: tokens first, then columns, in the order of two operands B.
  const int row = lane % 8, token = lane / 16 * 8 + row;
  const uint32_t tokens = shared_address(x.data) + token * 128, place = (lane / 8 % 2 ^ row) * 16;
  Turn unit;
  for (int u = 0; u < count; ++u, unit.next(weights)) {
    unit.wait_full(weights);
    unit.wait_full(x);
    unit.wait_full(sums);
    const uint32_t data = shared_address(unit.data(weights)) + at, from = tokens + unit.stage * x.stage_bytes;
    const uint32_t own_sums = shared_address(unit.data(sums)) + lane % 4 * 8;
    uint32_t params[kWords];
    if constexpr (!F::kSigned) {
#pragma unroll
      for (int i = 0; i < kWords; ++i)
        params[i] = __float_as_uint(shared4(data + kCodeBytes<F::kBits> + (lane / 4 * kWords + i) * 4));
    }
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      uint32_t codes[4][4];
      load_codes<F::kBits, true>([&](int n) { return shared16(data + n); }, [&](int n) { return shared8(data + n); }, pair, lane,
                                 codes);
#pragma unroll
      for (int piece = 0; piece < 4; ++piece) {  // of 32 columns
        const int step = 4 * pair + piece, group = step / kSteps;
#pragma unroll
        for (int i = 0; i < 2; ++i) {  // of 16
          uint32_t a[4], b[4];
          code_halves<F>(codes[piece][2 * i], codes[piece][2 * i + 1], a);
          load_matrices(from + step / 2 * 128 * padded + (place ^ (step % 2 * 2 + i) * 32), b);
          if (step % kSteps == 0 && i == 0) {
            first_mma_half(c[0], a, b[0], b[1]), first_mma_half(c[1], a, b[2], b[3]);
          } else {
            mma_half(c[0], a, b[0], b[1]), mma_half(c[1], a, b[2], b[3]);
          }
        }
        if (step % kSteps < kSteps - 1) continue;
        const GroupFactors factors[2] = {group_factors<F>(params, group, 0, inverse_unit),
                                         group_factors<F>(params, group, 1, inverse_unit)};
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const uint2 two = shared8(own_sums + (group * kMmaTokens + 8 * j) * 4);
          const float x_sums[2] = {__uint_as_float(two.x), __uint_as_float(two.y)};
#pragma unroll
          for (int i = 0; i < 4; ++i)
            acc[4 * j + i] = fmaf(c[j][i], factors[i / 2].codes, fmaf(x_sums[i % 2], factors[i / 2].x, acc[4 * j + i]));
        }
      }
    }
    __syncwarp();
    if (lane == 0) mbarrier_arrive(&weights.empty[unit.stage]);
  }
}
