// The elementary functions of the randomness contract, written once.
//
// F is float (host or device) or a vector of floats, I the matching int32 type. Only operations
// with one correct rounding are used (fma, add, mul, div, sqrt), in a fixed order, so every backend
// and every instruction set computes the same bits. rbm_kernels/arithmetic.py says the same in
// torch.
#pragma once

#include <cmath>
#include <cstring>

#include "include/rbm/platform.h"

namespace rbm {

RBM_HD float fma(float a, float b, float c) {
#ifdef __CUDA_ARCH__
  return __fmaf_rn(a, b, c);
#else
  return std::fma(a, b, c);
#endif
}
RBM_HD float add(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}
RBM_HD float sub(float a, float b) { return add(a, -b); }
RBM_HD float mul(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}
RBM_HD float div(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fdiv_rn(a, b);
#else
  return a / b;
#endif
}
RBM_HD float sqrt(float a) {
#ifdef __CUDA_ARCH__
  return __fsqrt_rn(a);
#else
  return std::sqrt(a);
#endif
}
RBM_HD float min(float a, float b) { return a < b ? a : b; }
RBM_HD float max(float a, float b) { return a > b ? a : b; }
RBM_HD int32_t as_int(float a) {
#ifdef __CUDA_ARCH__
  return __float_as_int(a);
#else
  int32_t bits;
  std::memcpy(&bits, &a, 4);
  return bits;
#endif
}
RBM_HD float as_float(int32_t a) {
#ifdef __CUDA_ARCH__
  return __int_as_float(a);
#else
  float value;
  std::memcpy(&value, &a, 4);
  return value;
#endif
}
RBM_HD int32_t to_int(float a) { return static_cast<int32_t>(a); }  // of integral values only
RBM_HD float to_float(int32_t a) { return static_cast<float>(a); }
RBM_HD int32_t add(int32_t a, int32_t b) {
  return static_cast<int32_t>(static_cast<uint32_t>(a) + static_cast<uint32_t>(b));
}
RBM_HD int32_t sub(int32_t a, int32_t b) {
  return static_cast<int32_t>(static_cast<uint32_t>(a) - static_cast<uint32_t>(b));
}
RBM_HD int32_t bit_and(int32_t a, int32_t b) { return a & b; }
RBM_HD int32_t bit_xor(int32_t a, int32_t b) { return a ^ b; }
template <int n> RBM_HD int32_t shift_left(int32_t a) {
  return static_cast<int32_t>(static_cast<uint32_t>(a) << n);
}
template <int n> RBM_HD int32_t shift_right(int32_t a) { return a >> n; }  // arithmetic
template <int n> RBM_HD int32_t shift_right_logical(int32_t a) {
  return static_cast<int32_t>(static_cast<uint32_t>(a) >> n);
}

template <class F> struct IntOf;
template <> struct IntOf<float> {
  using type = int32_t;
};
template <class F> using Int = typename IntOf<F>::type;

constexpr float kRoundingMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
constexpr float kLn2High = 0.693145751953125f, kLn2Low = 1.42860682030941723e-06f;

template <class F> RBM_HD F polynomial(F, float c0) { return F(c0); }
template <class F, class... C> RBM_HD F polynomial(F x, float c0, C... rest) {
  return fma(polynomial(x, rest...), x, F(c0));
}

// exp(x), x clamped to +-87 so that the result is a normal float. Degree 6, relative error 1e-7.
template <class F> RBM_HD F exp_clamped(F x) {
  const F t = min(max(x, F(-87.0f)), F(87.0f));
  const F m = fma(t, F(1.44269504088896341f), F(kRoundingMagic));  // its low bits are n's
  const F n = sub(m, F(kRoundingMagic));
  F r = fma(n, F(-kLn2High), t);
  r = fma(n, F(-kLn2Low), r);
  const F p = polynomial(r, 1.0f, 1.0f, 0.49999991059303284f, 0.16666419804096222f,
                         0.04166822507977486f, 0.008374824188649654f, 0.0013836835278198123f);
  return as_float(add(as_int(p), shift_left<23>(as_int(m))));
}
template <class F> RBM_HD F exp_neg(F x) { return exp_clamped(sub(F(0.0f), x)); }

// Uniform in [0, 1) from the high 24 bits of a random word.
template <class F> RBM_HD F uniform(Int<F> word) {
  return mul(to_float(shift_right_logical<8>(word)), F(5.9604644775390625e-08f));
}

// What is below 1 exactly when the unit is on: u < 1 / (1 + e), e = exp(-x), without the division.
template <class F> RBM_HD F threshold(F u, F e) { return fma(u, e, u); }

template <class F> RBM_HD F sigmoid_of_exp(F e) { return div(F(1.0f), add(F(1.0f), e)); }

// log(1 + exp(x)) = max(x, 0) + log1p(y) with y = exp(-|x|), by log1p(y) = 2 atanh(y / (2 + y)):
// full relative precision also where y is far below one unit in the last place of 1. From
// e = exp(-x): y is e or 1 / e, and y / (2 + y) is e / (2 + e) or 1 / (1 + 2e).
template <class F> RBM_HD F softplus(F x, F e) {
  const F z = div(min(e, F(1.0f)), max(add(e, F(2.0f)), fma(e, F(2.0f), F(1.0f))));
  const F t = mul(z, z);
  const F q = polynomial(t, 0.6666667461395264f, 0.3999887704849243f, 0.2861688435077667f,
                         0.21427658200263977f, 0.24300934374332428f);
  return add(max(x, F(0.0f)), fma(mul(z, t), q, add(z, z)));
}

// log(x) of a positive normal float.
template <class F> RBM_HD F log_positive(F x) {
  using I = Int<F>;
  const I sqrt_half = I(0x3f3504f3);
  const I i = sub(as_int(x), sqrt_half);
  const F e = to_float(shift_right<23>(i));
  const F m = as_float(add(bit_and(i, I(0x7fffff)), sqrt_half));  // in [sqrt(1/2), sqrt(2))
  const F z = div(sub(m, F(1.0f)), add(m, F(1.0f)));
  const F t = mul(z, z);
  const F q = polynomial(t, 0.6666666269302368f, 0.4000033438205719f, 0.28537285327911377f,
                         0.23582600057125092f);
  const F l = fma(mul(z, t), q, add(z, z));
  return fma(e, F(kLn2High), fma(e, F(kLn2Low), l));
}

template <class F> RBM_HD F select_odd(Int<F> k, F odd, F even) {
  using I = Int<F>;
  const I mask = sub(I(0), bit_and(k, I(1)));
  return as_float(bit_xor(as_int(even), bit_and(mask, bit_xor(as_int(even), as_int(odd)))));
}

// Two standard normals from two random words (Box and Muller 1958).
template <class F> RBM_HD void normal_pair(Int<F> word0, Int<F> word1, F& z0, F& z1) {
  using I = Int<F>;
  const F u = mul(to_float(add(shift_right_logical<8>(word0), I(1))),
                  F(5.9604644775390625e-08f));  // (0, 1]
  const F radius = sqrt(mul(F(-2.0f), log_positive(u)));
  const F turns = mul(uniform<F>(word1), F(4.0f));  // quarter turns, exact
  const F n = sub(add(turns, F(kRoundingMagic)), F(kRoundingMagic));
  const F f = sub(turns, n);
  const F t = mul(f, f);
  const F s = mul(f, polynomial(t, 1.5707963705062866f, -0.6459634900093079f, 0.07968003302812576f,
                                -0.00460165785625577f));
  const F c = polynomial(t, 1.0f, -1.2337005138397217f, 0.2536691725254059f, -0.020859936252236366f,
                         0.0009033629903569818f);
  const I k = to_int(n);
  const I cos_sign = shift_left<30>(bit_and(add(k, I(1)), I(2)));
  const I sin_sign = shift_left<30>(bit_and(k, I(2)));
  z0 = mul(radius, as_float(bit_xor(as_int(select_odd(k, s, c)), cos_sign)));
  z1 = mul(radius, as_float(bit_xor(as_int(select_odd(k, c, s)), sin_sign)));
}

}  // namespace rbm
