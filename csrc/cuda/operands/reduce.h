// What the kernels of this folder share: the size of their blocks, and sums and maxima over
// threads.
#pragma once

#include "cuda/arch/device.h"

namespace rbm::cuda {

constexpr int kOperandThreads = 256, kOperandWarps = kOperandThreads / 32;  // of a block

RBM_DEVICE int32_t warp_max(int32_t x) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    const int32_t other = shuffle_xor(x, mask);
    x = x > other ? x : other;
  }
  return x;
}
RBM_DEVICE double warp_sum(double x) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}

// Whether this block is the last of `blocks` to come here. What the others wrote before is visible
// then, so it can add up their parts in an order that does not depend on who came when.
RBM_DEVICE bool last_of(int32_t blocks, int32_t* done, int32_t* shared_flag) {
  thread_fence();
  __syncthreads();
  if (threadIdx.x == 0) *shared_flag = atomic_add(done, 1) == blocks - 1;
  __syncthreads();
  thread_fence();
  return *shared_flag != 0;
}

inline unsigned blocks_of(int64_t n, int64_t each) {
  return static_cast<unsigned>((n + each - 1) / each);
}

}  // namespace rbm::cuda
