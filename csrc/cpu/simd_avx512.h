// Sixteen floats or int32 in one AVX-512 register. The other simd_*.h offer the same names.
// They are in rbm itself: the functions of include/rbm/math.h are templates that call these.
#pragma once

#include <immintrin.h>

#include "include/rbm/math.h"
#include "include/rbm/philox.h"

namespace rbm {

struct F16;
struct I16 {
  __m512i v;
  I16() = default;
  I16(__m512i x) : v(x) {}
  explicit I16(int32_t x) : v(_mm512_set1_epi32(x)) {}
};
struct F16 {
  __m512 v;
  F16() = default;
  F16(__m512 x) : v(x) {}
  explicit F16(float x) : v(_mm512_set1_ps(x)) {}
};
template <> struct IntOf<F16> { using type = I16; };

RBM_HD F16 fma(F16 a, F16 b, F16 c) { return _mm512_fmadd_ps(a.v, b.v, c.v); }
RBM_HD F16 add(F16 a, F16 b) { return _mm512_add_ps(a.v, b.v); }
RBM_HD F16 sub(F16 a, F16 b) { return _mm512_sub_ps(a.v, b.v); }
RBM_HD F16 mul(F16 a, F16 b) { return _mm512_mul_ps(a.v, b.v); }
RBM_HD F16 div(F16 a, F16 b) { return _mm512_div_ps(a.v, b.v); }
RBM_HD F16 sqrt(F16 a) { return _mm512_sqrt_ps(a.v); }
RBM_HD F16 min(F16 a, F16 b) { return _mm512_min_ps(a.v, b.v); }
RBM_HD F16 max(F16 a, F16 b) { return _mm512_max_ps(a.v, b.v); }
RBM_HD I16 as_int(F16 a) { return _mm512_castps_si512(a.v); }
RBM_HD F16 as_float(I16 a) { return _mm512_castsi512_ps(a.v); }
RBM_HD I16 to_int(F16 a) { return _mm512_cvtps_epi32(a.v); }  // half to even
RBM_HD F16 to_float(I16 a) { return _mm512_cvtepi32_ps(a.v); }
RBM_HD I16 add(I16 a, I16 b) { return _mm512_add_epi32(a.v, b.v); }
RBM_HD I16 sub(I16 a, I16 b) { return _mm512_sub_epi32(a.v, b.v); }
RBM_HD I16 max(I16 a, I16 b) { return _mm512_max_epi32(a.v, b.v); }
RBM_HD I16 bit_and(I16 a, I16 b) { return _mm512_and_si512(a.v, b.v); }
RBM_HD I16 bit_xor(I16 a, I16 b) { return _mm512_xor_si512(a.v, b.v); }
template <int n> RBM_HD I16 shift_left(I16 a) { return _mm512_slli_epi32(a.v, n); }
template <int n> RBM_HD I16 shift_right(I16 a) { return _mm512_srai_epi32(a.v, n); }
template <int n> RBM_HD I16 shift_right_logical(I16 a) { return _mm512_srli_epi32(a.v, n); }

RBM_HD F16 load(const float* p) { return _mm512_loadu_ps(p); }
RBM_HD void store(float* p, F16 a) { _mm512_storeu_ps(p, a.v); }
RBM_HD I16 load(const int32_t* p) { return _mm512_loadu_si512(p); }
RBM_HD void store(int32_t* p, I16 a) { _mm512_storeu_si512(p, a.v); }
RBM_HD __mmask16 first_lanes(int n) { return static_cast<__mmask16>((1u << n) - 1u); }
RBM_HD F16 load(const float* p, int n) { return _mm512_maskz_loadu_ps(first_lanes(n), p); }
RBM_HD void store(float* p, F16 a, int n) { _mm512_mask_storeu_ps(p, first_lanes(n), a.v); }

RBM_HD uint32_t less(F16 a, F16 b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ); }
RBM_HD uint32_t equal(F16 a, F16 b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ); }
RBM_HD F16 select(uint32_t mask, F16 on, F16 off) {
  return _mm512_mask_blend_ps(static_cast<__mmask16>(mask), off.v, on.v);
}
// One byte a lane, 0 or 1.
RBM_HD void store_bytes(uint8_t* p, uint32_t mask) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_maskz_set1_epi8(static_cast<__mmask16>(mask), 1));
}
RBM_HD uint32_t load_bytes(const uint8_t* p, bool& binary) {
  const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  binary = binary && _mm_cmpgt_epu8_mask(x, _mm_set1_epi8(1)) == 0;
  return _mm_test_epi8_mask(x, x);
}

