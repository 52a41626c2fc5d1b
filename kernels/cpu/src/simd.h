// Sixteen lanes of float or int32, whatever the processor: the compiler maps GCC's vector types onto
// AVX-512, two AVX2 registers or plain code. Only the integer dot product is written per instruction set.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

typedef float vf __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));
typedef uint8_t vb __attribute__((vector_size(64)));
typedef _Float16 vh __attribute__((vector_size(32)));

constexpr int kLanes = 16;

template <class V>
static inline V load(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class V>
static inline void store(void* p, V v) {
  std::memcpy(p, &v, sizeof v);
}
static inline vf splat(float x) { return vf{} + x; }
static inline vi splat_int(int32_t x) { return vi{} + x; }
static inline vf to_float(vi v) { return __builtin_convertvector(v, vf); }

// a * b + c. Written out, so that every instantiation of a kernel rounds alike.
static inline vf fma(vf a, vf b, vf c) {
#if defined(__AVX512F__)
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#else
  return a * b + c;
#endif
}

// Four bytes in every lane.
static inline vi splat_quad(const int8_t* p) {
  int32_t quad;
  std::memcpy(&quad, p, 4);
  return splat_int(quad);
}

static inline vf load_half(const void* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  const __m128i* h = static_cast<const __m128i*>(p);
  vf v;
  __m256 lo = _mm256_cvtph_ps(_mm_loadu_si128(h)), hi = _mm256_cvtph_ps(_mm_loadu_si128(h + 1));
  std::memcpy(&v, &lo, 32);
  std::memcpy(reinterpret_cast<char*>(&v) + 32, &hi, 32);
  return v;
#else
  return __builtin_convertvector(load<vh>(p), vf);
#endif
}

// Sixteen bytes as floats.
static inline vf load_bytes(const void* p) {
  typedef uint8_t v16 __attribute__((vector_size(16)));
  return to_float(__builtin_convertvector(load<v16>(p), vi));
}

// acc[lane] += sum over j in 0..3 of w[4 lane + j] * x[4 lane + j], w unsigned, x signed.
// kMaxCode is the largest w: AVX2's 16-bit intermediate sums saturate beyond 128.
template <int kMaxCode>
static inline vi dot4(vi acc, vb w, vi x) {
#if defined(__AVX512VNNI__)
  return (vi)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, (__m512i)x);
#elif defined(__AVX2__)
  __m256i part[2], xs[2], sum[2];
  std::memcpy(part, &w, 64);
  std::memcpy(xs, &x, 64);
  std::memcpy(sum, &acc, 64);
  const __m256i ones = _mm256_set1_epi16(1), low = _mm256_set1_epi8(15);
  for (int h = 0; h < 2; ++h) {
    if constexpr (kMaxCode < 128) {
      sum[h] = _mm256_add_epi32(sum[h], _mm256_madd_epi16(_mm256_maddubs_epi16(part[h], xs[h]), ones));
    } else {
      const __m256i lo = _mm256_and_si256(part[h], low);
      const __m256i hi = _mm256_and_si256(_mm256_srli_epi16(part[h], 4), low);
      const __m256i dots_lo = _mm256_madd_epi16(_mm256_maddubs_epi16(lo, xs[h]), ones);
      const __m256i dots_hi = _mm256_madd_epi16(_mm256_maddubs_epi16(hi, xs[h]), ones);
      sum[h] = _mm256_add_epi32(sum[h], _mm256_add_epi32(dots_lo, _mm256_slli_epi32(dots_hi, 4)));
    }
  }
  std::memcpy(&acc, sum, 64);
  return acc;
#else
  int8_t xs[64];
  std::memcpy(xs, &x, 64);
  for (int lane = 0; lane < kLanes; ++lane)
    for (int j = 0; j < 4; ++j) acc[lane] += static_cast<int32_t>(w[4 * lane + j]) * xs[4 * lane + j];
  return acc;
#endif
}

// e^x for x <= 0, relative error below 2e-7: split into 2^n * e^r with |r| <= ln2 / 2, degree-6 polynomial.
static inline vf exp_negative(vf x) {
  x = x < splat(-87.0f) ? splat(-87.0f) : x;
  const vf scaled = x * 1.44269504f;
  const vi n = __builtin_convertvector(scaled - 0.5f, vi);  // truncation towards zero rounds a negative to nearest
  const vf nf = to_float(n);
  const vf r = (x - nf * 0.693359375f) - nf * -2.12194440e-4f;
  vf p = splat(1.3981999e-3f);
  p = p * r + 8.3334519e-3f;
  p = p * r + 4.1665796e-2f;
  p = p * r + 1.6666666e-1f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const vi bits = (n + 127) << 23;
  return p * (vf)bits;
}

static inline vf tanh(vf x) {
  const vf e = exp_negative(x < 0 ? x + x : -(x + x));
  const vf t = (1.0f - e) / (e + 1.0f);
  return x < 0 ? -t : t;
}

static inline float sum(vf v) {
  float s[kLanes];
  std::memcpy(s, &v, sizeof v);
  for (int width = kLanes / 2; width; width /= 2)
    for (int i = 0; i < width; ++i) s[i] += s[i + width];
  return s[0];
}

static inline float max(vf v) {
  float m = v[0];
  for (int i = 1; i < kLanes; ++i) m = v[i] > m ? v[i] : m;
  return m;
}
