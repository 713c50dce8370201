// k sweeps of block Gibbs sampling.
#include "cuda/ops/call.h"

namespace rbm::cuda {

int gibbs_sample(const Gibbs& a, Call& call) {
  Run run(call);
  const int64_t rows = a.v.rows, V = a.W.rows, H = a.W.cols;
  const bool gaussian = a.log_var != nullptr;
  // Where values are set before the first sweep, the chain starts from a copy that has them.
  Matrix start = a.v;
  const bool placed = a.mask != nullptr && a.values.data != nullptr;
  if (placed) {
    start = {nullptr, Element::float32, rows, V, V, 1, a.v.binary && a.values.binary};
  }
  Weights weights;
  Given given;
  weights.count(run, a.W);
  const Choice choice = choose(run.device, rows, weights.n_visible, weights.n_hidden, a.sweeps,
                               call.digits, gaussian);
  given.count(run, start, gaussian);
  run.end_of_counters();
  weights.lay_out(run, true);
  // Gaussian chains on the chip start from the real states themselves.
  const bool from_start = gaussian && on_chip(choice);
  if (!from_start) given.lay_out(run);
  float* copy = placed ? run.arena.take<float>(rows * V) : nullptr;
  float* precision = gaussian ? run.arena.take<float>(V) : nullptr;
  auto* hidden = run.arena.take<uint32_t>(rows * words_of(H));
  auto* visible = run.arena.take<uint32_t>(rows * words_of(V));
  if (!run.ready()) return run.status;

  run.status += quantise_weights(
      weights.planes,
      {{a.b, a.c, a.log_var}, {weights.n_visible, weights.n_hidden, weights.n_visible}},
      call.digits, run.stream);
  if (gaussian) run.status += precisions(a.log_var, weights.n_visible, precision, run.stream);
  if (placed) {
    run.status += place({a.v, a.values, a.mask, a.mask_stride, copy}, run.stream);
    start.data = given.packed.states.data = given.values.states.data = copy;
  }
  if (!from_start) prepare(run, given, precision);

  const Sweeps sweeps{weights,  a.b,    a.c,           a.log_var, a.temperature, rows,
                      a.sweeps, a.mask, a.mask_stride, start,     hidden};
  Chain results{};
  results.visible_bits = visible;
  results.states = a.states;
  results.states_element = a.states_element;
  if (gaussian) {
    gaussian_chain(run, sweeps, static_cast<float*>(a.states), given, false, precision, choice);
  } else if (a.mask != nullptr && given.kind == Given::Kind::either) {
    // Units that keep a real value keep it through all sweeps.
    bit_chain_if_bits(run, sweeps, results, given, choice);
    real_chain(run, sweeps, static_cast<float*>(a.states), given.values, false, given.if_real());
  } else {
    bit_chain(run, sweeps, results, given, false, choice);
  }
  return run.status;
}

}  // namespace rbm::cuda
