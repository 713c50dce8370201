// k sweeps in one launch, with the weights resident in shared memory.
#pragma once

#include "cuda/arch/device.h"
#include "cuda/types.h"
#include "include/rbm/operand_layout.h"

namespace rbm::cuda {

// Half-sweeps 2t (hidden) and 2t + 1 (visible) for t = 0 .. sweeps - 1.
struct Chain {
  int64_t rows;
  int n_visible, n_hidden;
  int64_t sweeps;         // at least 1
  const uint32_t* start;  // [rows][words_of(n_visible)], units that keep a value at that value
  Guard guard;

  // Gaussian visible units, or null: Bernoulli ones. They start from `start_values` in place of
  // `start` and have one result: `states`, which is float32.
  const float* log_var;
  const float* precision;  // [n_visible]: exp(-log_var)
  Matrix start_values;     // [rows, n_visible]

  Planes to_hidden;   // the weights as HalfSweep wants them for v -> h: rows hidden, terms visible
  Planes to_visible;  // and for h -> v: rows visible, terms hidden
  const float* weight_scale;  // [1]
  const float* visible_bias;
  const float* hidden_bias;
  float beta;
  const float* betas;  // [rows], or null: `beta` for all

  const int64_t* seed;
  uint32_t chain_offset;
  uint64_t half_sweep;  // index of the first half-sweep

  // Visible units that keep a value, as in HalfSweep (Bernoulli units 0 or 1; `states` is float32).
  const uint8_t* mask;
  int64_t mask_stride;
  const void* held;
  Element held_element;
  int64_t held_stride;

  // Results, null where not wanted: the last visible states.
  uint32_t* visible_bits;   // [rows][words_of(n_visible)]
  uint32_t* visible_terms;  // [n_visible][terms_words]: rows along a word, from term_word on
  int64_t terms_words, term_word;
  unsigned long long* visible_sums;  // [n_visible] += how many rows are on
  void* states;                      // [rows, n_visible], contiguous
  Element states_element;
};

// Whether the weights fit into one block's shared memory of that many bytes.
bool chain_fits(int n_visible, int n_hidden, int digits, int shared_bytes, bool gaussian);
// On any GPU from sm_80. A cudaError_t: cudaErrorInvalidValue where the weights do not fit.
int chain(const Chain& a, int digits, cudaStream_t stream);

// The weights spread over the blocks of a cluster (*_cluster_sm90a.cu). How many blocks it takes to
// hold them and 128 chains: 1, 2, 4, 8 or 16, or 0 where not even 16 do.
int chain_sm90a_cluster(int n_visible, int n_hidden, int digits, int shared_bytes, bool gaussian);
// How many clusters of so many blocks the device runs at a time, 64 chains or more in each.
int chain_sm90a_clusters(int digits, int cluster, int shared_bytes, bool gaussian);
// With that many blocks or more, on sm_90 only. A cudaError_t as above.
int chain_sm90a(const Chain& a, int digits, int cluster, cudaStream_t stream);

}  // namespace rbm::cuda
