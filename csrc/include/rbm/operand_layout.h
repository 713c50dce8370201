// How the operands of the matrix kernels lie in memory, and which thread holds which sum.
//
// Every product of this package is C[row, unit] = sum_k A[row, k] * B[unit, k], A the states of a
// layer (or, in a gradient, the visible units over the chains), B the weights' digits (or the
// probabilities'). Two formats serve all of them:
//
//   bits    A's binary form: [rows][words], bit k % 32 of word k / 32.
//   planes  one byte a digit: [digits][k / 16][rows][16], zero where padded. The sixteen bytes of a
//           row beside those of its seven neighbors are the 8 x 16 matrices that ldmatrix and
//           wgmma read without bank conflicts, and a tile of rows is one contiguous copy.
//
// Along the summed dimension the order of the terms is free, and so is the order of B's rows as
// long as the epilogue knows it. Both are chosen so that threads hold what belongs together:
//
//   within 32 terms, byte 4 r + s of a plane is term 8 s + r. A thread's word of A is then
//   (bits >> r) & 0x01010101: two instructions to unpack four states; and the four rows of a warp's
//   tile that a thread holds are one word of a transposed plane.
//   within 16 rows, unit 4 q + 2 s + e lies in row 8 s + 2 q + e, so that a thread's sums are those
//   of four neighboring units: one call of Philox, one 16-byte store.
#pragma once

#include "include/rbm/platform.h"

namespace rbm {

constexpr int kStep = 32;    // terms of a matrix instruction
constexpr int kChunk = 16;   // bytes of a row that lie together in a plane
constexpr int kBlock = 128;  // rows and terms of planes, and terms of bits, are padded to this

RBM_HD int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// Place of a term among the 32 bytes of its step, and back.
RBM_HD int byte_of_term(int term) { return 4 * (term & 7) + (term >> 3); }
RBM_HD int term_of_byte(int byte) { return 8 * (byte & 3) + (byte >> 2); }

// Place of a unit among the rows of a weight's planes, and back.
RBM_HD int64_t row_of_unit(int64_t unit) {
  return (unit & ~int64_t{15}) | (unit & 1) | ((unit & 2) << 2) | ((unit & 12) >> 1);
}
RBM_HD int64_t unit_of_row(int64_t row) {
  return (row & ~int64_t{15}) | (row & 1) | ((row & 8) >> 2) | ((row & 6) << 1);
}

// Words of bits in a row of n states: whole blocks, so that a row is read 16 bytes at a time.
RBM_HD int64_t words_of(int64_t n) { return round_up(n, kBlock) / 32; }

// The shape of planes: `rows` and `terms` include the padding.
struct Planes {
  uint8_t* data;
  int64_t rows, terms;
};

RBM_HD int64_t plane_bytes(const Planes& p) { return p.rows * p.terms; }

// Where the chunk of sixteen terms `chunk` of a row starts.
RBM_HD int64_t chunk_offset(const Planes& p, int digit, int64_t chunk, int64_t row) {
  return ((digit * (p.terms / kChunk) + chunk) * p.rows + row) * kChunk;
}

RBM_HD int64_t byte_offset(const Planes& p, int digit, int64_t term, int64_t row) {
  const int byte = byte_of_term(static_cast<int>(term % kStep));
  return chunk_offset(p, digit, term / kStep * 2 + byte / kChunk, row) + byte % kChunk;
}

}  // namespace rbm
