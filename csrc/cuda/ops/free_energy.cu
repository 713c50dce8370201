// Free energies: a product whose epilogue sums softplus, so that no [B, H] matrix is written.
#include "cuda/ops/call.h"

namespace rbm::cuda {

int free_energy(const FreeEnergy& a, Call& call) {
  Run run(call);
  const int64_t rows = a.v.rows;
  const bool gaussian = a.log_var != nullptr;
  Weights weights;
  Given v;
  weights.count(run, a.W);
  const Choice choice =
      choose(run.device, rows, weights.n_visible, weights.n_hidden, 0, call.digits);
  v.count(run, a.v, gaussian);
  run.end_of_counters();
  weights.lay_out(run, false);
  v.lay_out(run);
  float* precision = gaussian ? run.arena.take<float>(weights.n_visible) : nullptr;
  const int64_t slices = slices_of(weights.n_hidden);
  auto* softplus = run.arena.take<double>(slices * rows);
  if (!run.ready()) return run.status;

  run.status += quantise_weights(
      weights.planes,
      {{a.b, a.c, a.log_var}, {weights.n_visible, weights.n_hidden, weights.n_visible}},
      call.digits, run.stream);
  if (gaussian) run.status += precisions(a.log_var, weights.n_visible, precision, run.stream);
  prepare(run, v, precision);
  HalfSweep h = half_sweep_of(run, weights, true, rows, a.c, a.temperature);
  h.softplus = softplus;
  from_given(run, h, v, choice.hopper);
  run.status += row_energies({a.v, a.b, precision, softplus, slices, a.temperature.beta,
                              a.temperature.betas, weights.planes.one, a.energies},
                             run.stream);
  return run.status;
}

}  // namespace rbm::cuda
