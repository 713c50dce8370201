// Sixteen floats or int32 in two AVX2 registers. The other simd_*.h offer the same names.
// They are in rbm itself: the functions of include/rbm/math.h are templates that call these.
#pragma once

#include <immintrin.h>

#include "include/rbm/math.h"
#include "include/rbm/philox.h"

namespace rbm {

struct I16 {
  __m256i lo, hi;
  I16() = default;
  I16(__m256i a, __m256i b) : lo(a), hi(b) {}
  explicit I16(int32_t x) : lo(_mm256_set1_epi32(x)), hi(lo) {}
};
struct F16 {
  __m256 lo, hi;
  F16() = default;
  F16(__m256 a, __m256 b) : lo(a), hi(b) {}
  explicit F16(float x) : lo(_mm256_set1_ps(x)), hi(lo) {}
};
template <> struct IntOf<F16> { using type = I16; };

#define RBM_BOTH(expression_lo, expression_hi) \
  { return {expression_lo, expression_hi}; }
RBM_HD F16 fma(F16 a, F16 b, F16 c) RBM_BOTH(_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi))
RBM_HD F16 add(F16 a, F16 b) RBM_BOTH(_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi))
RBM_HD F16 sub(F16 a, F16 b) RBM_BOTH(_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi))
RBM_HD F16 mul(F16 a, F16 b) RBM_BOTH(_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi))
RBM_HD F16 div(F16 a, F16 b) RBM_BOTH(_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi))
RBM_HD F16 sqrt(F16 a) RBM_BOTH(_mm256_sqrt_ps(a.lo), _mm256_sqrt_ps(a.hi))
RBM_HD F16 min(F16 a, F16 b) RBM_BOTH(_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi))
RBM_HD F16 max(F16 a, F16 b) RBM_BOTH(_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi))
RBM_HD I16 as_int(F16 a) RBM_BOTH(_mm256_castps_si256(a.lo), _mm256_castps_si256(a.hi))
RBM_HD F16 as_float(I16 a) RBM_BOTH(_mm256_castsi256_ps(a.lo), _mm256_castsi256_ps(a.hi))
RBM_HD I16 to_int(F16 a) RBM_BOTH(_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi))  // half to even
RBM_HD F16 to_float(I16 a) RBM_BOTH(_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi))
RBM_HD I16 add(I16 a, I16 b) RBM_BOTH(_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi))
RBM_HD I16 sub(I16 a, I16 b) RBM_BOTH(_mm256_sub_epi32(a.lo, b.lo), _mm256_sub_epi32(a.hi, b.hi))
RBM_HD I16 max(I16 a, I16 b) RBM_BOTH(_mm256_max_epi32(a.lo, b.lo), _mm256_max_epi32(a.hi, b.hi))
RBM_HD I16 bit_and(I16 a, I16 b) RBM_BOTH(_mm256_and_si256(a.lo, b.lo), _mm256_and_si256(a.hi, b.hi))
RBM_HD I16 bit_xor(I16 a, I16 b) RBM_BOTH(_mm256_xor_si256(a.lo, b.lo), _mm256_xor_si256(a.hi, b.hi))
template <int n> RBM_HD I16 shift_left(I16 a) RBM_BOTH(_mm256_slli_epi32(a.lo, n), _mm256_slli_epi32(a.hi, n))
template <int n> RBM_HD I16 shift_right(I16 a) RBM_BOTH(_mm256_srai_epi32(a.lo, n), _mm256_srai_epi32(a.hi, n))
template <int n> RBM_HD I16 shift_right_logical(I16 a) RBM_BOTH(_mm256_srli_epi32(a.lo, n), _mm256_srli_epi32(a.hi, n))

