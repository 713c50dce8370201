// One half-sweep of a caller's states.
#include "cuda/ops/call.h"

namespace rbm::cuda {

int sample(const Sample& a, Call& call) {
  Run run(call);
  const int64_t rows = a.given.rows;
  // To visible units the weight comes transposed, so every drawn layer is the "hidden" one here.
  Weights weights;
  Given given;
  weights.count(run, a.weight);
  const Choice choice =
      choose(run.device, rows, weights.n_visible, weights.n_hidden, 0, call.digits);
  given.count(run, a.given, a.given_log_var != nullptr);
  run.end_of_counters();
  weights.lay_out(run, false);
  given.lay_out(run);
  float* factor = a.given_log_var == nullptr ? nullptr : run.arena.take<float>(a.given.cols);
  if (!run.ready()) return run.status;

  run.status += quantise_weights(weights.planes,
                                 {{a.bias, a.given_log_var, a.drawn_log_var},
                                  {weights.n_hidden, weights.n_visible, weights.n_hidden}},
                                 call.digits, run.stream);
  if (a.given_log_var != nullptr) {
    run.status += precisions(a.given_log_var, weights.n_visible, factor, run.stream);
  }
  prepare(run, given, factor);
  HalfSweep h = half_sweep_of(run, weights, true, rows, a.bias, a.temperature);
  h.draw = a.drawn_log_var == nullptr ? Draw::bernoulli : Draw::gaussian;
  h.log_var = a.drawn_log_var;
  h.states = a.states;
  h.states_element = a.states_element;
  h.means = a.means;
  from_given(run, h, given, choice.hopper);
  return run.status;
}

}  // namespace rbm::cuda
