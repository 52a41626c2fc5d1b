// One unit: 16 rows x 256 columns of packed codes times up to 16 tokens of 16-bit activations, on the tensor
// cores. See kernels/cuda/packing.py for the order of the bytes.
//
// An activation code is 256 * high + low, both int8; they are two neighbouring columns of operand B, so that
// one mma.m16n8k32 covers four tokens. Integer sums are exact: a token's result is the same bits in any batch.
// Hopper runs integer ALU instructions at half the rate of float ones, and they bound this loop, so codes stay
// where they lie in a byte (the second row's are then multiples), and integers become floats by their bits.
#pragma once

#include <cuda_fp16.h>

#include "async.cuh"
#include "program.h"

constexpr int kMagicBits = 0x4b400000;      // 1.5 * 2^23 + v has the bits of v added to these, for |v| <= 2^22
constexpr float kMagic = 12582912.0f;

template <bool kSigned>
__device__ __forceinline__ void mma_int8(int (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (kSigned)
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <int kBits>
constexpr int kCodeBytes = kTileRows * kUnitColumns * kBits / 8;

// What the codes of rows 8 to 15 are multiplied by, for being left where they lie.
template <int kBits>
constexpr int kSecondRowFactor = kBits == 4 ? 16 : kBits < 4 ? 4 : 1;

// Bit of a byte of the 1-bit plane that belongs to mma m, register (h, r).
constexpr __host__ __device__ int plane_bit(int m, int h, int r) {
  constexpr int kBits[2][2][2] = {{{2, 4}, {3, 5}}, {{0, 6}, {1, 7}}};
  return kBits[m][h][r];
}

__device__ __forceinline__ uint32_t move_bits(uint32_t v, int from, int to) {
  return from < to ? v << (to - from) : v >> (from - to);
}

// Operand A of the four mma of columns 128 * pair .. + 127. load16(n), load8(n): as many bytes from n on in the unit.
// kRaw (4 bits): the first row's codes carry the second row's in their high bits.
template <int kBits, bool kRaw = false, class Load16, class Load8>
__device__ __forceinline__ void load_codes(Load16 load16, Load8 load8, int pair, int lane, uint32_t (&a)[4][4]) {
  static_assert(kBits == 2 || kBits == 3 || kBits == 4 || kBits == 5 || kBits == 6 || kBits == 8);
  if constexpr (kBits == 8) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint4 v = load16(((4 * pair + i) * 32 + lane) * 16);
      a[i][0] = v.x, a[i][1] = v.y, a[i][2] = v.z, a[i][3] = v.w;
    }
  } else if constexpr (kBits >= 4) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint4 v = load16(((2 * pair + i) * 32 + lane) * 16);
      const uint32_t w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        a[2 * i + j / 2][2 * (j % 2)] = kRaw && kBits == 4 ? w[j] : w[j] & 0x0f0f0f0fu;
        a[2 * i + j / 2][2 * (j % 2) + 1] = kBits == 4 ? w[j] & 0xf0f0f0f0u : (w[j] >> 4) & 0x0f0f0f0fu;
      }
    }
  } else {
    const uint4 v = load16((pair * 32 + lane) * 16);
    const uint32_t w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int r = 0; r < 4; ++r) a[i][r] = (r < 2 ? w[i] : w[i] >> 4) & (r % 2 == 0 ? 0x03030303u : 0x0c0c0c0cu);
  }
  constexpr int kLow = kBits == 8 ? 8 : kBits >= 4 ? 4 : 2;
  constexpr int kHigh = kCodeBytes<kLow>;
  if constexpr (kBits - kLow == 1) {
    const uint2 v = load8(kHigh + (2 * lane + pair) * 8);
    const uint32_t w[2] = {v.x, v.y};
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int to = kBits == 3 && r % 2 == 1 ? 4 : kLow;
        a[i][r] |= move_bits(w[i / 2], plane_bit(i % 2, r / 2, r % 2), to) & (0x01010101u << to);
      }
  } else if constexpr (kBits - kLow == 2) {
    const uint4 v = load16(kHigh + (pair * 32 + lane) * 16);
    const uint32_t w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int r = 0; r < 4; ++r) a[i][r] |= move_bits(w[i], 2 * r, kLow) & (0x03030303u << kLow);
  }
}

// Quantized activations of one unit: addresses in shared memory.
struct UnitActivations {
  uint32_t codes;   // int8 [4 k64 tiles][2 * tokens][4][16]: lane's bytes of both mma of the tile
  uint32_t sums;    // float32 [tokens][8]: of every 32 columns
  uint32_t scales;  // float32 [tokens]
};

