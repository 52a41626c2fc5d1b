// Products on the warpgroups' tensor cores: four warps' fragments are operand A as they lie in registers.
#pragma once

#include <utility>

#include "prompt_ring.cuh"

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

template <class Step, int... kSteps>
__device__ __forceinline__ void for_steps(Step step, std::integer_sequence<int, kSteps...>) {
  (step(std::integral_constant<int, kSteps>{}), ...);
}

// acc += the tile of 16 rows at byte `at` of each of `count` stages, times the activations: for token 8 j + 2 (lane % 4) + e and
// row lane / 4 + 8 r at 4 j + 2 r + e. All warps of a warpgroup call it together.
template <class F, int kTokens>
__device__ void accumulate_wgmma(const Ring& weights, const Ring& x, int count, int at, __half2 inverse_unit, int lane,
                                 float (&acc)[kTokens / 2]) {
  constexpr int kWords = kParameterWords<F>, kSteps = F::kGroup == 0 ? 8 : F::kGroup / 32;
  // While the tensor cores work on one set of fragments, the next one is unpacked. A set is 64 columns where registers allow
  // it, which halves the waits, or 32.
  constexpr int kPieces = kTokens <= 64 ? 2 : 1, kStepCount = 8 / kPieces;
  uint32_t fragments[2][kPieces][2][4], params[kWords], codes[4][4];
  HalfLine lines[2] = {};
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
        if (line_before >= 0 && lane < kWarpArrivals) mbarrier_arrive(&x.empty[line_before]);
        line_before = line.stage;
      }
      if constexpr (kHalf == 1 || kPieces == 2) line.next(x);
      if constexpr (kStep + 1 < kStepCount) {
        unpack(unit.data(weights) + at, std::integral_constant<int, kStep + 1>{});
      } else {
        warp_arrive(&weights.empty[unit.stage], lane);
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
}
