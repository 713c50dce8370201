#include "cpu/model.h"

namespace rbm::cpu {

int Model::prepare(const Matrix& weight, const float* b_, const float* c_, const float* log_var_,
                   const Call& call) {
  W = weight;
  b = b_;
  c = c_;
  const uint32_t most = largest_of(weight, call);
  if (most >= 0x7f800000u) return kWeight;
  if (!all_finite(b, weight.rows, call)) return kBiasVisible;
  if (!all_finite(c, weight.cols, call)) return kBiasHidden;
  if (!all_finite(log_var_, weight.rows, call)) return kLogVar;
  scale = scale_of(most, call.digits);
  if (log_var_) {
    const int64_t V = weight.rows;
    precision = Buffer<float>(V);
    sigma = Buffer<float>(V);
    call.kernels->exp_neg(log_var_, V, precision.get());
    for (int64_t i = 0; i < V; ++i) sigma.get()[i] = -0.5f * log_var_[i];
    call.kernels->exp_neg(sigma.get(), V, sigma.get());
  }
  return kNone;
}

HalfSweep Model::half_sweep(Layer drawn, Temperature temperature, const Call& call) const {
  HalfSweep h{};
  const bool hidden = drawn == Layer::hidden;
  h.weight = hidden ? W : Matrix{W.data, W.cols, W.rows, W.col_stride, W.row_stride};
  h.bias = hidden ? c : b;
  h.scale = scale;
  h.inverse_scale = 1.0f / scale;
  h.wide = call.digits == 3;
  h.beta = temperature.beta;
  h.beta_stride = temperature.stride;
  h.sigma = hidden ? nullptr : sigma.get();
  h.chain_offset = call.chain_offset;
  h.fixed_one = call.digits == 3 ? 8388608.0f : 32768.0f;
  return h;
}

}  // namespace rbm::cpu
