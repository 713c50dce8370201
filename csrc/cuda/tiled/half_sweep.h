// One half-sweep: the weighted sums of a layer and what becomes of them, in one launch.
#pragma once

#include "cuda/arch/device.h"
#include "cuda/types.h"
#include "include/rbm/operand_layout.h"

namespace rbm::cuda {

// All pointers are the device's; results that are null are not computed.
struct HalfSweep {
  // The given layer, of which there are `rows` states of `given` units: bits, or fixed-point planes
  // (rows in their natural order, rows padded to 128) with the scale of each row.
  int64_t rows;
  int given, units;      // units of the given layer, and of the one that is computed
  const uint32_t* bits;  // [rows][words_of(given)]
  Planes values;
  const float* value_scales;  // [rows]
  Guard guard;

  Planes weights;             // rows: the computed units, as row_of_unit; padded to 128
  const float* weight_scale;  // [1]
  const float* bias;          // [units]
  float beta;
  const float* betas;  // [rows], or null: `beta` for all

  Draw draw;
  const int64_t* seed;  // int64[2]: seed, offset
  uint32_t chain_offset;
  uint64_t half_sweep;   // the draw is of half-sweep offset + half_sweep
  const float* log_var;  // [units], of Gaussian units

  // Clamped units: where mask[row * mask_stride + unit] is set (a stride of 0: one mask for all
  // rows), a unit takes its value from `held` in place of a draw. Values may be real, so `states`
  // is float32 then, and bits tell whether a value is not 0.
  const uint8_t* mask;
  int64_t mask_stride;
  const void* held;
  Element held_element;
  int64_t held_stride;

  uint32_t* drawn_bits;  // [rows][words_of(units)], whole words of 32 units are written
  uint32_t*
      drawn_terms;  // [units][terms_words]: the same bits, rows along a word, from term_word on
  int64_t terms_words, term_word;
  unsigned long long* drawn_sums;  // [units] += how many rows are on
  void* states;                    // [rows, units], contiguous
  Element states_element;
  float* means;  // [rows, units], contiguous: sigmoid(x), or the mean of a Gaussian unit

  // p = sigmoid(x) as unsigned digits of round(p * 2^15) or, three digits, 2^23: planes whose rows
  // are the units as row_of_unit and whose terms are the rows, from first_term (a multiple of 128)
  // on; zero up to the next multiple of 128 rows.
  Planes statistics;
  int64_t first_term;
  unsigned long long* statistics_sums;  // [units] += sum over the rows

  double* softplus;  // [slices_of(units)][rows]: partial sums over units of softplus(x)
};

// Units whose softplus is summed in one place.
inline int64_t slices_of(int64_t units) { return (units + 31) / 32; }

// digits: 2 or 3. real: the given layer is `values`, else `bits`. A cudaError_t.
int half_sweep(const HalfSweep& a, int digits, bool real, cudaStream_t stream);

// The same from bits with Hopper's instructions, for large products (half_sweep_sm90a.cu).
int half_sweep_sm90a(const HalfSweep& a, int digits, cudaStream_t stream);

}  // namespace rbm::cuda
