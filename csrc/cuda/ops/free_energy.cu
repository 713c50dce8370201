// Free energies: a product whose epilogue sums softplus, so that no [B, H] matrix is written.
#include "cuda/ops/call.h"

namespace rbm::cuda {

int free_energy(const FreeEnergy& a, Call& call) {
  CallContext context(call);
  const int64_t rows = a.v.rows;
  const bool gaussian = a.log_var != nullptr;
  Weights weights;
  LayerInput v;
  weights.count(context, a.W);
  const Choice choice =
      choose(context.device, rows, weights.n_visible, weights.n_hidden, 0, call.digits);
  v.count(context, a.v, gaussian);
  context.end_of_counters();
  weights.lay_out(context, false);
  v.lay_out(context);
  float* precision = gaussian ? context.arena.take<float>(weights.n_visible) : nullptr;
  const int64_t slices = slices_of(weights.n_hidden);
  auto* softplus = context.arena.take<double>(slices * rows);
  if (!context.ready()) return context.status;

  context.status += quantize_weights(
      weights.planes,
      {{a.b, a.c, a.log_var}, {weights.n_visible, weights.n_hidden, weights.n_visible}},
      call.digits, context.stream);
  if (gaussian)
    context.status += precisions(a.log_var, weights.n_visible, precision, context.stream);
  prepare(context, v, precision);
  HalfSweep h = half_sweep_of(context, weights, true, rows, a.c, a.temperature);
  h.softplus = softplus;
  from_given(context, h, v, choice.hopper);
  context.status += row_energies({a.v, a.b, precision, softplus, slices, a.temperature.beta,
                                  a.temperature.betas, weights.planes.one, a.energies},
                                 context.stream);
  return context.status;
}

}  // namespace rbm::cuda
