#include "cuda/ops/call.h"

namespace rbm::cuda {
namespace {

Draw draw_of(const float* log_var) { return log_var == nullptr ? Draw::bernoulli : Draw::gaussian; }

HalfSweep to_hidden_of(const CallContext& context, const Sweeps& a, int64_t sweep) {
  HalfSweep h = half_sweep_of(context, a.weights, true, a.rows, a.hidden_bias, a.temperature);
  h.draw = Draw::bernoulli;
  h.half_sweep = static_cast<uint64_t>(2 * sweep);
  h.drawn_bits = a.hidden;
  return h;
}

HalfSweep to_visible_of(const CallContext& context, const Sweeps& a, int64_t sweep) {
  HalfSweep h = half_sweep_of(context, a.weights, false, a.rows, a.visible_bias, a.temperature);
  h.draw = draw_of(a.log_var);
  h.half_sweep = static_cast<uint64_t>(2 * sweep + 1);
  h.log_var = a.log_var;
  h.mask = a.mask;
  h.mask_stride = a.mask_stride;
  h.held = a.held.data;
  h.held_element = a.held.element;
  h.held_stride = a.held.row_stride;
  return h;
}

void visible_half_sweep(CallContext& context, const Sweeps& a, const Chain& results, int64_t sweep,
                        uint32_t* bits, Guard guard, bool hopper) {
  HalfSweep h = to_visible_of(context, a, sweep);
  h.drawn_bits = bits;
  if (sweep == a.sweeps - 1) {
    h.drawn_terms = results.visible_terms;
    h.terms_words = results.terms_words;
    h.term_word = results.term_word;
    h.drawn_sums = results.visible_sums;
    h.states = results.states;
    h.states_element = results.states_element;
  }
  from_bits(context, h, a.hidden, guard, hopper);
}

// A launch for each half-sweep, from `start` or, if that is null, from a.hidden.
void tiled_chain(CallContext& context, const Sweeps& a, const Chain& results, const uint32_t* start,
                 Guard guard, bool hopper) {
  for (int64_t sweep = 0; sweep < a.sweeps; ++sweep) {
    const uint32_t* given = sweep == 0 ? start : results.visible_bits;
    if (given != nullptr) from_bits(context, to_hidden_of(context, a, sweep), given, guard, hopper);
    visible_half_sweep(context, a, results, sweep, results.visible_bits, guard, hopper);
  }
}

// All sweeps from `first` on in one launch. results: where the chains start and what is wanted.
void resident_chain(CallContext& context, const Sweeps& a, Chain results, int64_t first,
                    Guard guard, const Choice& choice) {
  results.half_sweep = static_cast<uint64_t>(2 * first);
  results.rows = a.rows;
  results.n_visible = a.weights.n_visible;
  results.n_hidden = a.weights.n_hidden;
  results.sweeps = a.sweeps - first;
  results.guard = guard;
  results.to_hidden = a.weights.planes.to_hidden;
  results.to_visible = a.weights.planes.to_visible;
  results.weight_scale = a.weights.planes.scale;
  results.visible_bias = a.visible_bias;
  results.hidden_bias = a.hidden_bias;
  results.beta = a.temperature.beta;
  results.betas = a.temperature.betas;
  results.seed = context.call.seed;
  results.chain_offset = context.call.chain_offset;
  results.mask = a.mask;
  results.mask_stride = a.mask_stride;
  results.held = a.held.data;
  results.held_element = a.held.element;
  results.held_stride = a.held.row_stride;
  context.status += choice.chain == Regime::resident
                        ? chain(results, context.call.digits, context.stream)
                        : chain_sm90a(results, context.call.digits, choice.cluster, context.stream);
}

}  // namespace

CallContext::CallContext(Call& c)
    : call(c), stream(static_cast<cudaStream_t>(c.stream)), arena(c.workspace), current(c.device) {
  status += current.status;
  status += device_of(c.device, device);
}

bool CallContext::ready() {
  if (arena.base() == nullptr) call.workspace_bytes = arena.used();
  if (arena.base() == nullptr || status) return false;
  status += fill_zero(arena.base(), static_cast<size_t>(counters), stream);
  return true;
}

void Weights::count(CallContext& context, const Matrix& W) {
  n_visible = static_cast<int>(W.rows);
  n_hidden = static_cast<int>(W.cols);
  planes.W = W;
  planes.largest = context.arena.take<int32_t>(1);
}

void Weights::lay_out(CallContext& context, bool to_visible) {
  planes.to_hidden = context.arena.planes(n_hidden, n_visible, context.call.digits);
  planes.to_visible = {};
  if (to_visible)
    planes.to_visible = context.arena.planes(n_visible, n_hidden, context.call.digits);
  planes.scale = context.arena.take<float>(1);
  planes.one = context.arena.take<float>(1);
}

void LayerInput::count(CallContext& context, const Matrix& states, bool gaussian) {
  kind = gaussian ? Kind::real : states.binary ? Kind::bits : Kind::either;
  packed = {};
  values = {};
  packed.states = values.states = states;
  if (kind == Kind::either) packed.is_real = context.arena.take<int32_t>(1);
}

void LayerInput::lay_out(CallContext& context, const Planes* space) {
  const int64_t rows = states().rows, units = states().cols;
  if (kind != Kind::real) packed.bits = context.arena.take<uint32_t>(rows * words_of(units));
  if (kind == Kind::bits) return;
  if (space == nullptr) {
    values.planes = context.arena.planes(rows, units, context.call.digits);
  } else {
    values.planes = {space->data, round_up(rows, kBlock), round_up(units, kBlock)};
  }
  values.scales = context.arena.take<float>(rows);
}

void prepare(CallContext& context, LayerInput& given, const float* factor) {
  if (given.kind != LayerInput::Kind::real) context.status += pack(given.packed, context.stream);
  if (given.kind == LayerInput::Kind::bits) return;
  given.values.factor = factor;
  given.values.guard = given.if_real();
  context.status += quantize_values(given.values, context.call.digits, context.stream);
}

HalfSweep half_sweep_of(const CallContext& context, const Weights& weights, bool to_hidden,
                        int64_t rows, const float* bias, Temperature temperature) {
  HalfSweep h{};
  h.rows = rows;
  h.given = to_hidden ? weights.n_visible : weights.n_hidden;
  h.units = to_hidden ? weights.n_hidden : weights.n_visible;
  h.weights = to_hidden ? weights.planes.to_hidden : weights.planes.to_visible;
  h.weight_scale = weights.planes.scale;
  h.bias = bias;
  h.beta = temperature.beta;
  h.betas = temperature.betas;
  h.draw = Draw::none;
  h.seed = context.call.seed;
  h.chain_offset = context.call.chain_offset;
  return h;
}

void from_bits(CallContext& context, HalfSweep h, const uint32_t* bits, Guard guard, bool hopper) {
  h.bits = bits;
  h.guard = guard;
  context.status += hopper ? half_sweep_sm90a(h, context.call.digits, context.stream)
                           : half_sweep(h, context.call.digits, false, context.stream);
}

void from_values(CallContext& context, HalfSweep h, const ValuePlanes& values, Guard guard) {
  h.values = values.planes;
  h.value_scales = values.scales;
  h.guard = guard;
  context.status += half_sweep(h, context.call.digits, true, context.stream);
}

void from_given(CallContext& context, const HalfSweep& h, const LayerInput& given, bool hopper) {
  if (given.kind != LayerInput::Kind::real)
    from_bits(context, h, given.packed.bits, given.if_bits(), hopper);
  if (given.kind != LayerInput::Kind::bits) from_values(context, h, given.values, given.if_real());
}

void bit_chain(CallContext& context, const Sweeps& a, Chain results, const LayerInput& given,
               bool drawn, const Choice& choice) {
  results.start = given.packed.bits;
  if (on_chip(choice) && !drawn && given.kind == LayerInput::Kind::bits) {
    resident_chain(context, a, results, 0, Guard{}, choice);
    return;
  }
  // The first hidden states come from a launch of their own, as only they see real states.
  if (!drawn) from_given(context, to_hidden_of(context, a, 0), given, choice.hopper);
  if (on_chip(choice) && a.sweeps > 1) {
    visible_half_sweep(context, a, results, 0, given.packed.bits, Guard{}, choice.hopper);
    resident_chain(context, a, results, 1, Guard{}, choice);
  } else {
    tiled_chain(context, a, results, nullptr, Guard{}, choice.hopper);
  }
}

void bit_chain_if_bits(CallContext& context, const Sweeps& a, Chain results,
                       const LayerInput& given, const Choice& choice) {
  results.start = given.packed.bits;
  if (on_chip(choice)) {
    resident_chain(context, a, results, 0, given.if_bits(), choice);
  } else {
    tiled_chain(context, a, results, results.start, given.if_bits(), choice.hopper);
  }
}

void gaussian_chain(CallContext& context, const Sweeps& a, float* states, const LayerInput& given,
                    bool drawn, const float* precision, const Choice& choice) {
  if (!on_chip(choice)) {
    real_chain(context, a, states, given.values, drawn, Guard{});
    return;
  }
  Chain whole{};
  whole.log_var = a.log_var;
  whole.precision = precision;
  whole.start_values = given.states();
  whole.states = states;
  whole.states_element = Element::float32;
  resident_chain(context, a, whole, 0, Guard{}, choice);
}

void real_chain(CallContext& context, const Sweeps& a, float* states, ValuePlanes values,
                bool drawn, Guard guard) {
  values.guard = guard;
  values.states = {states, Element::float32, a.rows, a.weights.n_visible, a.weights.n_visible, 1,
                   false};
  for (int64_t sweep = 0; sweep < a.sweeps; ++sweep) {
    if (sweep > 0) context.status += quantize_values(values, context.call.digits, context.stream);
    if (sweep > 0 || !drawn) from_values(context, to_hidden_of(context, a, sweep), values, guard);
    HalfSweep h = to_visible_of(context, a, sweep);
    h.states = states;
    h.states_element = Element::float32;
    from_bits(context, h, a.hidden, guard, false);
  }
}

}  // namespace rbm::cuda
