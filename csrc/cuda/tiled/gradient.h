// The gradient of the weights and biases, both phases in one launch.
#pragma once

#include "cuda/arch/device.h"
#include "cuda/types.h"
#include "include/rbm/operand_layout.h"

namespace rbm::cuda {

// With S_data and S_chain the exact integer sums over the rows of v_i P_j,
// grad_W[i, j] = float(chain_weight * S_chain - data_weight * S_data) * unit * scale. The data's
// terms come first; the chains' start at term round_up(data_rows, 128).
struct Gradient {
  int64_t data_rows, chain_rows;
  double data_weight, chain_weight;  // the least common multiple of the counts over each count
  float unit;                        // 1 / (2^15 or 2^23) / least common multiple
  double common;                     // the least common multiple

  int n_visible, n_hidden;
  const uint32_t* bits;      // [n_visible][terms / 32]: v, chains along a word
  Planes values;             // or v in fixed point: rows n_visible (natural order, padded to 128)
  const float* value_scale;  // [1], of the values
  Guard guard;

  Planes statistics;  // p's digits; see HalfSweep

  const unsigned long long* visible_sums[2];  // [n_visible] of data and chains, exact counts
  const double* visible_totals[2];            // or sums of real values; used where `real`
  const unsigned long long* hidden_sums[2];   // [n_hidden] of data and chains

  const float* one;  // [1]: 1, or NaN, which makes all gradients NaN; or null

  float* grad_W;  // [n_visible, n_hidden], row stride grad_stride
  int64_t grad_stride;
  float* grad_b;  // [n_visible]
  float* grad_c;  // [n_hidden]
  bool accumulate;
};

// digits: 2 or 3. real: v is `values`, else `bits`. A cudaError_t.
int gradient(const Gradient& a, int digits, bool real, cudaStream_t stream);

// The same from bits with Hopper's instructions (gradient_sm90a.cu); phases of more than
// 65,535 rows take the portable kernel.
int gradient_sm90a(const Gradient& a, int digits, cudaStream_t stream);

}  // namespace rbm::cuda
