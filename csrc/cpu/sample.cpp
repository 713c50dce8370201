// One half-sweep in either direction.
#include "cpu/model.h"

namespace rbm::cpu {

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
  // Tests ask for the sums of any numbers.
  bad = status_of(read_states(given, call, !given_log_var && !sums, in), kStates);
  if (bad) return bad;
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

}  // namespace rbm::cpu
