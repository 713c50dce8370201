// Bernoulli units from their weighted sums: bias, inverse temperature, Philox and comparison fused.
#include <cuda_runtime.h>

#include <algorithm>

#include "rbm/math.h"
#include "rbm/philox.h"
#include "sample.h"

namespace rbm::cuda {
namespace {

constexpr int kWidth = 32;  // threads along the units: a warp reads 512 consecutive bytes
constexpr int kHeight = 4;  // chains per block
constexpr int kQuad = 4;    // units per thread: the words of one Philox call

// kVector: units is a multiple of 4 and all rows start at multiples of 16 bytes.
template <bool kVector, bool kProbabilities> __global__ void __launch_bounds__(kWidth* kHeight)
    sample_kernel(SampleArguments a) {
  const int64_t quads = (a.units + kQuad - 1) / kQuad;
  const int64_t quad = static_cast<int64_t>(blockIdx.x) * kWidth + threadIdx.x;
  if (quad >= quads) return;
  const int64_t unit = quad * kQuad;
  const int count = static_cast<int>(a.units - unit < kQuad ? a.units - unit : kQuad);

  // The offset is read here and not on the host, so that a captured graph draws anew at each
  // replay.
  const uint64_t step = static_cast<uint64_t>(a.seed[1]) + a.half_sweep;
  const HalfSweepKey key = half_sweep_key(static_cast<uint64_t>(a.seed[0]), step, a.stream);

  float bias[kQuad];
  for (int i = 0; i < kQuad; ++i) bias[i] = i < count ? a.bias[unit + i] : 0.0f;

  const int64_t rows = static_cast<int64_t>(gridDim.y) * kHeight;
  for (int64_t row = static_cast<int64_t>(blockIdx.y) * kHeight + threadIdx.y; row < a.batch;
       row += rows) {
    uint32_t words[4] = {static_cast<uint32_t>(quad), a.chain_offset + static_cast<uint32_t>(row),
                         key.step, key.stream};
    philox4x32(words, key.key0, key.key1);

    const int64_t first = row * a.units + unit;
    float x[kQuad], state[kQuad], probability[kQuad];
    if constexpr (kVector) {
      const float4 loaded = *reinterpret_cast<const float4*>(a.x + first);
      x[0] = loaded.x, x[1] = loaded.y, x[2] = loaded.z, x[3] = loaded.w;
    } else {
      for (int i = 0; i < kQuad; ++i) x[i] = i < count ? a.x[first + i] : 0.0f;
    }
    for (int i = 0; i < kQuad; ++i) {
      const float e = exp_neg(mul(a.beta, add(x[i], bias[i])));
      const float u = uniform<float>(static_cast<int32_t>(words[i]));
      state[i] = threshold(u, e) < 1.0f ? 1.0f : 0.0f;
      if constexpr (kProbabilities) probability[i] = sigmoid_of_exp(e);
    }
    if constexpr (kVector) {
      *reinterpret_cast<float4*>(a.states + first) =
          make_float4(state[0], state[1], state[2], state[3]);
      if constexpr (kProbabilities) {
        *reinterpret_cast<float4*>(a.probabilities + first) =
            make_float4(probability[0], probability[1], probability[2], probability[3]);
      }
    } else {
      for (int i = 0; i < count; ++i) {
        a.states[first + i] = state[i];
        if constexpr (kProbabilities) a.probabilities[first + i] = probability[i];
      }
    }
  }
}

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

}  // namespace

int sample_bernoulli(const SampleArguments& a, int device, void* stream) {
  if (a.batch == 0 || a.units == 0) return cudaSuccess;
  int previous = 0;
  cudaError_t status = cudaGetDevice(&previous);
  if (status == cudaSuccess && previous != device) status = cudaSetDevice(device);
  if (status != cudaSuccess) return status;

  const int64_t quads = (a.units + kQuad - 1) / kQuad;
  // A thread walks over several chains where the batch is large: bias and key are read once.
  const int64_t blocks_y = std::min<int64_t>((a.batch + kHeight - 1) / kHeight, 1024);
  const dim3 grid(static_cast<unsigned>((quads + kWidth - 1) / kWidth),
                  static_cast<unsigned>(blocks_y));
  const dim3 block(kWidth, kHeight);
  const bool vector =
      a.units % kQuad == 0 && aligned(a.x) && aligned(a.states) && aligned(a.probabilities);
  const auto kernel =
      vector ? (a.probabilities ? sample_kernel<true, true> : sample_kernel<true, false>)
             : (a.probabilities ? sample_kernel<false, true> : sample_kernel<false, false>);
  kernel<<<grid, block, 0, static_cast<cudaStream_t>(stream)>>>(a);
  status = cudaGetLastError();
  if (previous != device) cudaSetDevice(previous);
  return status;
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
