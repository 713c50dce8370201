// One half-sweep, and what the longer operations share with it.
#include "cpu/sample.h"

#include <cmath>

namespace rbm {

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
  scale = scale_of(most, call.limbs);
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
  h.wide = call.limbs == 3;
  h.beta = temperature.beta;
  h.beta_stride = temperature.stride;
  h.sigma = hidden ? nullptr : sigma.get();
  h.chain_offset = call.chain_offset;
  h.fixed_one = call.limbs == 3 ? 8388608.0f : 32768.0f;
  return h;
}

int sample(const Input& given, const Matrix& weight, const float* bias, const float* given_log_var,
           const float* drawn_log_var, Temperature temperature, Output states, float* means,
           double* sums, const Call& call) {
  const bool to_hidden = !drawn_log_var;
  // A half-sweep to Bernoulli units looks the same in both directions.
  Model model;
  const Matrix W = to_hidden ? weight
                             : Matrix{weight.data, weight.cols, weight.rows, weight.col_stride,
                                      weight.row_stride};
  int bad = model.prepare(W, to_hidden ? nullptr : bias, to_hidden ? bias : nullptr,
                          to_hidden ? given_log_var : drawn_log_var, call);
  if (bad) return bad;
  States in;
  OwnedOperand operand;
  if (!read_states(given, call, in)) return kStates;
  if (!make_operand(in, given_log_var ? model.precision.get() : nullptr, call, operand))
    return kStates;
  HalfSweep h = model.half_sweep(to_hidden ? Layer::hidden : Layer::visible, temperature, call);
  h.given = operand.operand;
  h.key = call.key(0);
  h.states = states.floats;
  h.bytes = states.bytes;
  h.means = means;
  h.sums = sums;
  run(h, call);
  return kNone;
}

}  // namespace rbm
