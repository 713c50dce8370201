// Chains of Gibbs sweeps, each in one launch: the weights stay in shared memory from the first
// half-sweep to the last.
#pragma once

#include "cuda/arch/device.h"
#include "cuda/types.h"
#include "include/rbm/operand_layout.h"

namespace rbm::cuda {

// Sweep t is half-sweep 2 t, which draws the hidden units, and half-sweep 2 t + 1, which draws the
// visible ones.
struct Chain {
  int64_t rows;
  int n_visible, n_hidden;
  int64_t sweeps;         // at least 1
  const uint32_t* start;  // [rows][words_of(n_visible)]; clamped units have their values already
  Guard guard;

  // For Gaussian visible units; null for Bernoulli ones. Gaussian chains start from `start_values`
  // in place of `start`, and their one result is `states`, as float32.
  const float* log_var;
  const float* precision;  // [n_visible]: exp(-log_var)
  Matrix start_values;     // [rows, n_visible]

  Planes to_hidden;   // weights of half-sweeps to the hidden layer: rows hidden, terms visible
  Planes to_visible;  // and of those to the visible layer: rows visible, terms hidden
  const float* weight_scale;  // [1]
  const float* visible_bias;
  const float* hidden_bias;
  float beta;
  const float* betas;  // [rows], or null: `beta` for all

  const int64_t* seed;
  uint32_t chain_offset;
  uint64_t half_sweep;  // index of the first half-sweep

  // Clamped visible units, as in HalfSweep. The values of Bernoulli units are 0 or 1 here, and
  // `states` is float32.
  const uint8_t* mask;
  int64_t mask_stride;
  const void* held;
  Element held_element;
  int64_t held_stride;

  // The last visible states, in each form whose pointer is not null.
  uint32_t* visible_bits;   // [rows][words_of(n_visible)]
  uint32_t* visible_terms;  // [n_visible][terms_words]: rows along a word, from term_word on
  int64_t terms_words, term_word;
  unsigned long long* visible_sums;  // [n_visible] += how many rows are on
  void* states;                      // [rows, n_visible], contiguous
  Element states_element;
};

// Whether the weights fit into one block's shared memory of that many bytes.
bool chain_fits(int n_visible, int n_hidden, int digits, int shared_bytes, bool gaussian);
// Runs the chains, on any GPU from sm_80. A cudaError_t: cudaErrorInvalidValue where the weights do
// not fit.
int chain(const Chain& a, int digits, cudaStream_t stream);

// The same with the weights spread over the blocks of a cluster (*_cluster_sm90a.cu), on sm_90
// only. The fewest blocks that hold them and 128 chains: 1, 2, 4, 8 or 16, or 0 where not even 16
// do.
int smallest_cluster(int n_visible, int n_hidden, int digits, int shared_bytes, bool gaussian);
// How many clusters of `cluster` blocks the device runs at a time, 64 chains or more in each.
int clusters_at_once(int digits, int cluster, int shared_bytes, bool gaussian);
// cluster: the smallest or a larger one. A cudaError_t as above.
int chain_sm90a(const Chain& a, int digits, int cluster, cudaStream_t stream);

}  // namespace rbm::cuda
