#include "cuda/ops/call.h"

namespace rbm::cuda {
namespace {

Draw draw_of(const float* log_var) { return log_var == nullptr ? Draw::bernoulli : Draw::gaussian; }

HalfSweep to_hidden_of(const Run& run, const Sweeps& a, int64_t sweep) {
  HalfSweep h = half_sweep_of(run, a.weights, true, a.rows, a.hidden_bias, a.temperature);
  h.draw = Draw::bernoulli;
  h.half_sweep = static_cast<uint64_t>(2 * sweep);
  h.drawn_bits = a.hidden;
  return h;
}

HalfSweep to_visible_of(const Run& run, const Sweeps& a, int64_t sweep) {
  HalfSweep h = half_sweep_of(run, a.weights, false, a.rows, a.visible_bias, a.temperature);
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

void visible_half_sweep(Run& run, const Sweeps& a, const Chain& results, int64_t sweep,
                        uint32_t* bits, Guard guard, bool hopper) {
  HalfSweep h = to_visible_of(run, a, sweep);
  h.drawn_bits = bits;
  if (sweep == a.sweeps - 1) {
    h.drawn_terms = results.visible_terms;
    h.terms_words = results.terms_words;
    h.term_word = results.term_word;
    h.drawn_sums = results.visible_sums;
    h.states = results.states;
    h.states_element = results.states_element;
  }
  from_bits(run, h, a.hidden, guard, hopper);
}

// A launch for each half-sweep, from `start` or, if that is null, from a.hidden.
void tiled_chain(Run& run, const Sweeps& a, const Chain& results, const uint32_t* start,
                 Guard guard, bool hopper) {
  for (int64_t sweep = 0; sweep < a.sweeps; ++sweep) {
    const uint32_t* given = sweep == 0 ? start : results.visible_bits;
    if (given != nullptr) from_bits(run, to_hidden_of(run, a, sweep), given, guard, hopper);
    visible_half_sweep(run, a, results, sweep, results.visible_bits, guard, hopper);
  }
}

// All sweeps from `first` on in one launch. chain_: where they start and what is wanted of them.
void resident_chain(Run& run, const Sweeps& a, Chain chain_, int64_t first, Guard guard,
                    const Choice& choice) {
  chain_.half_sweep = static_cast<uint64_t>(2 * first);
  chain_.rows = a.rows;
  chain_.n_visible = a.weights.n_visible;
  chain_.n_hidden = a.weights.n_hidden;
  chain_.sweeps = a.sweeps - first;
  chain_.guard = guard;
  chain_.to_hidden = a.weights.planes.to_hidden;
  chain_.to_visible = a.weights.planes.to_visible;
  chain_.weight_scale = a.weights.planes.scale;
  chain_.visible_bias = a.visible_bias;
  chain_.hidden_bias = a.hidden_bias;
  chain_.beta = a.temperature.beta;
  chain_.betas = a.temperature.betas;
  chain_.seed = run.call.seed;
  chain_.chain_offset = run.call.chain_offset;
  chain_.mask = a.mask;
  chain_.mask_stride = a.mask_stride;
  chain_.held = a.held.data;
  chain_.held_element = a.held.element;
  chain_.held_stride = a.held.row_stride;
  run.status += choice.chain == Regime::resident
                    ? chain(chain_, run.call.digits, run.stream)
                    : chain_sm90a(chain_, run.call.digits, choice.cluster, run.stream);
}

}  // namespace

Run::Run(Call& c)
    : call(c), stream(static_cast<cudaStream_t>(c.stream)), arena(c.workspace), current(c.device) {
  status += current.status;
  status += device_of(c.device, device);
}

bool Run::ready() {
  if (arena.base() == nullptr) call.workspace_bytes = arena.used();
  if (arena.base() == nullptr || status) return false;
  status += fill_zero(arena.base(), static_cast<size_t>(counters), stream);
  return true;
}

void Weights::count(Run& run, const Matrix& W) {
  n_visible = static_cast<int>(W.rows);
  n_hidden = static_cast<int>(W.cols);
  planes.W = W;
  planes.largest = run.arena.take<int32_t>(1);
}

void Weights::lay_out(Run& run, bool to_visible) {
  planes.to_hidden = run.arena.planes(n_hidden, n_visible, run.call.digits);
  planes.to_visible = {};
  if (to_visible) planes.to_visible = run.arena.planes(n_visible, n_hidden, run.call.digits);
  planes.scale = run.arena.take<float>(1);
  planes.one = run.arena.take<float>(1);
}

void Given::count(Run& run, const Matrix& states, bool gaussian) {
  kind = gaussian ? Kind::real : states.binary ? Kind::bits : Kind::either;
  packed = {};
  values = {};
  packed.states = values.states = states;
  if (kind == Kind::either) packed.is_real = run.arena.take<int32_t>(1);
}

void Given::lay_out(Run& run, const Planes* space) {
  const int64_t rows = states().rows, units = states().cols;
  if (kind != Kind::real) packed.bits = run.arena.take<uint32_t>(rows * words_of(units));
  if (kind == Kind::bits) return;
  if (space == nullptr) {
    values.planes = run.arena.planes(rows, units, run.call.digits);
  } else {
    values.planes = {space->data, round_up(rows, kBlock), round_up(units, kBlock)};
  }
  values.scales = run.arena.take<float>(rows);
}

void prepare(Run& run, Given& given, const float* factor) {
  if (given.kind != Given::Kind::real) run.status += pack(given.packed, run.stream);
  if (given.kind == Given::Kind::bits) return;
  given.values.factor = factor;
  given.values.guard = given.if_real();
  run.status += quantise_values(given.values, run.call.digits, run.stream);
}

HalfSweep half_sweep_of(const Run& run, const Weights& weights, bool to_hidden, int64_t rows,
                        const float* bias, Temperature temperature) {
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
  h.seed = run.call.seed;
  h.chain_offset = run.call.chain_offset;
  return h;
}

void from_bits(Run& run, HalfSweep h, const uint32_t* bits, Guard guard, bool hopper) {
  h.bits = bits;
  h.guard = guard;
  run.status += hopper ? half_sweep_sm90a(h, run.call.digits, run.stream)
                       : half_sweep(h, run.call.digits, false, run.stream);
}

void from_values(Run& run, HalfSweep h, const ValuePlanes& values, Guard guard) {
  h.values = values.planes;
  h.value_scales = values.scales;
  h.guard = guard;
  run.status += half_sweep(h, run.call.digits, true, run.stream);
}

void from_given(Run& run, const HalfSweep& h, const Given& given, bool hopper) {
  if (given.kind != Given::Kind::real)
    from_bits(run, h, given.packed.bits, given.if_bits(), hopper);
  if (given.kind != Given::Kind::bits) from_values(run, h, given.values, given.if_real());
}

void bit_chain(Run& run, const Sweeps& a, Chain results, const Given& given, bool drawn,
               const Choice& choice) {
  results.start = given.packed.bits;
  if (on_chip(choice) && !drawn && given.kind == Given::Kind::bits) {
    resident_chain(run, a, results, 0, Guard{}, choice);
    return;
  }
  // The first hidden states come from a launch of their own, as only they see real states.
  if (!drawn) from_given(run, to_hidden_of(run, a, 0), given, choice.hopper);
  if (on_chip(choice) && a.sweeps > 1) {
    visible_half_sweep(run, a, results, 0, given.packed.bits, Guard{}, choice.hopper);
    resident_chain(run, a, results, 1, Guard{}, choice);
  } else {
    tiled_chain(run, a, results, nullptr, Guard{}, choice.hopper);
  }
}

void bit_chain_if_bits(Run& run, const Sweeps& a, Chain results, const Given& given,
                       const Choice& choice) {
  results.start = given.packed.bits;
  if (on_chip(choice)) {
    resident_chain(run, a, results, 0, given.if_bits(), choice);
  } else {
    tiled_chain(run, a, results, results.start, given.if_bits(), choice.hopper);
  }
}

void gaussian_chain(Run& run, const Sweeps& a, float* states, const Given& given, bool drawn,
                    const float* precision, const Choice& choice) {
  if (!on_chip(choice)) {
    real_chain(run, a, states, given.values, drawn, Guard{});
    return;
  }
  Chain whole{};
  whole.log_var = a.log_var;
  whole.precision = precision;
  whole.start_values = given.states();
  whole.states = states;
  whole.states_element = Element::float32;
  resident_chain(run, a, whole, 0, Guard{}, choice);
}

void real_chain(Run& run, const Sweeps& a, float* states, ValuePlanes values, bool drawn,
                Guard guard) {
  values.guard = guard;
  values.states = {states, Element::float32, a.rows, a.weights.n_visible, a.weights.n_visible, 1,
                   false};
  for (int64_t sweep = 0; sweep < a.sweeps; ++sweep) {
    if (sweep > 0) run.status += quantise_values(values, run.call.digits, run.stream);
    if (sweep > 0 || !drawn) from_values(run, to_hidden_of(run, a, sweep), values, guard);
    HalfSweep h = to_visible_of(run, a, sweep);
    h.states = states;
    h.states_element = Element::float32;
    from_bits(run, h, a.hidden, guard, false);
  }
}

}  // namespace rbm::cuda
