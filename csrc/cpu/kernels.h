// The functions that are compiled once for each instruction set, as a table of pointers: isa.cpp
// fills one table per instruction set, and dispatch.cpp chooses among them at run time.
#pragma once

#include <cstdint>

#include "include/rbm/philox.h"

namespace rbm::cpu {

constexpr int kTile = 16;                   // output units computed together
constexpr int kMaxGroup = 6;                // states looked up together
constexpr int64_t kSafeRows = 240;          // rows of 24-bit integers whose sums stay below 2^31
constexpr int64_t kSafeNarrowRows = 65000;  // of 16-bit integers

// A matrix [rows, cols] of which one stride is 1.
struct Matrix {
  const float* data;
  int64_t rows, cols;
  int64_t row_stride, col_stride;
};

// The left operand of a product, [rows, K]: in exactly one of three forms.
struct Operand {
  int64_t rows, K;
  // Binary: group g of a row is a table offset in bytes (64 times `group` packed states).
  const uint16_t* groups;
  int64_t n_groups;  // also the row stride
  int group;
  // Binary, for instruction sets with binary_as_bytes: one byte a state, zero up to a multiple
  // of 64; whole blocks of 32 rows can be read.
  const uint8_t* bytes;
  int64_t bytes_stride;
  int digits;  // bytes of the right operand's integers, 2 or 3
  // Real: integers held in float, [rows, K], and the scale of each row (null: 1).
  const float* fixed;
  const float* row_scale;
};

// One half-sweep: x = beta * (bias + scale * (operand @ W)), and whatever is asked of x.
struct HalfSweep {
  Operand given;
  Matrix weight;  // [K, N]
  float scale, inverse_scale;
  bool wide;          // 24-bit weights: sums may pass 2^31
  const float* bias;  // [N]
  const float* beta;  // [rows] or, with beta_stride 0, one
  int64_t beta_stride;
  const float* sigma;  // [N] for Gaussian units: x is their mean, beta enters their spread only
  HalfSweepKey key;
  uint32_t chain_offset;
  // Outputs, each may be null.
  uint8_t* bits;  // packed Bernoulli states
  int64_t bits_stride;
  float* states;   // [rows, N]
  uint8_t* bytes;  // [rows, N], 0 or 1
  float* means;    // [rows, N] sigmoid(x), or x for Gaussian units
  int32_t* fixed;  // [rows, fixed_stride] sigmoid(x) * fixed_one, rounded
  int64_t fixed_stride;
  float fixed_one;
  double* softplus;  // [tiles, rows] partial sums
  double* sums;      // [rows, N] the exact integer sums themselves (tests)
  // Clamped units: a packed mask, and their packed (Bernoulli) or float (Gaussian) values.
  const uint8_t* held;
  int64_t held_stride;
  const uint8_t* held_bits;
  int64_t held_bits_stride;
  const float* held_states;
  int64_t held_states_stride;
};

// One phase of the gradient: sum over its rows of (visible state) * (hidden probability), an exact
// integer, times an integer weight.
struct Phase {
  Operand visible;        // [V (+ 1 row of ones), rows of the batch]
  const int32_t* hidden;  // [rows of the batch, hidden_stride]
  int64_t hidden_stride;
  double weight;
};

struct Gradient {
  Phase phase[2];
  int64_t n_visible, n_hidden;
  float unit;  // value of one in the weighted integer sum
  float bias_unit;
  bool accumulate;
  float* weight;  // [n_visible, weight_stride]
  int64_t weight_stride;
  float* bias;  // [n_hidden], from the row of ones
};

struct Kernels {
  const char* name;
  bool binary_as_bytes;
  // Largest |value| of n floats as bits; 0x7f800000 or more tells of a value that is not finite.
  uint32_t (*largest)(const float* values, int64_t n);
  // Pack a row of n states; false when some value is neither 0 nor 1.
  bool (*pack_floats)(const float* row, int64_t n, uint8_t* bits);
  bool (*pack_bytes)(const uint8_t* row, int64_t n, uint8_t* bits);
  // Table offsets of the groups of one packed row (readable 8 bytes past its end).
  void (*group_offsets)(const uint8_t* bits, int64_t n_groups, int group, uint16_t* out);
  // One byte a state, up to n rounded up to 16.
  void (*expand_bits)(const uint8_t* bits, int64_t n, uint8_t* bytes);
  // Values as fixed point, held in float.
  void (*fix)(const float* values, int64_t n, float inverse_scale, float* out);
  void (*half_sweep)(const HalfSweep&, int64_t tile, int64_t row_begin, int64_t row_end);
  void (*gradient)(const Gradient&, int64_t tile, int64_t row_begin, int64_t row_end);
  // exp(-x) of n floats by the contract's polynomial.
  void (*exp_neg)(const float* x, int64_t n, float* out);
};

extern const Kernels kPlainKernels;
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
extern const Kernels kAmxKernels;
extern const Kernels kAmxEmulatedKernels;

// The table of that name, or null where it was not built or this processor cannot run it.
const Kernels* kernels_named(const char* name);
// The widest that this processor runs.
const Kernels* widest_kernels();

}  // namespace rbm::cpu