// kGroup: columns that share parameters, 0 for the whole row (signed codes, no parameters). kAffine: float16 scale
// and offset a group, else uint8 scale and zero point (of one step in 2^(8 - kBits)).
template <int kBits_, int kGroup_, bool kAffine_>
struct UnitFormat {
  static constexpr int kBits = kBits_, kGroup = kGroup_;
  static constexpr bool kAffine = kAffine_;
  static constexpr bool kSigned = kGroup == 0;
  static constexpr int kNumGroups = kGroup == 0 ? 1 : kUnitColumns / kGroup;
  static constexpr int kUnitBytes = kCodeBytes<kBits> + (kSigned ? 0 : kTileRows * kNumGroups * (kAffine ? 4 : 2));
  static_assert(kGroup == 0 || kGroup == 32 || kGroup == 64 || kGroup == 128);
  static_assert(!kAffine || kGroup == 32);
  static_assert(kGroup != 0 || kBits == 8);
};

__device__ __forceinline__ float byte_to_float(uint32_t word, int byte) {
  return __uint_as_float(__byte_perm(word, 0x4b000000u, 0x7440 + byte)) - 8388608.0f;
}

// A group's parameters for both rows of a lane. W = scale * (factor * u - zero), or scale * u + offset.
struct GroupParameters {
  float scale[2], second[2];  // second: -zero, or offset
};

// All parameters of a lane's rows in a unit.
template <class F>
struct UnitParameters {
  static constexpr int kGroupWords = F::kAffine ? 2 : 1;
  static constexpr int kWords = F::kSigned ? 1 : F::kNumGroups * kGroupWords;
  uint32_t words[kWords];

  __device__ __forceinline__ explicit UnitParameters(uint32_t from) {
    if constexpr (F::kSigned) return;
    if constexpr (kWords % 4 == 0) {
#pragma unroll
      for (int i = 0; i < kWords / 4; ++i) {
        const uint4 v = shared16(from + 16 * i);
        words[4 * i] = v.x, words[4 * i + 1] = v.y, words[4 * i + 2] = v.z, words[4 * i + 3] = v.w;
      }
    } else {
      const uint2 v = shared8(from);
      words[0] = v.x, words[1] = v.y;
    }
  }
};

// From the word of a group, or (affine) the words of both rows.
template <class F>
__device__ __forceinline__ GroupParameters group_parameters(uint32_t word, uint32_t next) {
  if constexpr (F::kAffine) {
    const float2 first = __half22float2(*reinterpret_cast<const __half2*>(&word));
    const float2 second = __half22float2(*reinterpret_cast<const __half2*>(&next));
    return {{first.x, second.x}, {first.y, second.y}};
  } else {
    return {{byte_to_float(word, 0), byte_to_float(word, 2)}, {-byte_to_float(word, 1), -byte_to_float(word, 3)}};
  }
}

// u[r] += what the integer sums c of a group stand for; `sum`: of the activations' codes.
template <class F>
__device__ __forceinline__ void close_group(const int (&c)[4], const GroupParameters& p, float sum, float (&u)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    // Of 4 bits, the first row's sums contain the second row's (kRaw): at most 255 * 128 * 128, still below 2^22.
    const bool is_raw = F::kBits == 4 && r == 0;
    const float high = __int_as_float(c[2 * r]) - (is_raw ? __int_as_float(c[2]) : kMagic);
    const float low = __int_as_float(c[2 * r + 1]) - (is_raw ? __int_as_float(c[3]) : kMagic);
    constexpr float kSecond = 1.0f / kSecondRowFactor<F::kBits>;
    if constexpr (F::kSigned) {
      u[r] = fmaf(high, 256.0f, u[r] + low);
    } else if constexpr (F::kAffine) {
      const float step = r == 0 ? 1.0f : kSecond;
      u[r] = fmaf(fmaf(high, 256.0f * step, low * step), p.scale[r], fmaf(p.second[r], sum, u[r]));
    } else {
      const float step = (1 << (8 - F::kBits)) * (r == 0 ? 1.0f : kSecond);
      const float total = fmaf(high, 256.0f * step, fmaf(low, step, p.second[r] * sum));
      u[r] = fmaf(total, p.scale[r], u[r]);
    }
  }
}

// A lane's sum of one row and token, in the parts that the groups of a unit fall into where a unit has four groups or
// more: with one token the parts lie in the lanes of a quad (OneToken), and both ways give the same bits.
template <class F>
constexpr int kParts = !F::kSigned && F::kNumGroups >= 4 ? 4 : 1;

template <class F>
__device__ __forceinline__ float sum_of_parts(const float (&parts)[kParts<F>]) {
  if constexpr (kParts<F> == 1) return parts[0];
  else return (parts[0] + parts[1]) + (parts[2] + parts[3]);
}

