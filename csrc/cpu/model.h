// The parameters of one call, made ready for half-sweeps.
#pragma once

#include "cpu/operations.h"

namespace rbm::cpu {

enum class Layer { visible, hidden };

struct Model {
  Matrix W;  // [V, H]
  const float *b = nullptr, *c = nullptr;
  float scale = 1.0f;
  Buffer<float> precision, sigma;  // [V], Gaussian visible units only

  // 0, or the argument that is not finite. b, c and log_var may be null.
  int prepare(const Matrix& weight, const float* b, const float* c, const float* log_var,
              const Call& call);
  bool gaussian() const { return static_cast<bool>(sigma); }
  // A half-sweep that draws this layer; the caller fills in what is given and what is wanted.
  HalfSweep half_sweep(Layer drawn, Temperature temperature, const Call& call) const;
};

// Visible states and the sweeps that advance them.
struct Chain {
  const Model& model;
  const Call& call;
  Temperature temperature;
  States visible, hidden;
  OwnedOperand from_visible, from_hidden;

  Chain(const Model& m, Temperature t, const Call& c) : model(m), call(c), temperature(t) {}
  // Draws hidden given visible (unless they are drawn already) and visible given hidden. `clamp`
  // (may be null) is a half-sweep of which only the fields held* are set; the last sweep writes the
  // caller's states.
  bool sweep(int64_t index, bool hidden_drawn, const HalfSweep* clamp, Output last);
};

}  // namespace rbm::cpu
