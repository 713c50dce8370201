// k sweeps of block Gibbs sampling.
#include <cstring>

#include "cpu/model.h"

namespace rbm::cpu {

bool Chain::sweep(int64_t index, bool hidden_drawn, const HalfSweep* clamp, Output last) {
  if (!hidden_drawn) {
    if (!make_operand(visible, model.gaussian() ? model.precision.get() : nullptr, call,
                      from_visible))
      return false;
    if (!hidden.binary()) hidden = States::packed(visible.rows, model.W.cols);
    HalfSweep h = model.half_sweep(Layer::hidden, temperature, call);
    h.given = from_visible.operand;
    h.key = call.key(2 * index);
    h.bits = hidden.bits.get();
    h.bits_stride = hidden.stride;
    run(h, call);
  }
  make_operand(hidden, nullptr, call, from_hidden);
  HalfSweep h = model.half_sweep(Layer::visible, temperature, call);
  h.given = from_hidden.operand;
  h.key = call.key(2 * index + 1);
  if (model.gaussian()) {
    if (!visible.real) {  // binary data of Gaussian units: from now on the states are real
      visible.bits = Buffer<uint8_t>();
      visible.real = Buffer<float>(visible.rows * visible.units);
    }
    h.states = visible.real.get();
  } else {
    if (!visible.binary()) {
      visible = States::packed(visible.rows, visible.units);
      from_visible = OwnedOperand{};
    }
    h.bits = visible.bits.get();
    h.bits_stride = visible.stride;
    h.states = last.floats;
    h.bytes = last.bytes;
  }
  if (clamp) {
    h.held = clamp->held;
    h.held_stride = clamp->held_stride;
    h.held_bits = clamp->held_bits;
    h.held_bits_stride = clamp->held_bits_stride;
    h.held_states = clamp->held_states;
    h.held_states_stride = clamp->held_states_stride;
  }
  run(h, call);
  return true;
}

namespace {

// Whether a clamped unit is given a value that Bernoulli units do not take.
bool holds_values_outside(const Clamp& clamp, int64_t rows, int64_t units) {
  if (!clamp.mask || !(clamp.values.floats || clamp.values.bytes)) return false;
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t i = 0; i < units; ++i) {
      const float x = clamp.values.at(m, i);
      if (clamp.mask[m * clamp.mask_stride + i] && (x < -kSlack || x > 1 + kSlack)) return true;
    }
  }
  return false;
}

}  // namespace

int gibbs_sample(const Input& v, const Matrix& W, const float* b, const float* c, int64_t k,
                 const float* log_var, Temperature temperature, const Clamp& clamp, Output states,
                 const Call& call) {
  Model model;
  int bad = model.prepare(W, b, c, log_var, call);
  if (bad) return bad;
  Chain chain(model, temperature, call);
  Buffer<float> start;  // the initial states with the clamped values put in
  Input initial = v;
  States mask, held_bits;
  HalfSweep held{};
  const int64_t V = W.rows;
  if (clamp.mask) {
    const int64_t value_rows = clamp.values.row_stride ? v.rows : 1;
    for (int64_t m = 0; clamp.values.floats && m < value_rows; ++m) {
      if (!all_finite(clamp.values.floats + m * clamp.values.row_stride, V, call)) return kValues;
    }
    const Input mask_input{nullptr, clamp.mask, clamp.mask_stride ? v.rows : 1, V,
                           clamp.mask_stride};
    read_states(mask_input, call, false, mask);
    start = Buffer<float>(v.rows * V);
    const bool given = clamp.values.floats || clamp.values.bytes;
    for (int64_t m = 0; m < v.rows; ++m) {
      for (int64_t i = 0; i < V; ++i) {
        const bool hold = clamp.mask[m * clamp.mask_stride + i];
        start.get()[m * V + i] = given && hold ? clamp.values.at(m, i) : v.at(m, i);
      }
    }
    initial = Input{start.get(), nullptr, v.rows, V, V};
    held.held = mask.bits.get();
    held.held_stride = clamp.mask_stride ? mask.stride : 0;
  }
  bad = status_of(read_states(initial, call, !log_var, chain.visible), kStates);
  if (bad > kOutside && holds_values_outside(clamp, v.rows, V)) return kOutside | kValues;
  if (bad) return bad;
  // Clamped values other than 0 and 1 in a Bernoulli layer make the states of the whole chain real:
  // after each sweep they are put back among the draws.
  const bool gray = clamp.mask && !model.gaussian() && !chain.visible.binary();
  if (clamp.mask && model.gaussian()) {
    held.held_states = start.get();
    held.held_states_stride = V;
  } else if (clamp.mask && !gray) {
    held_bits = States::packed(v.rows, V);
    std::memcpy(held_bits.bits.get(), chain.visible.bits.get(),
                static_cast<size_t>(v.rows * chain.visible.stride));
    held.held_bits = held_bits.bits.get();
    held.held_bits_stride = held_bits.stride;
  }
  Buffer<float> drawn;
  if (gray) drawn = Buffer<float>(v.rows * V);
  for (int64_t sweep = 0; sweep < k; ++sweep) {
    const bool last = sweep == k - 1;
    Output out = last ? states : Output{nullptr, nullptr};
    if (gray) out = Output{drawn.get(), nullptr};
    if (!chain.sweep(sweep, false, clamp.mask && !gray ? &held : nullptr, out)) return kStates;
    if (gray) {
      for (int64_t m = 0; m < v.rows; ++m) {
        for (int64_t i = 0; i < V; ++i) {
          if (clamp.mask[m * clamp.mask_stride + i])
            drawn.get()[m * V + i] = start.get()[m * V + i];
        }
      }
      chain.from_visible = OwnedOperand{};
      const Input mixed{drawn.get(), nullptr, v.rows, V, V};
      read_states(mixed, call, false, chain.visible);
    }
  }
  if (model.gaussian() || gray) {
    const float* final_states = gray ? drawn.get() : chain.visible.real.get();
    for (int64_t i = 0; i < v.rows * V; ++i) {
      if (states.floats) states.floats[i] = final_states[i];
      if (states.bytes) states.bytes[i] = static_cast<uint8_t>(final_states[i]);
    }
  }
  return kNone;
}

}  // namespace rbm::cpu