// Moves u into a part of the sums.
template <class F>
__device__ __forceinline__ void add_scaled(float (&u)[2], float scale, int part, float (&acc)[2][kParts<F>]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    acc[r][part] = fmaf(u[r], scale, acc[r][part]);
    u[r] = 0;
  }
}

// acc[j][r] += unit * activations, for row lane / 4 + 8 r and token 4 j + lane % 4. Nothing is said of tokens beyond
// `num_tokens`. kOne: there is one token. unit, zeros (512 bytes of them): addresses in shared memory.
template <class F, int kMma, bool kOne>
__device__ __forceinline__ void unit_dot(uint32_t unit, const UnitActivations& x, int num_tokens, uint32_t zeros,
                                         int lane, float (&acc)[kMma][2][kParts<F>]) {
  constexpr int kGroup = F::kGroup;
  const int row = lane / 4, column = lane % 4;
  if constexpr (kOne) num_tokens = 1;
  const UnitParameters<F> params(unit + kCodeBytes<F::kBits> + row * UnitParameters<F>::kWords * 4);
  // Columns of operand B without a token read zeros.
  uint32_t codes[kMma], stride[kMma];
#pragma unroll
  for (int j = 0; j < kMma; ++j) {
    const int n = 8 * j + row;
    const bool is_there = n < 2 * num_tokens;
    codes[j] = is_there ? x.codes + (n * 4 + column) * 16 : zeros;
    stride[j] = kOne || is_there ? 128 * num_tokens : 0;
  }
  int c[kMma][4];
  float u[kMma][2] = {}, sums[kMma][8], scale[kMma];
#pragma unroll
  for (int j = 0; j < kMma; ++j) {
    const int token = kOne ? 0 : min(4 * j + column, num_tokens - 1);
    scale[j] = shared4(x.scales + token * 4);
    if constexpr (!F::kSigned) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint4 v = shared16(x.sums + token * 32 + 16 * i);
        sums[j][4 * i] = __uint_as_float(v.x), sums[j][4 * i + 1] = __uint_as_float(v.y);
        sums[j][4 * i + 2] = __uint_as_float(v.z), sums[j][4 * i + 3] = __uint_as_float(v.w);
      }
    }
  }
#pragma unroll
  for (int pair = 0; pair < 2; ++pair) {
    uint32_t a[4][4];
    load_codes<F::kBits, true>([&](int n) { return shared16(unit + n); }, [&](int n) { return shared8(unit + n); }, pair, lane, a);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int tile = 2 * pair + half;
      uint4 b[kMma];
#pragma unroll
      for (int j = 0; j < kMma; ++j) b[j] = shared16(codes[j] + tile * stride[j]);
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        const int step = 2 * tile + m;  // of 32 columns
        constexpr int kSteps = kGroup == 0 ? 8 : kGroup / 32;
        const bool opens = step % kSteps == 0, closes = step % kSteps == kSteps - 1;
#pragma unroll
        for (int j = 0; j < kMma; ++j) {
          if (opens) c[j][0] = c[j][1] = c[j][2] = c[j][3] = kMagicBits;
          mma_int8<F::kSigned>(c[j], a[2 * half + m], m == 0 ? b[j].x : b[j].z, m == 0 ? b[j].y : b[j].w);
        }
        if (closes) {
          constexpr int kWords = UnitParameters<F>::kGroupWords;
          const int group = step / kSteps;
          GroupParameters p{};
          if constexpr (!F::kSigned) p = group_parameters<F>(params.words[kWords * group], params.words[kWords * group + kWords - 1]);
#pragma unroll
          for (int j = 0; j < kMma; ++j) {
            float sum = 0;
            if constexpr (!F::kSigned) {
              sum = sums[j][step - kSteps + 1];
#pragma unroll
              for (int i = 1; i < kSteps; ++i) sum += sums[j][step - kSteps + 1 + i];
            }
            close_group<F>(c[j], p, sum, u[j]);
            if constexpr (kParts<F> > 1) add_scaled<F>(u[j], scale[j], group / (F::kNumGroups / kParts<F>), acc[j]);
          }
        }
      }
    }
  }
  if constexpr (kParts<F> == 1)
#pragma unroll
    for (int j = 0; j < kMma; ++j) add_scaled<F>(u[j], scale[j], 0, acc[j]);
}

// The same for one token, whose codes take two of operand B's eight columns. Each pair of columns gets the token's codes in
// the columns of its own quarter of a unit, and zeros elsewhere: so that one accumulator sums the quarters apart, and lane
// lane % 4 of a quad closes its own, with 40% fewer instructions.
template <class F>
struct OneToken {
  static_assert(kParts<F> == 4);
  static constexpr int kGroups = F::kNumGroups / 4;  // of a lane
  uint4 b[4] = {};  // by tile of 64 columns: zero but for the lane's own, and stays so
  float acc[2] = {};
  int lane, row, column;
  uint32_t own;  // place of the lane's codes in a tile's
  bool is_own[4];

