// The instructions that the kernels use, one function each, and how kernels are launched.
//
// emulator/emulated.h has the same functions for a CPU: there the threads of a block are fibers, so
// that the tests run whole kernels on machines without a GPU.
#pragma once

#include <cstddef>
#include <cstdint>

#include "include/rbm/platform.h"

#ifdef RBM_EMULATED
#include "emulator/emulated.h"
#else

#include <cuda_runtime.h>

#include <utility>

namespace rbm::cuda {

#define RBM_DEVICE static __device__ __forceinline__

RBM_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(1024) unsigned char memory[];
  return memory;
}

template <class T> RBM_DEVICE T shuffle_xor(T value, int lane_mask) {
  return __shfl_xor_sync(0xFFFFFFFFu, value, lane_mask);
}
template <class T> RBM_DEVICE T shuffle(T value, int lane) {
  return __shfl_sync(0xFFFFFFFFu, value, lane);
}
RBM_DEVICE void warp_sync() { __syncwarp(); }
RBM_DEVICE uint32_t ballot(bool predicate) { return __ballot_sync(0xFFFFFFFFu, predicate); }

RBM_DEVICE uint32_t popcount(uint32_t x) { return static_cast<uint32_t>(__popc(x)); }
// Byte i of the result is the byte of `low` (0 to 3) or `high` (4 to 7) that nibble i names.
RBM_DEVICE uint32_t byte_permute(uint32_t low, uint32_t high, uint32_t selector) {
  return __byte_perm(low, high, selector);
}

RBM_DEVICE int32_t atomic_max(int32_t* p, int32_t value) { return atomicMax(p, value); }
RBM_DEVICE int32_t atomic_or(int32_t* p, int32_t value) { return atomicOr(p, value); }
RBM_DEVICE int32_t atomic_add(int32_t* p, int32_t value) { return atomicAdd(p, value); }
RBM_DEVICE unsigned long long atomic_add(unsigned long long* p, unsigned long long value) {
  return atomicAdd(p, value);
}

// What this thread wrote is seen by others before what it writes next.
RBM_DEVICE void thread_fence() { __threadfence(); }

RBM_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// d += a b, a [16 x 32] and b [32 x 8] bytes of the types in the name (a first).
#define RBM_MMA(name, types)                                                              \
  RBM_DEVICE void name(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { \
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32." types                           \
                 ".s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"   \
                 : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])                         \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));     \
  }
RBM_MMA(mma_u8s8, "u8.s8")
RBM_MMA(mma_u8u8, "u8.u8")
RBM_MMA(mma_s8s8, "s8.s8")
RBM_MMA(mma_s8u8, "s8.u8")
#undef RBM_MMA

// Four 8 x 16-byte matrices; lane l names row l % 8 of matrix l / 8.
RBM_DEVICE void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row)));
}

RBM_DEVICE void copy_async16(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(global), "r"(valid ? 16 : 0));
}
RBM_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;"); }
template <int n> RBM_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(n) : "memory");
}

// A barrier of some warps of a block; id 1 to 15, as 0 is __syncthreads'.
RBM_DEVICE void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

struct Launch {
  dim3 grid, block;
  unsigned shared_bytes = 0;
  unsigned cluster = 1;  // blocks along x that run together and see each other's shared memory
  cudaStream_t stream = nullptr;
};

// Lets a kernel's blocks have all the shared memory that the device gives, not just what one launch
// takes: another thread may be about to launch the same kernel with more.
inline cudaError_t allow_shared_memory(const void* function) {
  int device = 0, most = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) {
    status = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  if (status != cudaSuccess) return status;
  return cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
}

// What the runtime wants to know for a launch; `attribute` must outlive `config`.
inline cudaError_t configure(const void* function, const Launch& l, cudaLaunchConfig_t& config,
                             cudaLaunchAttribute& attribute) {
  cudaError_t status = cudaSuccess;
  if (l.shared_bytes > 48 * 1024) status = allow_shared_memory(function);
  if (status == cudaSuccess && l.cluster > 8) {
    status = cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  }
  config.gridDim = l.grid;
  config.blockDim = l.block;
  config.dynamicSmemBytes = l.shared_bytes;
  config.stream = l.stream;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = l.cluster;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  if (l.cluster > 1) {  // devices before Hopper know no clusters
    config.attrs = &attribute;
    config.numAttrs = 1;
  }
  return status;
}

// Puts a kernel on a stream; a cudaError_t, 0 where it was launched.
template <class... P, class... A>
int launch(void (*kernel)(P...), const Launch& l, A&&... arguments) {
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute attribute{};
  cudaError_t status = configure(reinterpret_cast<const void*>(kernel), l, config, attribute);
  if (status == cudaSuccess) {
    status = cudaLaunchKernelEx(&config, kernel, static_cast<P>(arguments)...);
  }
  if (status != cudaSuccess) cudaGetLastError();  // ours alone: others need not find it there
  return status;
}

inline int fill_zero(void* pointer, size_t bytes, cudaStream_t stream) {
  return cudaMemsetAsync(pointer, 0, bytes, stream);
}

}  // namespace rbm::cuda
#endif
