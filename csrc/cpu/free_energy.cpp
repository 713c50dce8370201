// Free energies: a product whose epilogue sums softplus, so that no [B, H] matrix is written.
#include <algorithm>

#include "cpu/model.h"

namespace rbm::cpu {

int free_energy(const Input& v, const Matrix& W, const float* b, const float* c,
                const float* log_var, Temperature temperature, float* out, const Call& call) {
  Model model;
  int bad = model.prepare(W, b, c, log_var, call);
  if (bad) return bad;
  States states;
  OwnedOperand operand;
  bad = status_of(read_states(v, call, !log_var, states), kStates);
  if (bad) return bad;
  if (!make_operand(states, log_var ? model.precision.get() : nullptr, call, operand))
    return kStates;
  const int64_t tiles = (W.cols + kTile - 1) / kTile, V = W.rows;
  Buffer<double> partial(tiles * v.rows);
  HalfSweep h = model.half_sweep(Layer::hidden, temperature, call);
  h.given = operand.operand;
  h.softplus = partial.get();
  run(h, call);
  const int threads = call.threads_for(v.rows * V);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t m = 0; m < v.rows; ++m) {
    double sums[8] = {};  // eight at a time, so that the additions do not wait for one another
    for (int64_t i = 0; i < V; i += 8) {
      const int64_t n = std::min<int64_t>(8, V - i);
      for (int64_t j = 0; j < n; ++j) {
        const double x = v.at(m, i + j), bias = b[i + j];
        sums[j] += log_var ? (x - bias) * (x - bias) * model.precision.get()[i + j] / 2 : -x * bias;
      }
    }
    double energy = 0;
    for (double sum : sums) energy += sum;
    energy *= temperature.beta[m * temperature.stride];
    for (int64_t tile = 0; tile < tiles; ++tile) energy -= partial.get()[tile * v.rows + m];
    out[m] = static_cast<float>(energy);
  }
  return kNone;
}

}  // namespace rbm::cpu
