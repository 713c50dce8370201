// What cuda/arch/device.h and hopper.h offer, for a CPU: the kernels are compiled as plain C++ and
// every thread of a block is a fiber. It is for finding mistakes, not for speed, so everything that
// a GPU may do late is done as late as possible: asynchronous copies, stores to other blocks and
// wgmma leave poison (0xCD) where their results will be, until they are waited for.
// RBM_EMULATED_SCHEDULE=<n> (read at each launch) runs fibers, blocks and bulk copies in a random
// order of that number; 0 is round robin.
//
// Blocks (or clusters of blocks) run one after another, so a kernel must not wait for another
// block. Fences (proxy_fence, barrier_fence_init) do nothing: a missing one is not found here.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)
#define RBM_DEVICE static inline

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
extern dim3 threadIdx, blockIdx, blockDim, gridDim;
void __syncthreads();

// The part of the CUDA runtime that the kernels' sources use: one device, an H100 in its limits.
#define RBM_VECTOR(type, element)                                        \
  struct alignas(8) type##2 { element x, y; };                           \
  struct alignas(16) type##4 { element x, y, z, w; };                    \
  inline type##2 make_##type##2(element x, element y) { return {x, y}; } \
  inline type##4 make_##type##4(element x, element y, element z, element w) { return {x, y, z, w}; }
RBM_VECTOR(float, float)
RBM_VECTOR(int, int)
RBM_VECTOR(uint, unsigned)
#undef RBM_VECTOR

using cudaStream_t = struct CUstream_st*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9,
                      cudaErrorNoDevice = 100;
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrMaxSharedMemoryPerBlockOptin
};
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : 101; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t status);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);

namespace rbm::cuda {

struct Launch {
  dim3 grid, block;
  unsigned shared_bytes = 0;
  unsigned cluster = 1;
  cudaStream_t stream = nullptr;
};

// Defined in emulated.cpp. Misuse throws within the fiber; launch() throws what a fiber threw.
namespace emulated {

int run(const Launch& launch, void (*kernel)(void*), void* arguments);
int lane();
uint64_t exchange(uint64_t value, int source_lane);
void multiply(int32_t* d, const uint32_t* a, const uint32_t* b, bool a_signed, bool b_signed);
void copy_async_wait(size_t groups_left);
void wgmma(int32_t* d, const uint32_t* a, uint64_t b, int columns, bool a_signed, bool b_signed);
void wgmma_wait(size_t groups_left);
template <class T> T replace(T* p, T value) {
  const T old = *p;
  *p = value;
  return old;
}

}  // namespace emulated

unsigned char* shared_memory();

template <class T> T shuffle(T value, int lane) {
  static_assert(std::is_trivially_copyable<T>::value && (sizeof(T) == 4 || sizeof(T) == 8));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = emulated::exchange(bits, lane & 31);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}
template <class T> T shuffle_xor(T value, int lane_mask) {
  return shuffle(value, emulated::lane() ^ lane_mask);
}
void warp_sync();
uint32_t ballot(bool predicate);
inline uint32_t popcount(uint32_t x) { return static_cast<uint32_t>(__builtin_popcount(x)); }
inline uint32_t byte_permute(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t byte = selector >> (4 * i) & 7;
    result |= static_cast<uint32_t>(bytes >> (8 * byte) & 0xFF) << (8 * i);
  }
  return result;
}

inline void mma_u8s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulated::multiply(d, a, b, false, true);
}
inline void mma_u8u8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulated::multiply(d, a, b, false, false);
}
inline void mma_s8s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulated::multiply(d, a, b, true, true);
}
inline void mma_s8u8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulated::multiply(d, a, b, true, false);
}
void load_matrices(uint32_t (&r)[4], const void* row);

void copy_async16(void* shared, const void* global, bool valid);
void copy_async_commit();
template <int n> void copy_async_wait() { emulated::copy_async_wait(n); }

// One fiber runs at a time, so plain operations are atomic.
inline int32_t atomic_max(int32_t* p, int32_t value) {
  return emulated::replace(p, *p > value ? *p : value);
}
inline int32_t atomic_or(int32_t* p, int32_t value) { return emulated::replace(p, *p | value); }
inline int32_t atomic_add(int32_t* p, int32_t value) {
  const uint32_t sum = static_cast<uint32_t>(*p) + static_cast<uint32_t>(value);
  return emulated::replace(p, static_cast<int32_t>(sum));
}
inline unsigned long long atomic_add(unsigned long long* p, unsigned long long value) {
  return emulated::replace(p, *p + value);
}

inline void thread_fence() {}
void named_barrier(int id, int threads);

uint32_t cluster_rank();
uint32_t cluster_size();
void cluster_sync();
uint32_t shared_address(const void* shared);
uint32_t remote_address(uint32_t address, uint32_t rank);
void store_remote(uint32_t remote, uint32_t value);
void store_async16(uint32_t remote, uint4 value, uint32_t remote_barrier);

void barrier_init(uint64_t* barrier, uint32_t arrivals);
inline void barrier_fence_init() {}
void barrier_arrive(uint64_t* barrier);
void barrier_arrive_expect(uint64_t* barrier, uint32_t bytes);
void barrier_arrive_remote(uint32_t remote_barrier);
void barrier_wait(uint64_t* barrier, uint32_t parity);
void bulk_copy(void* shared, const void* global, uint32_t bytes, uint64_t* barrier);

inline void proxy_fence() {}
void wgmma_fence();
void wgmma_commit();
template <int n> void wgmma_wait() { emulated::wgmma_wait(n); }
template <int n> void wgmma_results(int32_t (&)[n]) {}
uint64_t matrix_descriptor(const void* shared, uint32_t leading, uint32_t stride);
template <int N, bool b_signed, bool a_signed = false>
void wgmma_registers(int32_t (&d)[N / 2], const uint32_t (&a)[4], uint64_t b) {
  static_assert(N % 16 == 0 && N >= 16 && N <= 128 && (b_signed || !a_signed));
  emulated::wgmma(d, a, b, N, a_signed, b_signed);
}

template <int n> void registers_increase() { static_assert(n % 8 == 0 && n >= 24 && n <= 256); }
template <int n> void registers_decrease() { static_assert(n % 8 == 0 && n >= 24 && n <= 256); }

// Runs all blocks to their end. A cudaError_t for a launch that a GPU would refuse.
//
// Throws std::runtime_error where the kernel misuses an instruction or its threads wait forever.
template <class... P, class... A>
int launch(void (*kernel)(P...), const Launch& l, A&&... arguments) {
  const std::tuple<P...> parameters(static_cast<P>(arguments)...);
  auto call = [&] { std::apply(kernel, parameters); };
  return emulated::run(l, [](void* c) { (*static_cast<decltype(&call)>(c))(); }, &call);
}

template <class... P> int resident_clusters(void (*)(P...), const Launch&, int& clusters) {
  clusters = 2;  // few, so that persistent kernels walk over several groups of chains
  return cudaSuccess;
}

inline int fill_zero(void* pointer, size_t bytes, cudaStream_t) {
  if (bytes) std::memset(pointer, 0, bytes);
  return cudaSuccess;
}

}  // namespace rbm::cuda
