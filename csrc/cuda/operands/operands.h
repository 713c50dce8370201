// The caller's arrays on their way into products, and sums over them.
//
// A layer's states become bits where they are 0 or 1. Where they may be anything (all but bool
// tensors), `pack` finds out on the device and sets *is_real, and kernels that Guards choose
// between are launched for both cases: the host never waits to know.
#pragma once

#include "cuda/arch/device.h"
#include "cuda/types.h"
#include "include/rbm/operand_layout.h"

namespace rbm::cuda {

// A weight's digits, with one scale for the whole matrix [terms, units] or its transpose.
struct WeightPlanes {
  Matrix W;           // [visible, hidden]; either stride is 1
  Planes to_hidden;   // rows: the columns of W as row_of_unit; terms: its rows. Or no data
  Planes to_visible;  // rows: the rows of W as row_of_unit; terms: its columns. Or no data
  int32_t* largest;   // [1], zero before: the bits of the largest magnitude
  float* scale;       // [1]
  float* one;         // [1]: 1, or NaN where W or a vector has values that are not finite
};
// The model's other parameters, null where there are none: a NaN among them makes the scale NaN
// too, as comparisons would hide it.
struct Vectors {
  const float* data[3];
  int64_t lengths[3];
};
int quantize_weights(const WeightPlanes& a, const Vectors& vectors, int digits,
                     cudaStream_t stream);

struct Pack {
  Matrix states;
  uint32_t* bits;    // [rows][words_of(units)]
  int32_t* is_real;  // [1], set to 1 where a value is neither 0 nor 1; null: all are known to be
  uint32_t* terms;   // null, or [units][terms_words] from term_word on (a multiple of 4): the bits
  int64_t terms_words, term_word;  // with rows along a word, zero up to a multiple of 128 rows
  unsigned long long* sums;        // [units] += how many rows are on; with `terms`
};
int pack(const Pack& a, cudaStream_t stream);

// out[i] = exp(-log_var[i])
int precisions(const float* log_var, int units, float* out, cudaStream_t stream);

// Real states for a half-sweep: planes of fixed point with a scale for each row.
struct ValuePlanes {
  Matrix states;
  const float* factor;  // [units], multiplies the states, or null
  Planes planes;        // rows: the states' rows; terms: the units
  float* scales;        // [rows]
  Guard guard;
};
int quantize_values(const ValuePlanes& a, int digits, cudaStream_t stream);

// The real states of both phases of a gradient, the data's first: their sums, and v in fixed point
// with rows along the terms.
struct PhaseValues {
  Matrix states[2];
  Guard guard;
  const float* center;    // [units], or null
  double* totals[2];      // [units]: sums over the rows
  double* spreads[2];     // [units]: sums of (v - center)^2, where there is a center
  double* partial;        // phase_partials doubles
  int32_t* columns_done;  // [2][units / 32, rounded up], zero before
  int32_t* is_real[2];    // [1], zero before: 1 where a value is neither 0 nor 1
  int32_t* largest[2];    // [1], zero before: the bits of the largest magnitude

  Planes planes;  // rows: the units; terms: the rows of data, then at the next multiple of
                  // 128 those of the chains
  float* scale;   // [1]: one scale for both phases, as docs/arithmetic.md says
};
int64_t phase_partials(int64_t data_rows, int64_t chain_rows, int units);
int phase_values(const PhaseValues& a, int digits, cudaStream_t stream);

// energies[row] = beta * E_visible(row) - sum of softplus.
struct RowEnergies {
  Matrix states;           // visible
  const float* bias;       // [visible]
  const float* precision;  // [visible] of Gaussian units, or null
  const double* softplus;  // [slices][rows]
  int64_t slices;
  float beta;
  const float* betas;
  const float* one;
  float* energies;
};
int row_energies(const RowEnergies& a, cudaStream_t stream);

// The mean free energies of both phases from their sums over the rows; the visible term comes from
// the spreads (Gaussian units), the totals (where *is_real) or the counts.
struct MeanEnergies {
  int64_t rows[2], slices;
  int n_visible;
  const float* bias;
  const float* precision;
  const int32_t* is_real;  // of the data; null: counts
  const unsigned long long* counts[2];
  const double* totals[2];
  const double* spreads[2];
  const double* softplus[2];  // [slices][rows]
  double* partial;            // [2][kEnergyBlocks]
  int32_t* blocks_done;       // [2], zero before
  const float* one;
  float* energies;  // [2]
};
constexpr int kEnergyBlocks = 64;
int mean_energies(const MeanEnergies& a, cudaStream_t stream);

// out[row, unit] = mask ? values : states, float32 and contiguous.
struct OverwriteClamped {
  Matrix states, values;  // values' row_stride is 0 for one row of them
  const uint8_t* mask;
  int64_t mask_stride;
  float* out;
};
int overwrite_clamped(const OverwriteClamped& a, cudaStream_t stream);

}  // namespace rbm::cuda
