// Products of up to 16 tokens.
//
// Codes are float16 as they lie: below 2^10 the bits of an integer are the subnormal number integer * 2^-24, which tensor
// cores multiply exactly. So a group of columns is summed as codes, and closed with its scale in float32; zero points follow:
// sum of v x = scale * (sum of c x) - scale * zero * (sum of x). The second part is one more product for all groups of a
// unit, of scale * zero, whose two bytes are subnormal numbers as well, and the groups' sums of activations. One warp of
// the block sums these up for all.
#pragma once

#include "mma.cuh"
#include "prompt_wgmma.cuh"

constexpr int kNarrowTokens = 16;

// A unit of activations: kLines lines of 128 bytes a token.
constexpr int kXUnitBytes = kLines * kNarrowTokens * 128;

// Groups' sums of activations are counted in 2^16, so that 256 times the largest one is still a float16.
constexpr float kSumUnit = 65536.0f;

// What `accumulate_narrow` counts in.
template <class F>
constexpr float kProductUnit = F::kAffine ? kSumUnit : kSumUnit * 16777216.0f;

// A stage of the ring of sums: operand B of a product of 16 for each four groups and eight tokens.
template <class F>
constexpr int kSumSets = F::kNumGroups > 4 ? 2 : 1;
template <class F>
constexpr int kSumsBytes = kSumSets<F> * 2 * 32 * 8;

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

// What a group's sum of codes is multiplied by, of row lane / 4 + 8 r8.
template <class F>
__device__ __forceinline__ float group_factor(const uint32_t (&params)[kParameterWords<F>], int group, int r8,
                                              float inverse_unit) {
  const float one = 16777216.0f / kProductUnit<F> / (r8 == 0 ? 1 : kSecondRowFactor<F::kBits>);
  if constexpr (F::kAffine) {
    return __low2float(as_half2(params[2 * group + r8])) * (one * inverse_unit);
  } else if constexpr (F::kSigned) {
    return one;
  } else {  // a byte behind the leading bit of 2^23
    const float raised = __uint_as_float(__byte_perm(params[group], 0x4b000000u, 0x7440 + 2 * r8)), step = one * (1 << (8 - F::kBits));
    return fmaf(raised, step, -8388608.0f * step);
  }
}

// Operand A that goes with the sums of groups 4 set .. 4 set + 3: lane % 4 is the group, the columns two factors of its sum
// and of 256 times that, then the same of what float16 leaves of it. row: address of the parameters of row lane / 4.
template <class F>
__device__ __forceinline__ void zero_points(uint32_t row, int set, float inverse_unit, int lane, uint32_t (&a)[4]) {
  const int group = 4 * set + lane % 4;
  a[0] = a[1] = 0;
  if constexpr (F::kSigned) {
    if (group == 0) a[0] = a[1] = 0x8080u;  // -128
  } else if (group < F::kNumGroups) {
    if constexpr (F::kAffine) {
      const uint2 words = shared8(row + 8 * group);
      const __half2 unit = __float2half2_rn(inverse_unit);
      a[0] = bits_of(__hmul2(as_half2(words.x), unit)) >> 16, a[1] = bits_of(__hmul2(as_half2(words.y), unit)) >> 16;
    } else {
      const uint32_t word = __float_as_uint(shared4(row + 4 * group)), zeros = word >> 8;
      a[0] = __byte_perm(__dp4a(word, zeros & 0xffu, 0u), 0x80808080u, 0x4140);
      a[1] = __byte_perm(__dp4a(word, zeros & 0xff0000u, 0u), 0x80808080u, 0x4140);
    }
  }
  a[2] = a[0], a[3] = a[1];
}

// Where a lane reads operands B of a unit of activations, all tokens at once: its row of the matrices of 8 tokens x 8
// columns, tokens first, then columns, in the order of two operands B.
struct XPlace {
  uint32_t first;

  __device__ __forceinline__ XPlace(const Ring& x, int lane) {
    const int row = lane % 8, token = lane / 16 * 8 + row;
    first = kept(shared_address(x.data) + token * 128 + (lane / 8 % 2 ^ row) * 16);
  }

