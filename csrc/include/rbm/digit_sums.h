// From the exact sums of digit products to floats, rounded once as docs/arithmetic.md says.
#pragma once

#include "include/rbm/math.h"

namespace rbm {

// float(high * 256 + low), rounded once.
RBM_HD float rounded(int32_t high, int32_t low) {
  const int32_t top = high + (low >> 8);  // arithmetic shift: low & 255 is what it leaves
  // Up to 2^24 the top is exact in a float, and the one rounding is the multiply-add's.
  if (top >= -(1 << 24) && top <= (1 << 24)) {
    return fma(static_cast<float>(top), 256.0f, static_cast<float>(low & 255));
  }
  return static_cast<float>(static_cast<int64_t>(high) * 256 + low);
}

// A binary product's sum from those of its digits, least significant first. Two digits fit into an
// int32 when summed over up to 65,535 units, and so do the two upper of three.
template <int digits> RBM_HD float binary_sum(const int32_t (&s)[digits]) {
  static_assert(digits == 2 || digits == 3);
  if constexpr (digits == 2) return static_cast<float>(add(shift_left<8>(s[1]), s[0]));
  if constexpr (digits == 3) return rounded(s[2] * 256 + s[1], s[0]);
}

// A real product's sum: s[w] holds the products of digits a and b with a + b = w.
template <int weights> RBM_HD int64_t whole_sum(const int32_t (&s)[weights]) {
  int64_t total = 0;
  for (int w = weights - 1; w >= 0; --w) total = total * 256 + s[w];
  return total;
}

// By way of a double, as a sum above 2^53 is rounded twice everywhere.
RBM_HD float real_sum(int64_t total) { return static_cast<float>(static_cast<double>(total)); }

}  // namespace rbm
