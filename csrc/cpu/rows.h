// The right operand of a product as rows of integers, and what every product shares.
#pragma once

#include "cpu/kernels.h"

namespace rbm::cpu {
namespace {

constexpr int64_t kPassRows = 1024;  // chains per pass: their sums stay in the second-level cache

// Rows of the right operand as integers, sixteen columns at a time.
struct WeightRows {
  const Matrix& w;
  F16 inverse_scale;
  int64_t col;
  int n;

  // Rows k .. k + count - 1 into out[0 .. count), count <= 16.
  void get(int64_t k, int count, I16* out) const {
    if (w.col_stride == 1) {
      const float* p = w.data + k * w.row_stride + col;
      for (int r = 0; r < count; ++r, p += w.row_stride) {
        out[r] = to_int(mul(n == kTile ? load(p) : load(p, n), inverse_scale));
      }
      return;
    }
    F16 rows[16];
    for (int lane = 0; lane < 16; ++lane) {
      const float* p = w.data + (col + lane) * w.col_stride + k;
      rows[lane] = lane >= n ? F16(0.0f) : count == 16 ? load(p) : load(p, count);
    }
    transpose(rows);
    for (int r = 0; r < count; ++r) out[r] = to_int(mul(rows[r], inverse_scale));
  }
};

// The hidden probabilities of a batch are integers already; their rows are padded to whole tiles.
struct HiddenRows {
  const int32_t* data;
  int64_t stride;
  int64_t col;

  void get(int64_t k, int count, I16* out) const {
    const int32_t* p = data + k * stride + col;
    for (int r = 0; r < count; ++r, p += stride) out[r] = load(p);
  }
};

// A few rows ahead, so that transposed weights are read sixteen rows at a time.
template <class Rows> struct RowReader {
  const Rows& rows;
  const int64_t K;
  int64_t begin = 0, end = 0;
  I16 buffer[16];

  RowReader(const Rows& source, int64_t count) : rows(source), K(count) {}

  const I16& operator[](int64_t k) {
    if (k >= end) {
      begin = k;
      end = k + 16 < K ? k + 16 : K;
      rows.get(begin, static_cast<int>(end - begin), buffer);
    }
    return buffer[k - begin];
  }
};

void clear(int32_t* sums, int64_t rows) {
  for (int64_t i = 0; i < rows; ++i) store(sums + i * kTile, I16(0));
}
void clear(double* totals, int64_t rows) {
  for (int64_t i = 0; i < 2 * rows; ++i) store(totals + 8 * i, splat(0.0));
}

}  // namespace
}  // namespace rbm::cpu
