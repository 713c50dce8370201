// Contrastive divergence: chains, both phases' statistics and the gradient in one call.
#include <algorithm>
#include <numeric>

#include "cpu/model.h"

namespace rbm::cpu {
namespace {

// One phase: p(h|v) of its states as fixed point, and the sums that the free energy needs.
struct Statistics {
  int64_t stride;  // of `hidden`
  Buffer<int32_t> hidden;
  Buffer<double> softplus, counts;
  OwnedOperand visible;

  Statistics(int64_t rows, int64_t V, int64_t H)
      : stride((H + kTile - 1) / kTile * kTile),
        hidden(rows * stride),
        softplus(stride / kTile * rows),
        counts(V) {}

  void request(HalfSweep& h) {
    h.fixed = hidden.get();
    h.fixed_stride = stride;
    h.softplus = softplus.get();
  }

  double mean_free_energy(const Model& model, const States& states) const {
    const int64_t V = model.W.rows, rows = states.rows;
    double energy = 0;
    if (model.gaussian()) {
      double sums[8] = {};  // eight at a time, so that the additions do not wait for one another
      for (int64_t m = 0; m < rows; ++m) {
        for (int64_t i = 0; i < V; ++i) {
          const double distance = static_cast<double>(states.at(m, i)) - model.b[i];
          sums[i % 8] += distance * distance * model.precision.get()[i] / 2;
        }
      }
      for (double sum : sums) energy += sum;
    } else {
      for (int64_t i = 0; i < V; ++i) energy -= counts.get()[i] * model.b[i];
    }
    for (int64_t i = 0; i < stride / kTile * rows; ++i) energy -= softplus.get()[i];
    return energy / static_cast<double>(rows);
  }
};

uint32_t largest_state(const States& states, const Call& call) {
  if (states.binary()) return 0x3f800000u;
  return call.kernels->largest(states.real.get(), states.rows * states.units);
}

}  // namespace

int cd_step(const Input& v, const Matrix& W, const float* b, const float* c, int64_t k,
            const Input* chains, const float* log_var, const CdOutput& out, const Call& call) {
  const int64_t V = W.rows, H = W.cols, n_data = v.rows, n_chain = chains ? chains->rows : v.rows;
  const float one = 1.0f;
  const Temperature temperature{&one, 0};
  Model model;
  int bad = model.prepare(W, b, c, log_var, call);
  if (bad) return bad;
  const float* factor = log_var ? model.precision.get() : nullptr;

  States data;
  bad = status_of(read_states(v, call, !log_var, data), kStates);
  if (bad) return bad;
  Chain chain(model, temperature, call);
  if (chains) bad = status_of(read_states(*chains, call, !log_var, chain.visible), kChains);
  if (bad) return bad;

  // The data phase draws the first hidden states of the chains on its way, if they start here.
  Statistics positive(n_data, V, H), negative(n_chain, V, H);
  OwnedOperand from_data;
  if (!make_operand(data, factor, call, from_data)) return kStates;
  HalfSweep h = model.half_sweep(Layer::hidden, temperature, call);
  h.given = from_data.operand;
  positive.request(h);
  if (!chains) {
    chain.hidden = States::packed(n_data, H);
    h.bits = chain.hidden.bits.get();
    h.bits_stride = chain.hidden.stride;
    h.key = call.key(0);
  }
  run(h, call);
  from_data = OwnedOperand{};
  if (!chains) {
    if (log_var) {
      chain.visible.rows = n_data;
      chain.visible.units = V;
    } else {
      chain.visible = States::packed(n_data, V);
    }
  }
  for (int64_t sweep = 0; sweep < k; ++sweep) {
    const Output last = sweep == k - 1 ? out.chains : Output{nullptr, nullptr};
    if (!chain.sweep(sweep, !chains && sweep == 0, nullptr, last)) return kChains;
  }
  if (!make_operand(chain.visible, factor, call, chain.from_visible)) return kChains;
  h = model.half_sweep(Layer::hidden, temperature, call);
  h.given = chain.from_visible.operand;
  negative.request(h);
  run(h, call);
  chain.from_visible = OwnedOperand{};
  chain.from_hidden = OwnedOperand{};

  // Real states of either phase share one scale, so that both sums are integers of one unit.
  const bool real = !data.binary() || !chain.visible.binary();
  const float scale =
      real ? scale_of(std::max(largest_state(data, call), largest_state(chain.visible, call)),
                      call.digits)
           : 1.0f;
  positive.visible = make_transposed(data, real, scale, call, positive.counts.get());
  negative.visible = make_transposed(chain.visible, real, scale, call, negative.counts.get());
  const int64_t common = std::lcm(n_data, n_chain);
  const double weight_data = static_cast<double>(common / n_data),
               weight_chain = static_cast<double>(common / n_chain);
  Gradient g{};
  g.phase[0] =
      Phase{positive.visible.operand, positive.hidden.get(), positive.stride, -weight_data};
  g.phase[1] =
      Phase{negative.visible.operand, negative.hidden.get(), negative.stride, weight_chain};
  g.n_visible = V;
  g.n_hidden = H;
  g.bias_unit = static_cast<float>(1.0 / h.fixed_one / static_cast<double>(common));
  g.unit = scale * g.bias_unit;
  g.accumulate = out.accumulate;
  g.weight = out.grad_W;
  g.weight_stride = out.grad_W_stride;
  g.bias = out.grad_c;
  const int64_t tiles = (H + kTile - 1) / kTile, rows = V + 1;
  const int threads = call.threads_for(rows * H * ((n_data + n_chain) / 32 + 1) / 8);
  for_each_part(tiles, rows, threads, [&](int64_t tile, int64_t begin, int64_t end) {
    call.kernels->gradient(g, tile, begin, end);
  });
  for (int64_t i = 0; i < V; ++i) {
    const double sum =
        negative.counts.get()[i] * weight_chain - positive.counts.get()[i] * weight_data;
    const float grad = static_cast<float>(sum / static_cast<double>(common));
    out.grad_b[i] = out.accumulate ? out.grad_b[i] + grad : grad;
  }
  out.energies[0] = static_cast<float>(positive.mean_free_energy(model, data));
  out.energies[1] = static_cast<float>(negative.mean_free_energy(model, chain.visible));
  if (log_var) {
    for (int64_t i = 0; i < n_chain * V; ++i) {
      if (out.chains.floats) out.chains.floats[i] = chain.visible.real.get()[i];
    }
  }
  return kNone;
}

}  // namespace rbm::cpu
