#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cuda/ops/choose.h"
#include "cuda/ops/operations.h"
#include "cuda/resident/chain.h"

namespace rbm::cuda {
namespace {

// From which sizes on each regime is taken. The numbers are estimates from counting instructions
// and bytes: none has been measured yet. benchmarks/bench_gpu.py times the regimes against each
// other (RBM_KERNELS_CUDA_REGIME names one); the sizes at which one overtakes another belong here.
//
// Weights that fit into one block's shared memory stay there whatever the number of sweeps, as
// small models spend most of their time on launches. Weights that fit into a cluster's stay there
// where at least two sweeps share the time to load them. The cluster is the widest that still runs
// all chains at once, as each block has less to do then; but a block should have some units of each
// layer.
//
// Gaussian chains need wider clusters, of which few run at a time, and whose warps overlap less.
// For more chains than those run at once, the tiled kernels are taken to be quicker.
constexpr int64_t kClusterSweeps = 2, kBlockUnits = 16;
// Hopper's kernels work on tiles of 256 x 128. With fewer tiles than these, or sums over fewer
// terms, the smaller tiles of the portable kernels keep more of the chip busy.
constexpr int64_t kHopperTiles = 66, kHopperTerms = 256;

constexpr std::array<const char*, 4> kNames = {"resident", "cluster", "tiled", "tiled_sm90a"};

// What RBM_KERNELS_CUDA_REGIME names, for tests and benchmarks; -1: nothing.
int forced() {
  const char* name = std::getenv("RBM_KERNELS_CUDA_REGIME");
  if (name == nullptr || *name == '\0') return -1;
  for (int i = 0; i < 4; ++i) {
    if (std::strcmp(name, kNames[static_cast<size_t>(i)]) == 0) return i;
  }
  throw std::invalid_argument(
      "RBM_KERNELS_CUDA_REGIME must be resident, cluster, tiled or tiled_sm90a, got '" +
      std::string(name) + "'");
}

constexpr int kDevices = 64;
struct QueriedDevice {
  int status;
  Device device;
};

QueriedDevice query(int index) {
  int major = 0, minor = 0, shared = 0;
  int status = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index);
  if (!status) status = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index);
  if (!status) {
    status = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
  }
  return {status, {10 * major + minor, shared}};
}

}  // namespace

int device_of(int index, Device& out) {
  static const std::array<QueriedDevice, kDevices> devices = [] {
    std::array<QueriedDevice, kDevices> all{};
    int count = 0;
    const int status = cudaGetDeviceCount(&count);
    for (int i = 0; i < kDevices; ++i) {
      all[static_cast<size_t>(i)] = i < count ? query(i) : QueriedDevice{status ? status : 101, {}};
    }
    return all;
  }();
  if (index < 0 || index >= kDevices) return 101;  // cudaErrorInvalidDevice
  const QueriedDevice& queried = devices[static_cast<size_t>(index)];
  out = queried.device;
  return queried.status;
}

CurrentDevice::CurrentDevice(int index) {
  status = cudaGetDevice(&previous_);
  if (status || previous_ == index) return;
  status = cudaSetDevice(index);
  moved_ = true;
}
CurrentDevice::~CurrentDevice() {
  if (moved_) cudaSetDevice(previous_);
}

bool on_chip(const Choice& choice) {
  return choice.chain == Regime::resident || choice.chain == Regime::cluster;
}

Choice choose(const Device& device, int64_t rows, int n_visible, int n_hidden, int64_t sweeps,
              int digits, bool gaussian) {
  const bool hopper = device.capability == 90;
  const int wanted = forced();
  const auto allowed = [&](Regime regime) {
    return wanted < 0 || wanted == static_cast<int>(regime);
  };
  const int64_t tiles = ((rows + 255) / 256) * ((n_hidden + 127) / 128);
  Choice choice{Regime::tiled, 0, false};
  choice.hopper = hopper && (wanted < 0 ? tiles >= kHopperTiles && n_visible >= kHopperTerms
                                        : wanted == static_cast<int>(Regime::tiled_sm90a));
  if (choice.hopper) choice.chain = Regime::tiled_sm90a;
  if (sweeps == 0) return choice;

  int cluster = 0;
  if (hopper && allowed(Regime::cluster) && (sweeps >= kClusterSweeps || wanted >= 0)) {
    const auto at_a_time = [&](int blocks) {
      return clusters_at_once(digits, blocks, device.shared_bytes, gaussian);
    };
    cluster = smallest_cluster(n_visible, n_hidden, digits, device.shared_bytes, gaussian);
    const int64_t at_once = cluster > 0 ? int64_t{64} * at_a_time(cluster) : 0;
    if (at_once == 0 || (gaussian && wanted < 0 && rows > at_once)) cluster = 0;
    while (cluster > 0 && cluster < 16 && rows <= int64_t{64} * at_a_time(2 * cluster) &&
           std::min(n_visible, n_hidden) >= kBlockUnits * 2 * cluster) {
      cluster *= 2;
    }
  }
  if (allowed(Regime::resident) &&
      chain_fits(n_visible, n_hidden, digits, device.shared_bytes, gaussian)) {
    choice.chain = Regime::resident;
  } else if (cluster > 0) {
    choice.chain = Regime::cluster;
    choice.cluster = cluster;
  }
  return choice;
}

std::string regime(int64_t rows, int n_visible, int n_hidden, int64_t sweeps, int digits,
                   bool gaussian, int device) {
  Device found{};
  if (device_of(device, found)) return "no such device";
  const CurrentDevice current(device);  // whose clusters choose() asks for
  const Choice choice = choose(found, rows, n_visible, n_hidden, sweeps, digits, gaussian);
  std::string words = kNames[static_cast<size_t>(choice.chain)];
  if (choice.cluster > 0) words += " of " + std::to_string(choice.cluster);
  return words;
}

int clusters_on_device(int device, int blocks, int digits, bool gaussian) {
  Device found{};
  if (device_of(device, found) || found.capability != 90) return 0;
  const CurrentDevice current(device);
  return clusters_at_once(digits, blocks, found.shared_bytes, gaussian);
}

int device_count(std::string& error) {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status == cudaSuccess) {
    if (count == 0) error = cudaGetErrorString(cudaErrorNoDevice);
    return count;
  }
  cudaGetLastError();  // so that the next launch does not report this one
  error = cudaGetErrorString(status);
  return 0;
}

const char* error_string(int status) {
  return cudaGetErrorString(static_cast<cudaError_t>(status));
}

}  // namespace rbm::cuda