  // By 16 columns of 64, in a stage.
  __device__ __forceinline__ void of_stage(int stage, uint32_t (&places)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) places[i] = (first + stage * kXUnitBytes) ^ i * 32;  // stages begin at multiples of 128
  }
};

// Columns 32 step + 16 i of a unit.
__device__ __forceinline__ void load_x(const uint32_t (&places)[4], int step, int i, uint32_t (&b)[4]) {
  load_matrices(places[step % 2 * 2 + i] + step / 2 * (128 * kNarrowTokens), b);
}

// One warp: the sums of every stage of x, as products with ones.
template <class F>
__device__ void sum_activations(const Ring& x, const Ring& sums, int count, int lane) {
  constexpr int kSteps = F::kGroup == 0 ? 8 : F::kGroup / 32;
  const uint32_t one = kept(0x3c003c00u), ones[4] = {one, one, one, one};
  const XPlace place(x, lane);
  Turn turn;
  for (int u = 0; u < count; ++u, turn.next(x)) {
    turn.wait_full(x);
    uint32_t places[4];
    place.of_stage(turn.stage, places);
    float own[kSumSets<F>][2][2] = {}, c[2][4];  // of group lane / 4 of a set and tokens 8 j + 2 (lane % 4) + e
#pragma unroll
    for (int step = 0; step < 8; ++step) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        uint32_t b[4];
        load_x(places, step, i, b);
        if (step % kSteps == 0 && i == 0) {
          first_mma_half(c[0], ones, b[0], b[1]), first_mma_half(c[1], ones, b[2], b[3]);
        } else {
          mma_half(c[0], ones, b[0], b[1]), mma_half(c[1], ones, b[2], b[3]);
        }
      }
      const int group = step / kSteps;
      if (step % kSteps == kSteps - 1 && lane / 4 == group % 4)
#pragma unroll
        for (int j = 0; j < 2; ++j) own[group / 4][j][0] = c[j][0], own[group / 4][j][1] = c[j][1];
    }
    if (lane < 16) {
      uint2* const to = reinterpret_cast<uint2*>(turn.data(sums)) + lane % 4 * 8 + lane / 4;
#pragma unroll
      for (int set = 0; set < kSumSets<F>; ++set)
#pragma unroll
        for (int j = 0; j < 2; ++j)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const float sum = own[set][j][e] * (1 / kSumUnit), high = __half2float(__float2half_rn(sum)), low = sum - high;
            to[(2 * set + j) * 32 + 4 * e] =
                make_uint2(bits_of(__floats2half2_rn(high, 256 * high)), bits_of(__floats2half2_rn(low, 256 * low)));
          }
    }
    warp_arrive(&sums.full[turn.stage], lane);
  }
}

// d += a * b, or (not kOnto) a * b.
template <bool kOnto>
__device__ __forceinline__ void wgmma_16(float (&d)[8], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n16k16.f32.f16.f16 {%0, %1, %2, %3, %4, %5, %6, %7}, {%8, %9, %10, %11}, %12, %13, 1, 1, 0;"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kOnto));
}

// What is read of v afterwards is not read before.
__device__ __forceinline__ void settle(float (&v)[8]) {
  asm volatile("" : "+f"(v[0]), "+f"(v[1]), "+f"(v[2]), "+f"(v[3]), "+f"(v[4]), "+f"(v[5]), "+f"(v[6]), "+f"(v[7])::"memory");
}

