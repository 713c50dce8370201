// One half-sweep of a caller's states.
#include "cuda/ops/call.h"

namespace rbm::cuda {

int sample(const Sample& a, Call& call) {
  CallContext context(call);
  const int64_t rows = a.given.rows;
  // To visible units the weight comes transposed, so every drawn layer is the "hidden" one here.
  Weights weights;
  LayerInput given;
  weights.count(context, a.weight);
  const Choice choice =
      choose(context.device, rows, weights.n_visible, weights.n_hidden, 0, call.digits);
  given.count(context, a.given, a.given_log_var != nullptr);
  context.end_of_counters();
  weights.lay_out(context, false);
  given.lay_out(context);
  float* factor = a.given_log_var == nullptr ? nullptr : context.arena.take<float>(a.given.cols);
  if (!context.ready()) return context.status;

  context.status += quantize_weights(weights.planes,
                                     {{a.bias, a.given_log_var, a.drawn_log_var},
                                      {weights.n_hidden, weights.n_visible, weights.n_hidden}},
                                     call.digits, context.stream);
  if (a.given_log_var != nullptr) {
    context.status += precisions(a.given_log_var, weights.n_visible, factor, context.stream);
  }
  prepare(context, given, factor);
  HalfSweep h = half_sweep_of(context, weights, true, rows, a.bias, a.temperature);
  h.draw = a.drawn_log_var == nullptr ? Draw::bernoulli : Draw::gaussian;
  h.log_var = a.drawn_log_var;
  h.states = a.states;
  h.states_element = a.states_element;
  h.means = a.means;
  from_given(context, h, given, choice.hopper);
  return context.status;
}

}  // namespace rbm::cuda
