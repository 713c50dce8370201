// Which kernels run a chain and its products.
#pragma once

#include "cuda/arch/device.h"

namespace rbm::cuda {

struct Device {
  int capability;    // 10 * major + minor
  int shared_bytes;  // that one block can have
};
// A cudaError_t; what it learns is remembered.
int device_of(int index, Device& out);

// Makes a device current for as long as it lives.
class CurrentDevice {
 public:
  explicit CurrentDevice(int index);
  ~CurrentDevice();
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;
  int status;

 private:
  int previous_ = 0;
  bool moved_ = false;
};

enum class Regime {
  resident,     // a whole chain in one launch, the weights in each block's shared memory
  cluster,      // the same, the weights spread over a cluster of blocks (Hopper)
  tiled,        // a launch for each half-sweep, on any GPU
  tiled_sm90a,  // the same with Hopper's instructions
};

struct Choice {
  Regime chain;
  int cluster;  // blocks of a cluster
  bool hopper;  // whether single half-sweeps and gradients from bits use Hopper's instructions
};

// Throws std::invalid_argument where RBM_KERNELS_CUDA_REGIME names no regime. One that is named and
// cannot run here leaves the choice to `tiled`.
//
// For chains of that many rows and sweeps, of Gaussian visible units or Bernoulli ones; 0 sweeps:
// for a product only.
Choice choose(const Device& device, int64_t rows, int n_visible, int n_hidden, int64_t sweeps,
              int digits, bool gaussian = false);
bool on_chip(const Choice& choice);  // whether all sweeps are one launch

}  // namespace rbm::cuda
