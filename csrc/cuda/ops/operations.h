// The operations of the cuda backend over raw addresses of a device. No CUDA header is needed here.
//
// Each puts its kernels on the call's stream and returns a cudaError_t, 0 where all were launched.
// With no workspace nothing is launched: the call is told how many bytes it needs.
#pragma once

#include <string>

#include "cuda/types.h"

namespace rbm::cuda {

struct Call {
  const int64_t* seed;  // int64[2]: seed, offset
  uint32_t chain_offset;
  int digits;
  int device;
  void* stream;
  void* workspace;  // 16-byte aligned, or null
  int64_t workspace_bytes;
};

// One half-sweep from the given layer [rows, K] by a weight [K, N] to the drawn one [rows, N].
struct Sample {
  Matrix given, weight;
  const float* bias;           // [N]
  const float* given_log_var;  // [K] if the given states are Gaussian units
  const float* drawn_log_var;  // [N] if the drawn ones are; `states` is float32 then
  Temperature temperature;
  void* states;
  Element states_element;
  float* means;  // [rows, N] or null
};
int sample(const Sample& a, Call& call);

struct Gibbs {
  Matrix v, W;
  const float* b;
  const float* c;
  int64_t sweeps;
  const float* log_var;
  Temperature temperature;
  const uint8_t* mask;  // [V] (a stride of 0) or [rows, V], or null
  int64_t mask_stride;
  Matrix values;  // [V] (a row stride of 0) or [rows, V]; without data the units keep what is in v
  void* states;   // [rows, V]; float32 where there is a mask or a log_var
  Element states_element;
};
int gibbs_sample(const Gibbs& a, Call& call);

struct FreeEnergy {
  Matrix v, W;
  const float* b;
  const float* c;
  const float* log_var;
  Temperature temperature;
  float* energies;  // [rows]
};
int free_energy(const FreeEnergy& a, Call& call);

// For Gaussian units (log_var), grad_W and grad_b still lack their factor 1 / s^2 and there is no
// gradient of log_var: the Python side finishes them from the states of both phases.
struct CdStep {
  Matrix v, W;
  const float* b;
  const float* c;
  int64_t sweeps;
  Matrix chains;  // without data the chains start from v
  const float* log_var;
  float* grad_W;  // [V, H]
  int64_t grad_stride;
  float* grad_b;
  float* grad_c;
  bool accumulate;
  void* advanced;  // the chains' last states; float32 where there is a log_var
  Element advanced_element;
  float* energies;  // [2]: mean free energy of the data and of the advanced chains
};
int cd_step(const CdStep& a, Call& call);

// How chains of that many rows and sweeps would be run, in words (choose.h).
std::string regime(int64_t rows, int n_visible, int n_hidden, int64_t sweeps, int digits,
                   bool gaussian, int device);

// How many clusters of so many blocks, each with all the memory it may have, a device runs at once;
// 0 where it runs none.
int clusters_on_device(int device, int blocks, int digits, bool gaussian);

// How many devices there are; where none can be used, 0 and the driver's words.
int device_count(std::string& error);
const char* error_string(int status);

}  // namespace rbm::cuda
