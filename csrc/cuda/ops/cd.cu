// Contrastive divergence: chains, both phases' statistics and the gradient in one call.
#include <numeric>

#include "cuda/ops/call.h"
#include "cuda/tiled/gradient.h"

namespace rbm::cuda {
namespace {

enum Phase { kData, kChains };

// What each phase leaves for the gradient and for the energies.
struct Statistics {
  int64_t rows[2], first_term[2], terms;
  unsigned long long* visible_sums[2];
  unsigned long long* hidden_sums[2];
  uint32_t* bits;  // [visible][terms / 32]
  Planes hidden;   // p(h|v)
  double* softplus[2];

  void count(CallContext& context, int64_t V, int64_t H) {
    for (int phase : {kData, kChains}) {
      visible_sums[phase] = context.arena.take<unsigned long long>(V);
      hidden_sums[phase] = context.arena.take<unsigned long long>(H);
    }
  }
  void lay_out(CallContext& context, int64_t V, int64_t H) {
    first_term[kData] = 0;
    first_term[kChains] = round_up(rows[kData], kBlock);
    terms = first_term[kChains] + round_up(rows[kChains], kBlock);
    bits = context.arena.take<uint32_t>(V * terms / 32);
    hidden = context.arena.planes(H, terms, context.call.digits);
    for (int phase : {kData, kChains}) {
      softplus[phase] = context.arena.take<double>(slices_of(H) * rows[phase]);
    }
  }
  void request(HalfSweep& h, Phase phase) const {
    h.statistics = hidden;
    h.first_term = first_term[phase];
    h.statistics_sums = hidden_sums[phase];
    h.softplus = softplus[phase];
  }
};

// The visible states of both phases where they may be real.
void count(CallContext& context, PhaseValues& v, int64_t V) {
  v.columns_done = context.arena.take<int32_t>(2 * ((V + 31) / 32));
  for (int phase : {kData, kChains}) {
    v.is_real[phase] = context.arena.take<int32_t>(1);
    v.largest[phase] = context.arena.take<int32_t>(1);
  }
}
void lay_out(CallContext& context, PhaseValues& v, const Statistics& s, int V) {
  for (int phase : {kData, kChains}) {
    v.totals[phase] = context.arena.take<double>(V);
    v.spreads[phase] = context.arena.take<double>(V);
  }
  v.partial = context.arena.take<double>(phase_partials(s.rows[kData], s.rows[kChains], V));
  v.planes = context.arena.planes(V, s.terms, context.call.digits);
  v.scale = context.arena.take<float>(1);
}

}  // namespace

int cd_step(const CdStep& a, Call& call) {
  CallContext context(call);
  const bool gaussian = a.log_var != nullptr, persistent = a.chains.data != nullptr;
  const Temperature temperature{1.0f, nullptr};
  Weights weights;
  LayerInput data, chains;
  Statistics statistics;
  PhaseValues values{};
  MeanEnergies energies{};
  statistics.rows[kData] = a.v.rows;
  statistics.rows[kChains] = persistent ? a.chains.rows : a.v.rows;
  const int64_t n_data = a.v.rows, n_chains = statistics.rows[kChains];

  weights.count(context, a.W);
  const int V = weights.n_visible, H = weights.n_hidden;
  const Choice choice = choose(context.device, n_chains, V, H, a.sweeps, call.digits, gaussian);
  // Gaussian chains on the chip start from the real states themselves.
  const bool from_start = gaussian && on_chip(choice);
  data.count(context, a.v, gaussian);
  if (persistent) chains.count(context, a.chains, gaussian);
  statistics.count(context, V, H);
  const bool may_be_real = data.kind != LayerInput::Kind::bits;
  if (may_be_real) count(context, values, V);
  energies.blocks_done = context.arena.take<int32_t>(2);
  context.end_of_counters();

  weights.lay_out(context, true);
  statistics.lay_out(context, V, H);
  if (may_be_real) lay_out(context, values, statistics, V);
  // The values of both phases come last, when those that half-sweeps started from are done with.
  data.lay_out(context, &values.planes);
  if (persistent) chains.lay_out(context);
  float* precision = gaussian ? context.arena.take<float>(V) : nullptr;
  auto* hidden = context.arena.take<uint32_t>(n_chains * words_of(H));
  auto* visible = context.arena.take<uint32_t>(n_chains * words_of(V));
  energies.partial = context.arena.take<double>(2 * kEnergyBlocks);
  if (!context.ready()) return context.status;

  context.status += quantize_weights(
      weights.planes,
      {{a.b, a.c, a.log_var}, {weights.n_visible, weights.n_hidden, weights.n_visible}},
      call.digits, context.stream);
  if (gaussian) context.status += precisions(a.log_var, V, precision, context.stream);
  data.packed.terms = statistics.bits;
  data.packed.terms_words = statistics.terms / 32;
  data.packed.sums = statistics.visible_sums[kData];
  prepare(context, data, precision);
  if (persistent && !from_start) prepare(context, chains, precision);

  // The data phase draws the first hidden states on its way, if the chains start there.
  HalfSweep h = half_sweep_of(context, weights, true, n_data, a.c, temperature);
  statistics.request(h, kData);
  if (!persistent && !from_start) {
    h.draw = Draw::bernoulli;
    h.drawn_bits = hidden;
  }
  from_given(context, h, data, choice.hopper);

  const LayerInput& start = persistent ? chains : data;
  const Sweeps sweeps{weights,  a.b,     a.c, a.log_var, temperature, n_chains,
                      a.sweeps, nullptr, 0,   Matrix{},  hidden};
  const Matrix advanced{a.advanced, a.advanced_element, n_chains, V, V, 1, !gaussian};
  h = half_sweep_of(context, weights, true, n_chains, a.c, temperature);
  statistics.request(h, kChains);
  if (gaussian) {
    gaussian_chain(context, sweeps, static_cast<float*>(a.advanced), start, !persistent, precision,
                   choice);
    ValuePlanes between = start.values;
    between.states = advanced;
    between.factor = precision;
    context.status += quantize_values(between, call.digits, context.stream);
    from_values(context, h, between, Guard{});
  } else {
    Chain results{};
    results.visible_bits = visible;
    results.visible_terms = statistics.bits;
    results.terms_words = statistics.terms / 32;
    results.term_word = statistics.first_term[kChains] / 32;
    results.visible_sums = statistics.visible_sums[kChains];
    results.states = a.advanced;
    results.states_element = a.advanced_element;
    bit_chain(context, sweeps, results, start, !persistent, choice);
    from_bits(context, h, visible, Guard{}, choice.hopper);
  }

  const float one = call.digits == 3 ? 8388608.0f : 32768.0f;
  const int64_t common = std::lcm(n_data, n_chains);
  Gradient g{};
  g.data_rows = n_data;
  g.chain_rows = n_chains;
  g.data_weight = static_cast<double>(common / n_data);
  g.chain_weight = static_cast<double>(common / n_chains);
  g.common = static_cast<double>(common);
  g.unit = static_cast<float>(1.0 / one / g.common);
  g.n_visible = V;
  g.n_hidden = H;
  g.statistics = statistics.hidden;
  g.one = weights.planes.one;
  g.grad_W = a.grad_W;
  g.grad_stride = a.grad_stride;
  g.grad_b = a.grad_b;
  g.grad_c = a.grad_c;
  g.accumulate = a.accumulate;
  for (int phase : {kData, kChains}) {
    g.visible_sums[phase] = energies.counts[phase] = statistics.visible_sums[phase];
    g.visible_totals[phase] = energies.totals[phase] = values.totals[phase];
    g.hidden_sums[phase] = statistics.hidden_sums[phase];
    energies.spreads[phase] = values.spreads[phase];
    energies.rows[phase] = statistics.rows[phase];
    energies.softplus[phase] = statistics.softplus[phase];
  }
  if (!gaussian) {
    g.bits = statistics.bits;
    g.guard = data.if_bits();
    const bool hopper = choice.hopper && n_data < 65536 && n_chains < 65536;
    context.status += hopper ? gradient_sm90a(g, call.digits, context.stream)
                             : gradient(g, call.digits, false, context.stream);
  }
  if (may_be_real) {
    values.states[kData] = a.v;
    values.states[kChains] = advanced;
    values.guard = data.if_real();
    values.center = gaussian ? a.b : nullptr;
    context.status += phase_values(values, call.digits, context.stream);
    g.values = values.planes;
    g.value_scale = values.scale;
    g.guard = data.if_real();
    context.status += gradient(g, call.digits, true, context.stream);
  }

  energies.slices = slices_of(H);
  energies.n_visible = V;
  energies.bias = a.b;
  energies.precision = precision;
  energies.is_real = data.kind == LayerInput::Kind::either ? data.packed.is_real : nullptr;
  energies.one = weights.planes.one;
  energies.energies = a.energies;
  context.status += mean_energies(energies, context.stream);
  return context.status;
}

}  // namespace rbm::cuda