// As accumulate_wgmma; stages are units of all tokens, and a warp has up to kSets tiles, `own` of them in this block (the same
// number for all warps of a warpgroup). While the tensor cores sum up the codes of one step, 64 columns (or a group of 32), the
// next one's are unpacked, and the one before is closed with its scale.
template <class F, int kSets>
__device__ void accumulate_narrow(const Ring& weights, const Ring& x, const Ring& sums, int count, const int (&at)[kSets], int own,
                                  float inverse_unit, int lane, float (&acc)[kSets][kNarrowTokens / 2]) {
  constexpr int kWords = kParameterWords<F>, kColumns = F::kGroup == 32 ? 32 : 64;
  constexpr int kStepCount = kUnitColumns / kColumns, kProducts = kColumns / 16;  // of a unit, of a step
  const uint32_t first_sums = kept(shared_address(sums.data) + lane * 8);
  const uint32_t first_line = descriptor(shared_address(x.data));
  float total[kSets][2][4] = {}, c[2][8], factors[2][2];
  uint32_t a[2][kProducts][4], codes[4][4], params[kWords];
  Turn unit;
  const auto tile = [&](int set, uint32_t here, uint32_t line) {
    const uint32_t codes_at = here + lane * 16, row = here + kCodeBytes<F::kBits> + lane / 4 * kWords * 4;
    const auto close = [&](int step) {
      settle(c[step % 2]);
#pragma unroll
      for (int i = 0; i < 8; ++i)
        total[set][i / 4][i % 4] = fmaf(c[step % 2][i], factors[step % 2][i / 2 % 2], total[set][i / 4][i % 4]);
    };
    const auto step = [&](auto number) {
      constexpr int kStep = decltype(number)::value, kFirst = kStep * kColumns;
      if constexpr (kStep == 0) {
        const UnitParameters<F> read(row);
#pragma unroll
        for (int i = 0; i < kWords; ++i) params[i] = read.words[i];
      }
      if constexpr (kFirst % 128 == 0)
        load_codes<F::kBits, true>([&](int n) { return shared16(codes_at + n); }, [&](int n) { return shared8(codes_at + n); },
                                   kFirst / 128, 0, codes);
      uint32_t(&operand)[kProducts][4] = a[kStep % 2];
#pragma unroll
      for (int i = 0; i < kProducts; ++i) {
        const uint32_t(&of)[4] = codes[(kFirst / 32 + i / 2) % 4];
        code_halves<F>(of[i % 2 * 2], of[i % 2 * 2 + 1], operand[i]);
      }
#pragma unroll
      for (int r8 = 0; r8 < 2; ++r8)
        factors[kStep % 2][r8] = group_factor<F>(params, F::kGroup == 0 ? 0 : kFirst / F::kGroup, r8, inverse_unit);
      const uint32_t b = line + kFirst / 64 * (128 * kNarrowTokens / 16) + kFirst % 64 / 8;
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < kProducts; ++i) {
        if (i == 0) wgmma_16<false>(c[kStep % 2], operand[i], whole(b));
        else wgmma_16<true>(c[kStep % 2], operand[i], whole(b + 2 * i));
      }
      wgmma_commit();
      if constexpr (kStep > 0) {
        wgmma_wait<1>();
        close(kStep - 1);
      }
    };
    for_steps(step, std::make_integer_sequence<int, kStepCount>{});
    unit.wait_full(sums);
    const uint32_t own_sums = first_sums + unit.stage * kSumsBytes<F>;
#pragma unroll
    for (int i = 0; i < kSumSets<F>; ++i) {
      uint2 of_set[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) of_set[j] = shared8(own_sums + (2 * i + j) * 256);
      uint32_t zeros[4];
      zero_points<F>(row, i, inverse_unit, lane, zeros);
#pragma unroll
      for (int j = 0; j < 2; ++j) mma_half(total[set][j], zeros, of_set[j].x, of_set[j].y);
    }
    wgmma_wait<0>();
    close(kStepCount - 1);
  };
  for (int u = 0; u < count; ++u, unit.next(weights)) {
    unit.wait_full(weights, x);
    const uint32_t here = shared_address(weights.data) + unit.stage * weights.stage_bytes;
    const uint32_t line = first_line + unit.stage * (kXUnitBytes / 16);
#pragma unroll
    for (int set = 0; set < kSets; ++set)
      if (kSets == 1 || set < own) tile(set, here + at[set], line);
    warp_arrive(&weights.empty[unit.stage], lane);
  }
#pragma unroll
  for (int set = 0; set < kSets; ++set)
#pragma unroll
    for (int i = 0; i < kNarrowTokens / 2; ++i) acc[set][i] = total[set][i / 4][i % 4] * kProductUnit<F>;
}
