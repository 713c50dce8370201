// Real numbers as integers times a power of two, and their signed base-256 digits.
#pragma once

#include "include/rbm/math.h"

namespace rbm {

// Nearest integer, half to even, of |x| below 2^24; 0 of anything else, NaN among it.
RBM_HD int32_t nearest(float x) {
  if (!(x > -16777216.0f && x < 16777216.0f)) return 0;
#ifdef __CUDA_ARCH__
  return __float2int_rn(x);
#else
  return static_cast<int32_t>(std::nearbyint(x));
#endif
}

RBM_HD float power_of_two(int exponent) {
  return as_float(static_cast<int32_t>(static_cast<uint32_t>(exponent + 127) << 23));
}

// The bits of |x|: as integers in the order of the magnitudes, infinity and then NaN above all.
RBM_HD int32_t magnitude_bits(float x) { return as_int(x) & 0x7FFFFFFF; }

// The smallest power of two for which a largest magnitude, given by its bits, fits in that many
// digits; 1 for zero, and NaN where it is not finite, so that no result of it looks valid.
RBM_HD float scale_of(int32_t largest_bits, int digits) {
  if (largest_bits == 0) return 1.0f;
  if (largest_bits >= 0x7F800000) return as_float(0x7FC00000);
  const int32_t fits = digits == 3 ? 127 * 65793 : 127 * 257;
  // The exponent is that of frexp; what lies below the normal numbers ends at -120 in any case.
  int exponent = (largest_bits >> 23) - 126 - (8 * digits - 1);
  if (exponent < -120) exponent = -120;
  if (nearest(mul(as_float(largest_bits), power_of_two(-exponent))) > fits) ++exponent;
  return power_of_two(exponent);
}

// 1 / scale, exactly, of a scale that scale_of made.
RBM_HD float inverse_of(float scale) { return as_float(0x7F000000 - as_int(scale)); }

// x / scale as an integer; `inverse` is 1 / scale.
RBM_HD int32_t quantize(float x, float inverse) { return nearest(mul(x, inverse)); }

// Digit d of q as a signed byte in bits 8 d .. 8 d + 7: q = sum of digit d * 256^d.
RBM_HD uint32_t signed_digits(int32_t q) {
  return (static_cast<uint32_t>(q) + 0x00808080u) ^ 0x00808080u;
}

}  // namespace rbm
