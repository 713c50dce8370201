// The operations of the cpu backend over raw pointers. Each returns 0, the Argument whose values
// are not finite, or kOutside and the Argument whose values lie outside [0, 1], which Bernoulli
// units do not take; nothing has been written to the caller's memory then.
#pragma once

#include "cpu/states.h"

namespace rbm::cpu {

enum Argument {
  kNone = 0,
  kWeight = 1,
  kStates = 2,
  kBiasVisible = 3,
  kBiasHidden = 4,
  kLogVar = 5,
  kChains = 6,
  kValues = 7
};
constexpr int kOutside = 16;

// What an operation returns for states of an argument.
inline int status_of(Values values, Argument argument) {
  if (values == Values::usable) return kNone;
  return values == Values::outside ? kOutside | argument : argument;
}

// Where states go: float32 or bytes, [rows, units] contiguous.
struct Output {
  float* floats;
  uint8_t* bytes;
};

struct Temperature {
  const float* beta;
  int64_t stride;  // 0: one for all chains
};

// One half-sweep. weight is [K, N] from the given layer to the drawn one; given_log_var [K] if the
// given states are Gaussian units, drawn_log_var [N] if the drawn ones are.
int sample(const Input& given, const Matrix& weight, const float* bias, const float* given_log_var,
           const float* drawn_log_var, Temperature temperature, Output states, float* means,
           double* sums, const Call& call);

struct Clamp {
  const uint8_t* mask;  // bytes [V] or [B, V]
  int64_t mask_stride;
  Input values;  // floats [V] or [B, V] (row_stride 0), or null pointers: the initial states
};

int gibbs_sample(const Input& v, const Matrix& W, const float* b, const float* c, int64_t k,
                 const float* log_var, Temperature temperature, const Clamp& clamp, Output states,
                 const Call& call);

int free_energy(const Input& v, const Matrix& W, const float* b, const float* c,
                const float* log_var, Temperature temperature, float* out, const Call& call);

struct CdOutput {
  float* grad_W;  // [V, H]
  int64_t grad_W_stride;
  float* grad_b;
  float* grad_c;
  bool accumulate;
  Output chains;
  float* energies;  // mean free energy of the data and of the advanced chains
};

// For Gaussian units (log_var), grad_W and grad_b still lack their factor 1 / s^2 and there is no
// gradient of log_var: the Python side finishes them from the states of both phases.
int cd_step(const Input& v, const Matrix& W, const float* b, const float* c, int64_t k,
            const Input* chains, const float* log_var, const CdOutput& out, const Call& call);

}  // namespace rbm::cpu
