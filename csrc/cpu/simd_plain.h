// Sixteen floats or int32 in arrays: what any C++ compiler understands, and vectorizes as it can.
// The other simd_*.h offer the same names. They are in rbm itself: the functions of
// include/rbm/math.h are templates that call these.
#pragma once

#include "include/rbm/math.h"
#include "include/rbm/philox.h"

namespace rbm {

struct I16 {
  int32_t v[16];
  I16() = default;
  explicit I16(int32_t x) {
    for (int i = 0; i < 16; ++i) v[i] = x;
  }
};
struct F16 {
  float v[16];
  F16() = default;
  explicit F16(float x) {
    for (int i = 0; i < 16; ++i) v[i] = x;
  }
};
template <> struct IntOf<F16> { using type = I16; };

#define RBM_LANES(Result, expression)                 \
  {                                                   \
    Result r;                                         \
    for (int i = 0; i < 16; ++i) r.v[i] = expression; \
    return r;                                         \
  }

// a * b + c with one rounding: exact product and a sum rounded to odd in double make the rounding
// to float the only one (Boldo and Melquiond 2008). A library call per lane would not vectorize.
RBM_HD float fma_lane(float a, float b, float c) {
#ifdef __FMA__
  return std::fma(a, b, c);
#else
  const double product = static_cast<double>(a) * b, addend = c;
  double total = product + addend;
  const double virt = total - product;
  const double error = (product - (total - virt)) + (addend - virt);
  int64_t bits;
  std::memcpy(&bits, &total, 8);
  const int64_t step = (error > 0) == (total > 0) ? 1 : -1;
  bits += (error != 0 && (bits & 1) == 0) ? step : 0;
  std::memcpy(&total, &bits, 8);
  return static_cast<float>(total);
#endif
}
RBM_HD F16 fma(const F16& a, const F16& b, const F16& c) RBM_LANES(F16, fma_lane(a.v[i], b.v[i], c.v[i]))
RBM_HD F16 add(const F16& a, const F16& b) RBM_LANES(F16, a.v[i] + b.v[i])
RBM_HD F16 sub(const F16& a, const F16& b) RBM_LANES(F16, a.v[i] - b.v[i])
RBM_HD F16 mul(const F16& a, const F16& b) RBM_LANES(F16, a.v[i] * b.v[i])
RBM_HD F16 div(const F16& a, const F16& b) RBM_LANES(F16, a.v[i] / b.v[i])
RBM_HD F16 sqrt(const F16& a) RBM_LANES(F16, std::sqrt(a.v[i]))
RBM_HD F16 min(const F16& a, const F16& b) RBM_LANES(F16, a.v[i] < b.v[i] ? a.v[i] : b.v[i])
RBM_HD F16 max(const F16& a, const F16& b) RBM_LANES(F16, a.v[i] > b.v[i] ? a.v[i] : b.v[i])
RBM_HD I16 as_int(const F16& a) RBM_LANES(I16, as_int(a.v[i]))
RBM_HD F16 as_float(const I16& a) RBM_LANES(F16, as_float(a.v[i]))
// Half to even for |a| <= 2^23: adding 1.5 * 2^52 in double leaves no fraction.
RBM_HD I16 to_int(const F16& a) RBM_LANES(I16, static_cast<int32_t>((static_cast<double>(a.v[i]) + 6755399441055744.0) - 6755399441055744.0))
RBM_HD F16 to_float(const I16& a) RBM_LANES(F16, static_cast<float>(a.v[i]))
RBM_HD I16 add(const I16& a, const I16& b) RBM_LANES(I16, add(a.v[i], b.v[i]))
RBM_HD I16 sub(const I16& a, const I16& b) RBM_LANES(I16, sub(a.v[i], b.v[i]))
RBM_HD I16 max(const I16& a, const I16& b) RBM_LANES(I16, a.v[i] > b.v[i] ? a.v[i] : b.v[i])
RBM_HD I16 bit_and(const I16& a, const I16& b) RBM_LANES(I16, a.v[i] & b.v[i])
RBM_HD I16 bit_xor(const I16& a, const I16& b) RBM_LANES(I16, a.v[i] ^ b.v[i])
template <int n> RBM_HD I16 shift_left(const I16& a) RBM_LANES(I16, shift_left<n>(a.v[i]))
template <int n> RBM_HD I16 shift_right(const I16& a) RBM_LANES(I16, a.v[i] >> n)
template <int n> RBM_HD I16 shift_right_logical(const I16& a) RBM_LANES(I16, shift_right_logical<n>(a.v[i]))

RBM_HD F16 load(const float* p) RBM_LANES(F16, p[i])
RBM_HD void store(float* p, const F16& a) { std::memcpy(p, a.v, 64); }
RBM_HD I16 load(const int32_t* p) RBM_LANES(I16, p[i])
RBM_HD void store(int32_t* p, const I16& a) { std::memcpy(p, a.v, 64); }
RBM_HD F16 load(const float* p, int n) RBM_LANES(F16, i < n ? p[i] : 0.0f)
RBM_HD void store(float* p, const F16& a, int n) { std::memcpy(p, a.v, 4 * static_cast<size_t>(n)); }

RBM_HD uint32_t less(const F16& a, const F16& b) {
  uint32_t mask = 0;
  for (int i = 0; i < 16; ++i) mask |= static_cast<uint32_t>(a.v[i] < b.v[i]) << i;
  return mask;
}
RBM_HD uint32_t equal(const F16& a, const F16& b) {
  uint32_t mask = 0;
  for (int i = 0; i < 16; ++i) mask |= static_cast<uint32_t>(a.v[i] == b.v[i]) << i;
  return mask;
}
RBM_HD F16 select(uint32_t mask, const F16& on, const F16& off) RBM_LANES(F16, (mask >> i & 1) ? on.v[i] : off.v[i])
RBM_HD void store_bytes(uint8_t* p, uint32_t mask) {
  for (int i = 0; i < 16; ++i) p[i] = mask >> i & 1;
}
RBM_HD uint32_t load_bytes(const uint8_t* p, bool& binary) {
  uint32_t mask = 0;
  for (int i = 0; i < 16; ++i) {
    mask |= static_cast<uint32_t>(p[i] != 0) << i;
    binary = binary && p[i] <= 1;
  }
  return mask;
}

// Eight doubles, for sums that must stay exact beyond 2^31. Their products are exact here, so a
// multiplication and an addition round as a fused multiply-add does.
struct D8 {
  double v[8];
};
constexpr int kRealRows = 2;
#define RBM_DOUBLES(expression)                      \
  {                                                  \
    D8 r;                                            \
    for (int i = 0; i < 8; ++i) r.v[i] = expression; \
    return r;                                        \
  }
RBM_HD D8 load(const double* p) RBM_DOUBLES(p[i])
RBM_HD void store(double* p, const D8& a) { std::memcpy(p, a.v, 64); }
RBM_HD D8 splat(double x) RBM_DOUBLES(x)
RBM_HD D8 fma(const D8& a, const D8& b, const D8& c) RBM_DOUBLES(a.v[i] * b.v[i] + c.v[i])
RBM_HD D8 add(const D8& a, const D8& b) RBM_DOUBLES(a.v[i] + b.v[i])
RBM_HD D8 sub(const D8& a, const D8& b) RBM_DOUBLES(a.v[i] - b.v[i])
RBM_HD D8 mul(const D8& a, const D8& b) RBM_DOUBLES(a.v[i] * b.v[i])
template <class V> RBM_HD void widen(const V& a, D8& low, D8& high) {
  for (int i = 0; i < 8; ++i) low.v[i] = a.v[i];
  for (int i = 0; i < 8; ++i) high.v[i] = a.v[8 + i];
}
RBM_HD F16 narrow(const D8& low, const D8& high) RBM_LANES(F16, static_cast<float>(i < 8 ? low.v[i] : high.v[i - 8]))
#undef RBM_DOUBLES

RBM_HD void transpose(F16 r[16]) {
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < i; ++j) {
      const float t = r[i].v[j];
      r[i].v[j] = r[j].v[i];
      r[j].v[i] = t;
    }
  }
}

RBM_HD void random_words(HalfSweepKey key, uint32_t block, uint32_t chain0, uint32_t chain1, I16 out[2]) {
  for (int chain = 0; chain < 2; ++chain) {
    for (uint32_t q = 0; q < 4; ++q) {
      uint32_t c[4] = {block + q, chain ? chain1 : chain0, key.step, key.stream};
      philox4x32(c, key.key0, key.key1);
      std::memcpy(out[chain].v + 4 * q, c, 16);
    }
  }
}

RBM_HD I16 even_lanes(const I16& a) RBM_LANES(I16, a.v[i & ~1])
RBM_HD I16 odd_lanes(const I16& a) RBM_LANES(I16, a.v[i | 1])
RBM_HD F16 interleave(const F16& even, const F16& odd) RBM_LANES(F16, i % 2 ? odd.v[i] : even.v[i])
#undef RBM_LANES

RBM_HD uint64_t spread4(uint64_t bits, int G) {
  const uint64_t mask = (uint64_t{1} << G) - 1;
  uint64_t out = 0;
  for (int i = 0; i < 4; ++i) out |= (bits >> (i * G) & mask) << (16 * i + 6);
  return out;
}

}  // namespace rbm
