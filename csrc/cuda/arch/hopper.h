// The instructions that Hopper adds (sm_90a): clusters, mbarriers, bulk copies and wgmma.
#pragma once

#include "cuda/arch/device.h"

#ifndef RBM_EMULATED

namespace rbm::cuda {

// Clusters: blocks that run together and write into each other's shared memory.
RBM_DEVICE uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
RBM_DEVICE uint32_t cluster_size() {
  uint32_t size;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}
RBM_DEVICE void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::
                   : "memory");
}
// The address that `address` of this block has in the block of that rank.
RBM_DEVICE uint32_t remote_address(uint32_t address, uint32_t rank) {
  uint32_t remote;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
  return remote;
}
RBM_DEVICE void store_remote(uint32_t remote, uint32_t value) {
  asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(remote), "r"(value) : "memory");
}

// How many clusters of such a launch the device can run at a time; a cudaError_t.
template <class... P> int resident_clusters(void (*kernel)(P...), const Launch& l, int& clusters) {
  const void* function = reinterpret_cast<const void*>(kernel);
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute attribute{};
  cudaError_t status = configure(function, l, config, attribute);
  config.attrs = &attribute;  // a launch may leave out that a cluster is one block, a query may not
  config.numAttrs = 1;
  if (status == cudaSuccess) status = cudaOccupancyMaxActiveClusters(&clusters, function, &config);
  if (status != cudaSuccess) cudaGetLastError();  // as in launch()
  return status;
}

// mbarriers: a phase ends when all arrivals and all announced bytes have come.
RBM_DEVICE void barrier_init(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}
RBM_DEVICE void barrier_fence_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
RBM_DEVICE void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}
RBM_DEVICE void barrier_arrive_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}
// Says that this thread has read what the other block may now overwrite. No fence comes with it (a
// release to the cluster would wait for all of the warp's stores): data goes by store_async16.
RBM_DEVICE void barrier_arrive_remote(uint32_t remote_barrier) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(remote_barrier) : "memory");
}
// Acquires for the block, though other blocks complete phases too: what they send is in this
// block's shared memory, and to acquire for the cluster would also empty the L1 cache.
RBM_DEVICE void barrier_wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}
// Sixteen bytes into another block's shared memory, whose barrier there counts them as they arrive.
RBM_DEVICE void store_async16(uint32_t remote, uint4 value, uint32_t remote_barrier) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, "
      "[%5];" ::"r"(remote),
      "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w), "r"(remote_barrier)
      : "memory");
}
// From global to shared memory by the copy engine; multiples of 16 bytes.
RBM_DEVICE void bulk_copy(void* shared, const void* global, uint32_t bytes, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(shared)),
      "l"(global), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}

// What ordinary stores wrote to shared memory becomes visible to wgmma and the copy engine.
RBM_DEVICE void proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

RBM_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
RBM_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int n> RBM_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(n) : "memory");
}
// Between a wait and what reads d, as the compiler does not know that wgmma writes d so late.
template <int n> RBM_DEVICE void wgmma_results(int32_t (&d)[n]) {
#pragma unroll
  for (int i = 0; i < n; ++i) asm volatile("" : "+r"(d[i])::"memory");
}

// K-major bytes without a swizzle, as planes have them: matrices of 8 rows x 16 bytes. `leading` is
// the distance between two of them along the sum, `stride` along the rows.
RBM_DEVICE uint64_t matrix_descriptor(const void* shared, uint32_t leading, uint32_t stride) {
  const uint64_t address = shared_address(shared) & 0x3FFFF;
  return (address >> 4) | (static_cast<uint64_t>(leading >> 4) << 16) |
         (static_cast<uint64_t>(stride >> 4) << 32);
}

template <int n> RBM_DEVICE void registers_increase() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(n));
}
template <int n> RBM_DEVICE void registers_decrease() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(n));
}

// Names of registers in the instruction's text, eight at a time.
#define RBM_R0 "%0, %1, %2, %3, %4, %5, %6, %7"
#define RBM_R8 RBM_R0 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define RBM_R16 RBM_R8 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define RBM_R24 RBM_R16 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define RBM_R32 RBM_R24 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define RBM_R40 RBM_R32 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define RBM_R48 RBM_R40 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define RBM_R56 RBM_R48 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define RBM_D0 RBM_OPERANDS(0)
#define RBM_D8 RBM_D0, RBM_OPERANDS(8)
#define RBM_D16 RBM_D8, RBM_OPERANDS(16)
#define RBM_D24 RBM_D16, RBM_OPERANDS(24)
#define RBM_D32 RBM_D24, RBM_OPERANDS(32)
#define RBM_D40 RBM_D32, RBM_OPERANDS(40)
#define RBM_D48 RBM_D40, RBM_OPERANDS(48)
#define RBM_D56 RBM_D48, RBM_OPERANDS(56)
#define RBM_OPERANDS(i)                                                                       \
  "+r"(d[i]), "+r"(d[i + 1]), "+r"(d[i + 2]), "+r"(d[i + 3]), "+r"(d[i + 4]), "+r"(d[i + 5]), \
      "+r"(d[i + 6]), "+r"(d[i + 7])
#define RBM_WGMMA_TYPED(n, types, last, a0, a1, a2, a3, descriptor)            \
  asm volatile(                                                                \
      "{\n.reg .pred add;\nsetp.eq.u32 add, 0, 0;\n"                           \
      "wgmma.mma_async.sync.aligned.m64n" #n "k32.s32." types " {" RBM_R##last \
      "}, {%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #descriptor ", add;\n}" \
      : RBM_D##last                                                            \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
#define RBM_WGMMA(n, last, a0, a1, a2, a3, descriptor)             \
  if constexpr (N == n && a_signed) {                              \
    RBM_WGMMA_TYPED(n, "s8.s8", last, a0, a1, a2, a3, descriptor); \
  } else if constexpr (N == n && b_signed) {                       \
    RBM_WGMMA_TYPED(n, "u8.s8", last, a0, a1, a2, a3, descriptor); \
  } else if constexpr (N == n) {                                   \
    RBM_WGMMA_TYPED(n, "u8.u8", last, a0, a1, a2, a3, descriptor); \
  }

// d [64 x N] += a [64 x 32] b [N x 32]', a the bytes of a thread's rows, b in shared memory; a may
// be signed where b is. d[i] of thread t: row 16 * (t / 32) + t % 32 / 4 + 8 * (i / 2 % 2),
// column 8 * (i / 4) + 2 * (t % 4) + i % 2.
template <int N, bool b_signed, bool a_signed = false>
RBM_DEVICE void wgmma_registers(int32_t (&d)[N / 2], const uint32_t (&a)[4], uint64_t b) {
  static_assert(N % 16 == 0 && N >= 16 && N <= 128 && (b_signed || !a_signed));
  RBM_WGMMA(16, 0, 8, 9, 10, 11, 12)
  RBM_WGMMA(32, 8, 16, 17, 18, 19, 20)
  RBM_WGMMA(48, 16, 24, 25, 26, 27, 28)
  RBM_WGMMA(64, 24, 32, 33, 34, 35, 36)
  RBM_WGMMA(80, 32, 40, 41, 42, 43, 44)
  RBM_WGMMA(96, 40, 48, 49, 50, 51, 52)
  RBM_WGMMA(112, 48, 56, 57, 58, 59, 60)
  RBM_WGMMA(128, 56, 64, 65, 66, 67, 68)
}

}  // namespace rbm::cuda
#endif