RBM_HD F16 load(const float* p) RBM_BOTH(_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8))
RBM_HD void store(float* p, F16 a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
RBM_HD __m256i load_half(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
RBM_HD I16 load(const int32_t* p) RBM_BOTH(load_half(p), load_half(p + 8))
RBM_HD void store(int32_t* p, I16 a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.lo);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 8), a.hi);
}
RBM_HD __m256i first_lanes(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
RBM_HD F16 load(const float* p, int n) RBM_BOTH(_mm256_maskload_ps(p, first_lanes(n)), _mm256_maskload_ps(p + 8, first_lanes(n - 8)))
RBM_HD void store(float* p, F16 a, int n) {
  _mm256_maskstore_ps(p, first_lanes(n), a.lo);
  _mm256_maskstore_ps(p + 8, first_lanes(n - 8), a.hi);
}

RBM_HD uint32_t sign_bits(__m256 lo, __m256 hi) {
  return static_cast<uint32_t>(_mm256_movemask_ps(lo)) | static_cast<uint32_t>(_mm256_movemask_ps(hi)) << 8;
}
RBM_HD uint32_t less(F16 a, F16 b) {
  return sign_bits(_mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ), _mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ));
}
RBM_HD uint32_t equal(F16 a, F16 b) {
  return sign_bits(_mm256_cmp_ps(a.lo, b.lo, _CMP_EQ_OQ), _mm256_cmp_ps(a.hi, b.hi, _CMP_EQ_OQ));
}
RBM_HD __m256 lanes_of(uint32_t mask) {
  const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(mask)), bit), bit));
}
RBM_HD F16 select(uint32_t mask, F16 on, F16 off) RBM_BOTH(_mm256_blendv_ps(off.lo, on.lo, lanes_of(mask)), _mm256_blendv_ps(off.hi, on.hi, lanes_of(mask >> 8)))
RBM_HD void store_bytes(uint8_t* p, uint32_t mask) {
  const uint64_t ones = 0x0101010101010101ull;
  const uint64_t lo = _pdep_u64(mask, ones), hi = _pdep_u64(mask >> 8, ones);
  std::memcpy(p, &lo, 8);
  std::memcpy(p + 8, &hi, 8);
}
RBM_HD uint32_t load_bytes(const uint8_t* p, bool& binary) {
  const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), zero = _mm_setzero_si128();
  const uint32_t off = static_cast<uint32_t>(_mm_movemask_epi8(_mm_cmpeq_epi8(x, zero)));
  const uint32_t one = static_cast<uint32_t>(_mm_movemask_epi8(_mm_cmpeq_epi8(x, _mm_set1_epi8(1))));
  binary = binary && (off | one) == 0xFFFFu;
  return ~off & 0xFFFFu;
}

// Eight doubles, for sums that must stay exact beyond 2^31.
struct D8 {
  __m256d lo, hi;
};
constexpr int kRealRows = 2;  // rows of the real product kept in registers: 8 of 16
RBM_HD D8 load(const double* p) RBM_BOTH(_mm256_loadu_pd(p), _mm256_loadu_pd(p + 4))
RBM_HD void store(double* p, D8 a) {
  _mm256_storeu_pd(p, a.lo);
  _mm256_storeu_pd(p + 4, a.hi);
}
RBM_HD D8 splat(double x) RBM_BOTH(_mm256_set1_pd(x), _mm256_set1_pd(x))
RBM_HD D8 fma(D8 a, D8 b, D8 c) RBM_BOTH(_mm256_fmadd_pd(a.lo, b.lo, c.lo), _mm256_fmadd_pd(a.hi, b.hi, c.hi))
RBM_HD D8 add(D8 a, D8 b) RBM_BOTH(_mm256_add_pd(a.lo, b.lo), _mm256_add_pd(a.hi, b.hi))
RBM_HD D8 sub(D8 a, D8 b) RBM_BOTH(_mm256_sub_pd(a.lo, b.lo), _mm256_sub_pd(a.hi, b.hi))
RBM_HD D8 mul(D8 a, D8 b) RBM_BOTH(_mm256_mul_pd(a.lo, b.lo), _mm256_mul_pd(a.hi, b.hi))
RBM_HD D8 widen_half(__m256i a) RBM_BOTH(_mm256_cvtepi32_pd(_mm256_castsi256_si128(a)), _mm256_cvtepi32_pd(_mm256_extracti128_si256(a, 1)))
RBM_HD D8 widen_half(__m256 a) RBM_BOTH(_mm256_cvtps_pd(_mm256_castps256_ps128(a)), _mm256_cvtps_pd(_mm256_extractf128_ps(a, 1)))
RBM_HD void widen(I16 a, D8& low, D8& high) {
  low = widen_half(a.lo);
  high = widen_half(a.hi);
}
RBM_HD void widen(F16 a, D8& low, D8& high) {
  low = widen_half(a.lo);
  high = widen_half(a.hi);
}
RBM_HD __m256 narrow_half(D8 a) { return _mm256_set_m128(_mm256_cvtpd_ps(a.hi), _mm256_cvtpd_ps(a.lo)); }
RBM_HD F16 narrow(D8 low, D8 high) RBM_BOTH(narrow_half(low), narrow_half(high))
#undef RBM_BOTH

