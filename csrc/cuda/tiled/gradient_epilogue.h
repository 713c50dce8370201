// From exact differences to gradients, whichever instructions made the sums.
#pragma once

#include "cuda/tiled/epilogue.h"
#include "cuda/tiled/gradient.h"

namespace rbm::cuda {

RBM_DEVICE void store_gradient(float* place, float value, bool accumulate) {
  *place = accumulate ? add(*place, value) : value;
}

RBM_DEVICE float one_of(const Gradient& a) { return a.one == nullptr ? 1.0f : *a.one; }

// Four neighboring hidden units of one visible unit. `difference` is chain_weight * S_chain -
// data_weight * S_data, exact as far as a double goes.
template <bool real> RBM_DEVICE void finish_gradient(const Gradient& a, int64_t visible,
                                                     int64_t hidden,
                                                     const double (&difference)[4]) {
  if (visible >= a.n_visible) return;
  const float unit = mul(real ? mul(*a.value_scale, a.unit) : a.unit, one_of(a));
  float* place = a.grad_W + visible * a.grad_stride + hidden;
  float four[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) four[i] = mul(static_cast<float>(difference[i]), unit);
  if (hidden + 4 <= a.n_hidden && aligned16(place)) {
    float4* vector = reinterpret_cast<float4*>(place);
    if (a.accumulate) {
      const float4 old = *vector;
      four[0] = add(old.x, four[0]), four[1] = add(old.y, four[1]);
      four[2] = add(old.z, four[2]), four[3] = add(old.w, four[3]);
    }
    *vector = make_float4(four[0], four[1], four[2], four[3]);
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (hidden + i < a.n_hidden) store_gradient(place + i, four[i], a.accumulate);
  }
}

// The bias gradients of a block's tile: by the blocks of the first column, and of the first row.
template <bool real> RBM_DEVICE void finish_bias_gradients(const Gradient& a, int64_t row0,
                                                           int rows, int64_t unit0, int units,
                                                           int threads) {
  const int thread = static_cast<int>(threadIdx.x);
  const float one = one_of(a);
  if (unit0 == 0) {
    for (int64_t i = row0 + thread; i < row0 + rows && i < a.n_visible; i += threads) {
      double of[2];
      for (int phase = 0; phase < 2; ++phase) {
        of[phase] =
            real ? a.visible_totals[phase][i] : static_cast<double>(a.visible_sums[phase][i]);
      }
      const double difference = of[1] * a.chain_weight - of[0] * a.data_weight;
      const float grad = mul(static_cast<float>(difference / a.common), one);
      store_gradient(a.grad_b + i, grad, a.accumulate);
    }
  }
  if (row0 == 0) {
    for (int64_t j = unit0 + thread; j < unit0 + units && j < a.n_hidden; j += threads) {
      const double difference = static_cast<double>(a.hidden_sums[1][j]) * a.chain_weight -
                                static_cast<double>(a.hidden_sums[0][j]) * a.data_weight;
      const float grad = mul(static_cast<float>(difference), mul(a.unit, one));
      store_gradient(a.grad_c + j, grad, a.accumulate);
    }
  }
}

}  // namespace rbm::cuda
