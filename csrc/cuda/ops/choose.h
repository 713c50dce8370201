// Chooses the kernels of a chain and of its products, by the device and the sizes.
#pragma once

#include "cuda/arch/device.h"

namespace rbm::cuda {

struct Device {
  int capability;    // 10 * major + minor
  int shared_bytes;  // that one block can have
};
// Tells a device's properties, which are asked for once. Returns a cudaError_t.
int device_of(int index, Device& out);

// Makes a device the current one until the object is destroyed.
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

// The kernels for chains of that many rows and sweeps or, with 0 sweeps, for a product alone. The
// environment variable RBM_KERNELS_CUDA_REGIME overrides the choice: a regime that cannot run here
// leaves it to `tiled`, and a name that is none throws std::invalid_argument.
Choice choose(const Device& device, int64_t rows, int n_visible, int n_hidden, int64_t sweeps,
              int digits, bool gaussian = false);
bool on_chip(const Choice& choice);  // whether all sweeps are one launch

}  // namespace rbm::cuda