// Eight doubles, for sums that must stay exact beyond 2^31.
struct D8 {
  __m512d v;
};
constexpr int kRealRows = 6;  // rows of the real product kept in registers: 12 of 32
RBM_HD D8 load(const double* p) { return {_mm512_loadu_pd(p)}; }
RBM_HD void store(double* p, D8 a) { _mm512_storeu_pd(p, a.v); }
RBM_HD D8 splat(double x) { return {_mm512_set1_pd(x)}; }
RBM_HD D8 fma(D8 a, D8 b, D8 c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }
RBM_HD D8 add(D8 a, D8 b) { return {_mm512_add_pd(a.v, b.v)}; }
RBM_HD D8 sub(D8 a, D8 b) { return {_mm512_sub_pd(a.v, b.v)}; }
RBM_HD D8 mul(D8 a, D8 b) { return {_mm512_mul_pd(a.v, b.v)}; }
RBM_HD void widen(I16 a, D8& low, D8& high) {
  low = {_mm512_cvtepi32_pd(_mm512_castsi512_si256(a.v))};
  high = {_mm512_cvtepi32_pd(_mm512_extracti64x4_epi64(a.v, 1))};
}
RBM_HD void widen(F16 a, D8& low, D8& high) {
  low = {_mm512_cvtps_pd(_mm512_castps512_ps256(a.v))};
  high = {_mm512_cvtps_pd(_mm512_extractf32x8_ps(a.v, 1))};
}
RBM_HD F16 narrow(D8 low, D8 high) {
  return _mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps(low.v)), _mm512_cvtpd_ps(high.v), 1);
}

// Rows become columns: r[i] lane j <-> r[j] lane i.
RBM_HD void transpose(F16 r[16]) {
  __m512 t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i].v, r[i + 1].v);
    t[i + 1] = _mm512_unpackhi_ps(r[i].v, r[i + 1].v);
  }
  __m512d s[16];
  for (int i = 0; i < 16; i += 4) {
    for (int j = 0; j < 2; ++j) {
      const __m512d a = _mm512_castps_pd(t[i + j]), b = _mm512_castps_pd(t[i + 2 + j]);
      s[i + 2 * j] = _mm512_unpacklo_pd(a, b);
      s[i + 2 * j + 1] = _mm512_unpackhi_pd(a, b);
    }
  }
  for (int j = 0; j < 4; ++j) {
    const __m512d a = s[j], b = s[4 + j], c = s[8 + j], d = s[12 + j];
    const __m512d ab_even = _mm512_shuffle_f64x2(a, b, 0x88), ab_odd = _mm512_shuffle_f64x2(a, b, 0xdd);
    const __m512d cd_even = _mm512_shuffle_f64x2(c, d, 0x88), cd_odd = _mm512_shuffle_f64x2(c, d, 0xdd);
    r[j] = _mm512_castpd_ps(_mm512_shuffle_f64x2(ab_even, cd_even, 0x88));
    r[8 + j] = _mm512_castpd_ps(_mm512_shuffle_f64x2(ab_even, cd_even, 0xdd));
    r[4 + j] = _mm512_castpd_ps(_mm512_shuffle_f64x2(ab_odd, cd_odd, 0x88));
    r[12 + j] = _mm512_castpd_ps(_mm512_shuffle_f64x2(ab_odd, cd_odd, 0xdd));
  }
}

// The sixteen words of counters block .. block + 3 for each of two chains.
//
// Each 64-bit lane works on one counter (words in the low halves; what gathers in the high halves
// never reaches a low one). Even lanes serve the first chain and odd ones the second, so that two
// unpacks put the words in the order of the units.
RBM_HD void random_words(HalfSweepKey key, uint32_t block, uint32_t chain0, uint32_t chain1, I16 out[2]) {
  const __m512i m0 = _mm512_set1_epi64(kPhiloxM0), m1 = _mm512_set1_epi64(kPhiloxM1);
  __m512i c0 = _mm512_add_epi64(_mm512_set1_epi64(block), _mm512_setr_epi64(0, 0, 1, 1, 2, 2, 3, 3));
  __m512i c1 = _mm512_mask_set1_epi64(_mm512_set1_epi64(chain0), 0xAA, chain1);
  __m512i c2 = _mm512_set1_epi64(key.step), c3 = _mm512_set1_epi64(key.stream);
  uint32_t k0 = key.key0, k1 = key.key1;
  for (int round = 0; round < 10; ++round) {
    const __m512i p0 = _mm512_mul_epu32(c0, m0), p1 = _mm512_mul_epu32(c2, m1);
    c0 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p1, 32), c1, _mm512_set1_epi64(k0), 0x96);
    c2 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p0, 32), c3, _mm512_set1_epi64(k1), 0x96);
    c1 = p1;
    c3 = p0;
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  const __m512i first = _mm512_mask_shuffle_epi32(c0, 0xAAAA, c1, _MM_PERM_CCAA);   // words 0 and 1
  const __m512i second = _mm512_mask_shuffle_epi32(c2, 0xAAAA, c3, _MM_PERM_CCAA);  // words 2 and 3
  out[0] = _mm512_unpacklo_epi64(first, second);
  out[1] = _mm512_unpackhi_epi64(first, second);
}

// Even and odd lanes apart, and together again (for pairs of words).
RBM_HD I16 even_lanes(I16 a) { return _mm512_shuffle_epi32(a.v, _MM_PERM_CCAA); }
RBM_HD I16 odd_lanes(I16 a) { return _mm512_shuffle_epi32(a.v, _MM_PERM_DDBB); }
RBM_HD F16 interleave(F16 even, F16 odd) { return _mm512_mask_blend_ps(0xAAAA, even.v, odd.v); }

// Four groups of G bits each, spread to four 16-bit words and shifted left by 6.
RBM_HD uint64_t spread4(uint64_t bits, int G) {
  return _pdep_u64(bits, (((uint64_t{1} << G) - 1) << 6) * 0x0001000100010001ull);
}

}  // namespace rbm
