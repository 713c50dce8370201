// k sweeps of block Gibbs sampling.
#include "cuda/ops/call.h"

namespace rbm::cuda {

int gibbs_sample(const Gibbs& a, Call& call) {
  CallContext context(call);
  const int64_t rows = a.v.rows, V = a.W.rows, H = a.W.cols;
  const bool gaussian = a.log_var != nullptr;
  // Where clamped units have values of their own, the chain starts from a copy that has them.
  Matrix start = a.v;
  const bool overwrites = a.mask != nullptr && a.values.data != nullptr;
  if (overwrites) {
    start = {nullptr, Element::float32, rows, V, V, 1, a.v.binary && a.values.binary};
  }
  Weights weights;
  LayerInput given;
  weights.count(context, a.W);
  const Choice choice = choose(context.device, rows, weights.n_visible, weights.n_hidden, a.sweeps,
                               call.digits, gaussian);
  given.count(context, start, gaussian);
  context.end_of_counters();
  weights.lay_out(context, true);
  // Gaussian chains on the chip start from the real states themselves.
  const bool from_start = gaussian && on_chip(choice);
  if (!from_start) given.lay_out(context);
  float* copy = overwrites ? context.arena.take<float>(rows * V) : nullptr;
  float* precision = gaussian ? context.arena.take<float>(V) : nullptr;
  auto* hidden = context.arena.take<uint32_t>(rows * words_of(H));
  auto* visible = context.arena.take<uint32_t>(rows * words_of(V));
  if (!context.ready()) return context.status;

  context.status += quantize_weights(
      weights.planes,
      {{a.b, a.c, a.log_var}, {weights.n_visible, weights.n_hidden, weights.n_visible}},
      call.digits, context.stream);
  if (gaussian)
    context.status += precisions(a.log_var, weights.n_visible, precision, context.stream);
  if (overwrites) {
    context.status +=
        overwrite_clamped({a.v, a.values, a.mask, a.mask_stride, copy}, context.stream);
    start.data = given.packed.states.data = given.values.states.data = copy;
  }
  if (!from_start) prepare(context, given, precision);

  const Sweeps sweeps{weights,  a.b,    a.c,           a.log_var, a.temperature, rows,
                      a.sweeps, a.mask, a.mask_stride, start,     hidden};
  Chain results{};
  results.visible_bits = visible;
  results.states = a.states;
  results.states_element = a.states_element;
  if (gaussian) {
    gaussian_chain(context, sweeps, static_cast<float*>(a.states), given, false, precision, choice);
  } else if (a.mask != nullptr && given.kind == LayerInput::Kind::either) {
    // A real value of a clamped unit stays real through all sweeps.
    bit_chain_if_bits(context, sweeps, results, given, choice);
    real_chain(context, sweeps, static_cast<float*>(a.states), given.values, false,
               given.if_real());
  } else {
    bit_chain(context, sweeps, results, given, false, choice);
  }
  return context.status;
}

}  // namespace rbm::cuda
