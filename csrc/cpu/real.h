// Products with a real left operand, both operands in fixed point.
#pragma once

#include "cpu/rows.h"

namespace rbm::cpu {
namespace {

constexpr int64_t kRealChunk = 128;  // rows of 46-bit products whose sums stay below 2^53

struct RealScratch {
  alignas(64) double low[kPassRows * kTile];
  alignas(64) double high[kPassRows * kTile];  // multiples of 2^24
  alignas(64) double weights[kRealChunk * kTile];
};

template <int count>
void multiply_rows(const float* a, int64_t stride, int64_t K, const double* w, double* totals) {
  D8 sum[count][2];
  for (int r = 0; r < count; ++r) {
    sum[r][0] = load(totals + r * kTile);
    sum[r][1] = load(totals + r * kTile + 8);
  }
  for (int64_t k = 0; k < K; ++k, w += kTile) {
    const D8 w0 = load(w), w1 = load(w + 8);
#pragma GCC unroll 8
    for (int r = 0; r < count; ++r) {
      const D8 x = splat(a[r * stride + k]);
      sum[r][0] = fma(x, w0, sum[r][0]);
      sum[r][1] = fma(x, w1, sum[r][1]);
    }
  }
  for (int r = 0; r < count; ++r) {
    store(totals + r * kTile, sum[r][0]);
    store(totals + r * kTile + 8, sum[r][1]);
  }
}

// out += weight * (real operand @ rows). Products of two 24-bit integers have 46 bits: after 128
// of them a sum is split at 2^24 into two doubles that both stay exact; the total is rounded once.
template <class Rows> void real_product(const Operand& a, const Rows& rows, int64_t begin,
                                        int64_t end, RealScratch& s, double* out, double weight) {
  RowReader<Rows> reader(rows, a.K);
  const int64_t count = end - begin;
  double* low = s.low;
  clear(low, count);
  clear(s.high, count);
  const D8 magic = splat(6755399441055744.0), down = splat(0x1p-24), up = splat(-0x1p24);
  for (int64_t k = 0; k < a.K; k += kRealChunk) {
    const int64_t n = a.K - k < kRealChunk ? a.K - k : kRealChunk;
    for (int64_t i = 0; i < n; ++i) {
      D8 w0, w1;
      widen(reader[k + i], w0, w1);
      store(s.weights + i * kTile, w0);
      store(s.weights + i * kTile + 8, w1);
    }
    const float* p = a.fixed + begin * a.K + k;
    int64_t m = 0;
    for (; m + kRealRows <= count; m += kRealRows)
      multiply_rows<kRealRows>(p + m * a.K, a.K, n, s.weights, low + m * kTile);
    for (; m < count; ++m) multiply_rows<1>(p + m * a.K, a.K, n, s.weights, low + m * kTile);
    for (int64_t i = 0; i < 2 * count; ++i) {
      const D8 total = load(low + 8 * i);
      const D8 top = sub(add(mul(total, down), magic), magic);
      store(s.high + 8 * i, add(load(s.high + 8 * i), top));
      store(low + 8 * i, fma(top, up, total));
    }
  }
  const D8 w = splat(weight), unit = splat(0x1p24);
  for (int64_t i = 0; i < 2 * count; ++i) {
    const D8 total = fma(load(s.high + 8 * i), unit, load(low + 8 * i));
    store(out + 8 * i, add(mul(w, total), load(out + 8 * i)));
  }
}

}  // namespace
}  // namespace rbm::cpu
