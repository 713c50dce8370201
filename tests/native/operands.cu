// The kernels of csrc/cuda/operands, for test_operands.py, which calls these functions with the
// addresses of torch tensors.
#include "cuda/operands/operands.h"

using namespace rbm;
using namespace rbm::cuda;

namespace {

Matrix matrix(const void* data, int element, int64_t rows, int64_t cols, int64_t row_stride,
              int64_t col_stride) {
  return {data, static_cast<Element>(element), rows, cols, row_stride, col_stride, false};
}

Planes planes(void* data, int64_t rows, int64_t terms) {
  return {static_cast<uint8_t*>(data), round_up(rows, kBlock), round_up(terms, kBlock)};
}

}  // namespace

extern "C" {

int test_weights(const void* W, int element, int64_t rows, int64_t cols, int64_t row_stride,
                 int64_t col_stride, int digits, void* to_hidden, void* to_visible, void* scale,
                 void* one) {
  int32_t largest = 0;
  const WeightPlanes a{matrix(W, element, rows, cols, row_stride, col_stride),
                       planes(to_hidden, cols, rows),
                       planes(to_visible, rows, cols),
                       &largest,
                       static_cast<float*>(scale),
                       static_cast<float*>(one)};
  return quantize_weights(a, {}, digits, nullptr);
}

int test_pack(const void* states, int element, int64_t rows, int64_t units, int64_t row_stride,
              void* bits, void* is_real, void* terms, int64_t terms_words, int64_t term_word,
              void* sums) {
  const Pack a{matrix(states, element, rows, units, row_stride, 1),
               static_cast<uint32_t*>(bits),
               static_cast<int32_t*>(is_real),
               static_cast<uint32_t*>(terms),
               terms_words,
               term_word,
               static_cast<unsigned long long*>(sums)};
  return pack(a, nullptr);
}

int test_values(const void* states, int element, int64_t rows, int64_t units, int64_t row_stride,
                const void* factor, int digits, void* out, void* scales) {
  const ValuePlanes a{matrix(states, element, rows, units, row_stride, 1),
                      static_cast<const float*>(factor), planes(out, rows, units),
                      static_cast<float*>(scales), Guard{}};
  return quantize_values(a, digits, nullptr);
}

int64_t test_phase_partials(int64_t data_rows, int64_t chain_rows, int units) {
  return phase_partials(data_rows, chain_rows, units);
}

// totals and spreads [2][units]; counters: zeros, [2] is_real, [2] largest, [2][units / 32] done.
int test_phases(const void* data, int64_t data_rows, const void* chains, int64_t chain_rows,
                int64_t units, const void* center, int digits, double* totals, double* spreads,
                double* partial, int32_t* counters, void* out, void* scale) {
  PhaseValues a{};
  a.states[0] = matrix(data, 0, data_rows, units, units, 1);
  a.states[1] = matrix(chains, 0, chain_rows, units, units, 1);
  a.center = static_cast<const float*>(center);
  for (int phase = 0; phase < 2; ++phase) {
    a.totals[phase] = totals + phase * units;
    a.spreads[phase] = spreads + phase * units;
    a.is_real[phase] = counters + phase;
    a.largest[phase] = counters + 2 + phase;
  }
  a.columns_done = counters + 4;
  a.partial = partial;
  a.planes = planes(out, units, round_up(data_rows, kBlock) + chain_rows);
  a.scale = static_cast<float*>(scale);
  return phase_values(a, digits, nullptr);
}
}
