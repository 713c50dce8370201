// What every part of the cuda backend speaks of: the caller's arrays and what is drawn from them.
// No CUDA header is needed here.
#pragma once

#include <cstdint>

#include "include/rbm/platform.h"

namespace rbm::cuda {

// What an array of the caller's holds. Bytes are uint8 (any value) or bool.
enum class Element : int { float32, float16, bfloat16, byte };

struct Matrix {
  const void* data;
  Element element;
  int64_t rows, cols, row_stride, col_stride;
  bool binary;  // known to hold nothing but 0 and 1
};

struct Temperature {
  float beta;
  const float* betas;  // [rows], or null: `beta` for all
};

enum class Draw : int { none, bernoulli, gaussian };

// Which of two kernels runs, where only the device knows whether states are real: both are
// launched, and the one that is not wanted returns at once.
struct Guard {
  const int32_t* state = nullptr;  // [1]; null: the kernel runs always
  int32_t wanted = 0;              // the kernel runs where *state == wanted
};
RBM_HD bool guarded_out(const Guard& guard) {
  return guard.state != nullptr && *guard.state != guard.wanted;
}

}  // namespace rbm::cuda