  __device__ __forceinline__ explicit OneToken(int lane)
      : lane(lane), row(lane / 4), column(lane % 4), own((row % 2) * 64 + column * 16) {
#pragma unroll
    for (int tile = 0; tile < 4; ++tile) is_own[tile] = tile == row / 2;
  }

  __device__ __forceinline__ void add(uint32_t unit, const UnitActivations& x) {
    constexpr int kGroupWords = UnitParameters<F>::kGroupWords, kWords = kGroupWords * kGroups;  // of a lane and row pair
    const uint32_t at = unit + kCodeBytes<F::kBits> + (row * 4 + column) * kWords * 4;
    uint32_t words[kWords];
    if constexpr (kWords == 1) {
      words[0] = __float_as_uint(shared4(at));
    } else if constexpr (kWords == 2) {
      const uint2 v = shared8(at);
      words[0] = v.x, words[1] = v.y;
    } else {
      const uint4 v = shared16(at);
      words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
    }
    const uint2 both = shared8(x.sums + column * 8);  // of the quarter's two times 32 columns
    const float sums[2] = {__uint_as_float(both.x), __uint_as_float(both.y)};
    const float scale = shared4(x.scales);
#pragma unroll
    for (int tile = 0; tile < 4; ++tile)
      if (is_own[tile]) b[tile] = shared16(x.codes + tile * 128 + own);
    int c[4][4];  // even and odd 32 columns, twice: short chains of products
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) c[j][i] = j < kGroups ? kMagicBits : 0;
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      uint32_t a[4][4];
      load_codes<F::kBits, true>([&](int n) { return shared16(unit + n); }, [&](int n) { return shared8(unit + n); }, pair, lane, a);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint4& codes = b[2 * pair + half];
        mma_int8<false>(c[2 * half], a[2 * half], codes.x, codes.y);
        mma_int8<false>(c[2 * half + 1], a[2 * half + 1], codes.z, codes.w);
      }
    }
#pragma unroll
    for (int j = kGroups; j < 4; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) c[j % kGroups][i] += c[j][i];
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const GroupParameters p = group_parameters<F>(words[kGroupWords * g], words[kGroupWords * g + kGroupWords - 1]);
      float u[2] = {};
      close_group<F>(c[g], p, kGroups == 1 ? sums[0] + sums[1] : sums[g], u);
#pragma unroll
      for (int r = 0; r < 2; ++r) acc[r] = fmaf(u[r], scale, acc[r]);
    }
  }

  // The sums of rows lane / 4 and lane / 4 + 8, in the order of sum_of_parts; starts again.
  __device__ __forceinline__ void take(float (&sums)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sums[r] = acc[r] + __shfl_xor_sync(~0u, acc[r], 1);
      sums[r] += __shfl_xor_sync(~0u, sums[r], 2);
      acc[r] = 0;
    }
  }
};

// Calls fn with the format of that number; kernels/cuda/packing.py counts the same way.
#pragma nv_exec_check_disable
template <class Fn>
__host__ __device__ __forceinline__ bool with_format(int format, Fn fn) {
  switch (format) {
    case 0: fn(UnitFormat<2, 32, false>{}); return true;
    case 1: fn(UnitFormat<2, 64, false>{}); return true;
    case 2: fn(UnitFormat<3, 64, false>{}); return true;
    case 3: fn(UnitFormat<3, 128, false>{}); return true;
    case 4: fn(UnitFormat<4, 64, false>{}); return true;
    case 5: fn(UnitFormat<4, 128, false>{}); return true;
    case 6: fn(UnitFormat<5, 128, false>{}); return true;
    case 7: fn(UnitFormat<6, 128, false>{}); return true;
    case 8: fn(UnitFormat<8, 0, false>{}); return true;
    case 9: fn(UnitFormat<4, 32, true>{}); return true;
    case 10: fn(UnitFormat<5, 32, true>{}); return true;
    case 11: fn(UnitFormat<8, 32, true>{}); return true;
    case 12: fn(UnitFormat<2, 128, false>{}); return true;
    default: return false;
  }
}

__device__ __forceinline__ float activate(float gate, int activation) {
  if (activation == kSilu) return gate / (1.0f + __expf(-gate));
  const float inner = 0.7978845608f * (gate + 0.044715f * gate * gate * gate);
  return gate / (1.0f + __expf(-2.0f * inner));  // gelu's tanh form: x / 2 * (1 + tanh(inner))
}