// Rows become columns, by four 8x8 transposes.
RBM_HD void transpose8(const __m256 in[8], __m256 out[8]) {
  __m256 t[8], s[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(in[i], in[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(in[i], in[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    for (int j = 0; j < 2; ++j) {
      s[i + 2 * j] = _mm256_shuffle_ps(t[i + j], t[i + 2 + j], 0x44);
      s[i + 2 * j + 1] = _mm256_shuffle_ps(t[i + j], t[i + 2 + j], 0xee);
    }
  }
  for (int j = 0; j < 4; ++j) {
    out[j] = _mm256_permute2f128_ps(s[j], s[4 + j], 0x20);
    out[4 + j] = _mm256_permute2f128_ps(s[j], s[4 + j], 0x31);
  }
}
RBM_HD void transpose(F16 r[16]) {
  __m256 in[4][8], out[4][8];
  for (int i = 0; i < 8; ++i) {
    in[0][i] = r[i].lo;
    in[1][i] = r[i].hi;
    in[2][i] = r[8 + i].lo;
    in[3][i] = r[8 + i].hi;
  }
  for (int q = 0; q < 4; ++q) transpose8(in[q], out[q]);
  for (int i = 0; i < 8; ++i) {
    r[i] = {out[0][i], out[2][i]};
    r[8 + i] = {out[1][i], out[3][i]};
  }
}

// The sixteen words of counters block .. block + 3 for each of two chains; see simd_avx512.h.
RBM_HD void random_half(HalfSweepKey key, uint32_t block, uint32_t chain0, uint32_t chain1, __m256i& first_chain,
                        __m256i& second_chain) {
  const __m256i m0 = _mm256_set1_epi64x(kPhiloxM0), m1 = _mm256_set1_epi64x(kPhiloxM1);
  __m256i c0 = _mm256_add_epi64(_mm256_set1_epi64x(block), _mm256_setr_epi64x(0, 0, 1, 1));
  __m256i c1 = _mm256_setr_epi64x(chain0, chain1, chain0, chain1);
  __m256i c2 = _mm256_set1_epi64x(key.step), c3 = _mm256_set1_epi64x(key.stream);
  uint32_t k0 = key.key0, k1 = key.key1;
  for (int round = 0; round < 10; ++round) {
    const __m256i p0 = _mm256_mul_epu32(c0, m0), p1 = _mm256_mul_epu32(c2, m1);
    c0 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p1, 32), c1), _mm256_set1_epi64x(k0));
    c2 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p0, 32), c3), _mm256_set1_epi64x(k1));
    c1 = p1;
    c3 = p0;
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  const __m256i first = _mm256_blend_epi32(c0, _mm256_slli_epi64(c1, 32), 0xAA);   // words 0 and 1
  const __m256i second = _mm256_blend_epi32(c2, _mm256_slli_epi64(c3, 32), 0xAA);  // words 2 and 3
  first_chain = _mm256_unpacklo_epi64(first, second);
  second_chain = _mm256_unpackhi_epi64(first, second);
}
RBM_HD void random_words(HalfSweepKey key, uint32_t block, uint32_t chain0, uint32_t chain1, I16 out[2]) {
  random_half(key, block, chain0, chain1, out[0].lo, out[1].lo);
  random_half(key, block + 2, chain0, chain1, out[0].hi, out[1].hi);
}

RBM_HD I16 even_lanes(I16 a) { return {_mm256_shuffle_epi32(a.lo, 0xa0), _mm256_shuffle_epi32(a.hi, 0xa0)}; }
RBM_HD I16 odd_lanes(I16 a) { return {_mm256_shuffle_epi32(a.lo, 0xf5), _mm256_shuffle_epi32(a.hi, 0xf5)}; }
RBM_HD F16 interleave(F16 even, F16 odd) {
  return {_mm256_blend_ps(even.lo, odd.lo, 0xAA), _mm256_blend_ps(even.hi, odd.hi, 0xAA)};
}

RBM_HD uint64_t spread4(uint64_t bits, int G) {
  return _pdep_u64(bits, (((uint64_t{1} << G) - 1) << 6) * 0x0001000100010001ull);
}

}  // namespace rbm
