// What csrc/cuda/module.cpp calls. No CUDA header is needed to read this.
#pragma once

#include <cstdint>
#include <string>

namespace rbm::cuda {

struct SampleArguments {
  const float* x;       // [batch, units] row-major: the weighted sums of the other layer
  const float* bias;    // [units]
  float beta;           // inverse temperature
  const int64_t* seed;  // int64[2] on the device: seed, offset
  uint32_t chain_offset;
  uint32_t stream;
  uint64_t half_sweep;  // t: the draw is of half-sweep offset + t
  int64_t batch, units;
  float* states;         // [batch, units], written: 0 or 1
  float* probabilities;  // [batch, units] or null, written: sigmoid(beta * (x + bias))
};

// Puts the kernel on a stream of a device and returns a cudaError_t, 0 if it was launched.
int sample_bernoulli(const SampleArguments& arguments, int device, void* stream);

// How many devices there are; where none can be used, 0 and the driver's words.
int device_count(std::string& error);

const char* error_string(int status);

}  // namespace rbm::cuda
