// Tests of the emulated GPU: small kernels against plain loops, and misuse that it must report.
// Built and run by test_native.py. Ends with status 1 where a check failed.
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/arch/device.h"
#include "cuda/arch/hopper.h"

using namespace rbm::cuda;

namespace {

int failures = 0;

void expect(bool passed, const std::string& what) {
  if (passed) return;
  ++failures;
  std::printf("FAILED: %s\n", what.c_str());
}

// That the launch throws, with these words.
void expect_error(const std::string& words, const std::function<int()>& launches) {
  std::string said = "nothing";
  try {
    launches();
  } catch (const std::exception& error) {
    said = error.what();
  }
  expect(said.find(words) != std::string::npos, "an error with \"" + words + "\"; it said " + said);
}

constexpr int32_t kPoison = static_cast<int32_t>(0xCDCDCDCDu);

std::mt19937 generator(1);
std::vector<unsigned char> random_bytes(size_t count) {
  std::vector<unsigned char> bytes(count);
  for (auto& byte : bytes) byte = static_cast<unsigned char>(generator());
  return bytes;
}
int32_t value(unsigned char byte, bool is_signed) {
  return is_signed ? static_cast<int8_t>(byte) : byte;
}
// start + a b' with a [m, k], b [n, k].
std::vector<int32_t> product(const std::vector<unsigned char>& a, bool a_signed,
                             const std::vector<unsigned char>& b, bool b_signed, int m, int n,
                             int k, int32_t start) {
  std::vector<int32_t> d(m * n, start);
  for (int i = 0; i < m; ++i) {
    for (int j = 0; j < n; ++j) {
      for (int l = 0; l < k; ++l) {
        d[i * n + j] += value(a[i * k + l], a_signed) * value(b[j * k + l], b_signed);
      }
    }
  }
  return d;
}

__global__ void warp_kernel(int32_t* out) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int32_t sum = static_cast<int32_t>(threadIdx.x);
  for (int mask = 16; mask; mask /= 2) sum += shuffle_xor(sum, mask);
  const int64_t wide = shuffle(int64_t{lane} << 40, (lane + 1) % 32);
  const float rotated = shuffle(static_cast<float>(lane), (lane + 31) % 32);
  const uint32_t thirds = ballot(lane % 3 == 0);
  int32_t* own = out + threadIdx.x * 4;
  own[0] = sum;
  own[1] = static_cast<int32_t>(wide >> 40);
  own[2] = static_cast<int32_t>(rotated);
  own[3] = static_cast<int32_t>(thirds);
  atomic_add(out + 512 + warp, 1);
  atomic_max(out + 516, sum);
  atomic_or(out + 517, 1 << warp);
}

void test_warps() {
  std::vector<int32_t> out(518);
  expect(launch(warp_kernel, {1, 128}, out.data()) == 0, "warp_kernel is launched");
  for (int t = 0; t < 128; ++t) {
    const int32_t* own = &out[t * 4];
    expect(own[0] == 32 * (t / 32 * 32) + 496, "shuffle_xor sums a warp");
    expect(own[1] == (t % 32 + 1) % 32, "shuffle of 8 bytes");
    expect(own[2] == (t % 32 + 31) % 32, "shuffle of floats");
    expect(own[3] == 0x49249249, "ballot");
  }
  for (int w = 0; w < 4; ++w) expect(out[512 + w] == 32, "atomic_add counts");
  expect(out[516] == 32 * 96 + 496 && out[517] == 15, "atomic_max and atomic_or");
}

// One 16 x 8 tile, depth 64, operands through shared memory and load_matrices. a [16, 64],
// b [8, 64], d [16, 8].
template <bool a_signed, bool b_signed>
__global__ void mma_kernel(const unsigned char* a, const unsigned char* b, int32_t* d) {
  const int lane = threadIdx.x;
  unsigned char* tile = shared_memory();  // [16 + 8, 64]
  for (int i = lane; i < 24 * 64; i += 32) tile[i] = i < 16 * 64 ? a[i] : b[i - 16 * 64];
  warp_sync();
  int32_t sums[4] = {7, 7, 7, 7};
  for (int k = 0; k < 64; k += 32) {
    uint32_t rows[4], columns[4];
    load_matrices(rows, tile + (lane % 16) * 64 + k + lane / 16 * 16);
    load_matrices(columns, tile + (16 + lane % 8) * 64 + k + lane / 8 % 2 * 16);
    const uint32_t b_registers[2] = {columns[0], columns[1]};
    if (a_signed && b_signed) mma_s8s8(sums, rows, b_registers);
    if (a_signed && !b_signed) mma_s8u8(sums, rows, b_registers);
    if (!a_signed && b_signed) mma_u8s8(sums, rows, b_registers);
    if (!a_signed && !b_signed) mma_u8u8(sums, rows, b_registers);
  }
  for (int i = 0; i < 4; ++i) d[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sums[i];
}

template <bool a_signed, bool b_signed> void test_mma() {
  const auto a = random_bytes(16 * 64), b = random_bytes(8 * 64);
  std::vector<int32_t> d(16 * 8);
  launch(mma_kernel<a_signed, b_signed>, {1, 32, 24 * 64}, a.data(), b.data(), d.data());
  expect(d == product(a, a_signed, b, b_signed, 16, 8, 64, 7),
         std::string("mma ") + (a_signed ? "s8 " : "u8 ") + (b_signed ? "s8" : "u8"));
}

// Sums `steps` chunks of 16 bytes a thread through three buffers. Without the wait it reads poison.
template <bool waits>
__global__ void pipeline_kernel(const int32_t* in, int steps, int valid, int32_t* out) {
  const int thread = threadIdx.x, threads = blockDim.x;
  auto* buffers = reinterpret_cast<int32_t*>(shared_memory());  // [3, threads, 4]
  const auto issue = [&](int step) {
    if (step < steps) {
      copy_async16(buffers + (step % 3 * threads + thread) * 4, in + (step * threads + thread) * 4,
                   step < valid);
    }
    copy_async_commit();
  };
  issue(0), issue(1);
  int32_t sum = 0;
  for (int step = 0; step < steps; ++step) {
    issue(step + 2);
    if (waits) copy_async_wait<2>();
    __syncthreads();
    // A neighbor's chunk, so that the barriers matter.
    const int32_t* chunk = buffers + (step % 3 * threads + (thread + 1) % threads) * 4;
    for (int i = 0; i < 4; ++i) sum = static_cast<int32_t>(sum * 31u + chunk[i]);
    __syncthreads();
  }
  out[thread] = sum;
}

void test_asynchronous_copies() {
  constexpr int kThreads = 96, kSteps = 7, kValid = 6;
  std::vector<int32_t> in(kThreads * kSteps * 4 + 4), out(kThreads), wanted(kThreads, 0);
  auto* aligned =
      reinterpret_cast<int32_t*>((reinterpret_cast<uintptr_t>(in.data()) + 15) & ~15ull);
  for (auto& x : in) x = static_cast<int32_t>(generator());
  for (int t = 0; t < kThreads; ++t) {
    for (int i = 0; i < kSteps * 4; ++i) {
      const int step = i / 4, source = (step * kThreads + (t + 1) % kThreads) * 4 + i % 4;
      wanted[t] = static_cast<int32_t>(wanted[t] * 31u + (step < kValid ? aligned[source] : 0));
    }
  }
  const Launch l{2, kThreads, 3 * kThreads * 16};
  launch(pipeline_kernel<true>, l, aligned, kSteps, kValid, out.data());
  expect(out == wanted, "a pipeline of copy_async16");
  launch(pipeline_kernel<false>, l, aligned, kSteps, kValid, out.data());
  int32_t poisoned = 0;
  for (int i = 0; i < kSteps * 4; ++i) poisoned = static_cast<int32_t>(poisoned * 31u + kPoison);
  expect(out == std::vector<int32_t>(kThreads, poisoned), "copy_async16 that nobody waits for");
  expect_error("no multiple of 16", [&] {
    return launch(pipeline_kernel<true>, l, aligned + 1, kSteps, kValid, out.data());
  });
  expect_error("not in the block's shared memory", [&] {
    const Launch less{1, kThreads, 2 * kThreads * 16};
    return launch(pipeline_kernel<true>, less, aligned, kSteps, kValid, out.data());
  });
}

// Warps 0 and 1 exchange through a named barrier while warps 2 and 3 do through another.
__global__ void named_barrier_kernel(int32_t* out) {
  auto* shared = reinterpret_cast<int32_t*>(shared_memory());
  const int thread = threadIdx.x, pair = thread / 64;
  for (int round = 1; round <= 3; ++round) {
    shared[thread] = round * 1000 + thread;
    named_barrier(1 + pair, 64);
    out[thread] += shared[thread ^ 63];
    named_barrier(1 + pair, 64);
  }
}

template <bool second_barrier> __global__ void rotate_kernel(int32_t* out) {
  auto* shared = reinterpret_cast<int32_t*>(shared_memory());
  const int thread = threadIdx.x;
  for (int round = 0; round < 4; ++round) {
    shared[thread] = round * 1000 + thread;
    __syncthreads();
    out[thread] = static_cast<int32_t>(out[thread] * 31u + shared[(thread + 33) % blockDim.x]);
    if (second_barrier) __syncthreads();
  }
}

// Every thread sends its number to all blocks of its cluster and reads others' after a
// cluster_sync.
template <bool synchronizes> __global__ void remote_store_kernel(int32_t* out) {
  auto* inbox = reinterpret_cast<int32_t*>(shared_memory());  // [cluster, threads]
  const uint32_t thread = threadIdx.x, threads = blockDim.x, size = cluster_size();
  cluster_sync();
  for (uint32_t rank = 0; rank < size; ++rank) {
    const uint32_t slot = shared_address(inbox + cluster_rank() * threads + thread);
    store_remote(remote_address(slot, rank), blockIdx.x * 100 + thread);
  }
  if (synchronizes) cluster_sync();
  int32_t sum = 0;
  for (uint32_t i = 0; i < size; ++i) sum += inbox[i * threads + (thread + i) % threads];
  out[blockIdx.x * threads + thread] = sum;
  cluster_sync();
}

// The same by asynchronous stores that an mbarrier counts. The inbox has two halves; a block sends
// into one again when the remote block has said that it was read.
__global__ void exchange_kernel(int32_t* out) {
  auto* full = reinterpret_cast<uint64_t*>(shared_memory());     // [2]
  auto* empty = full + 2;                                        // [2]
  auto* inbox = reinterpret_cast<uint4*>(shared_memory() + 64);  // [2, cluster, threads]
  const uint32_t thread = threadIdx.x, threads = blockDim.x, size = cluster_size();
  if (thread == 0) {
    for (int i = 0; i < 2; ++i) barrier_init(full + i, 1), barrier_init(empty + i, size * threads);
    barrier_fence_init();
  }
  cluster_sync();
  uint32_t sum = 0;
  for (uint32_t round = 0; round < 5; ++round) {
    const uint32_t half = round % 2, parity = round / 2 % 2;
    uint4* slots = inbox + half * size * threads;
    if (thread == 0) barrier_arrive_expect(full + half, size * threads * 16);
    barrier_wait(empty + half, parity ^ 1);
    for (uint32_t rank = 0; rank < size; ++rank) {
      const uint32_t slot = shared_address(slots + cluster_rank() * threads + thread);
      const uint32_t number = (round + 1) * 10000 + blockIdx.x * 100 + thread;
      store_async16(remote_address(slot, rank), make_uint4(number, 1, 0, 0),
                    remote_address(shared_address(full + half), rank));
    }
    barrier_wait(full + half, parity);
    for (uint32_t i = 0; i < size; ++i) {
      const uint4 got = slots[i * threads + (thread + i) % threads];
      sum += got.x + got.y;
    }
    for (uint32_t rank = 0; rank < size; ++rank) {
      barrier_arrive_remote(remote_address(shared_address(empty + half), rank));
    }
  }
  out[blockIdx.x * threads + thread] = static_cast<int32_t>(sum);
  cluster_sync();
}

void test_barriers() {
  std::vector<int32_t> out(128, 0);
  launch(named_barrier_kernel, {1, 128, 512}, out.data());
  for (int t = 0; t < 128; ++t) expect(out[t] == 6000 + 3 * (t ^ 63), "named_barrier");

  constexpr int kThreads = 64, kCluster = 4, kBlocks = 8;
  std::vector<int32_t> sums(kThreads * kBlocks);
  const Launch cluster{kBlocks, kThreads, 64 + 2 * kCluster * kThreads * 16, kCluster};
  const auto sum_of_numbers = [](int block, int thread) {
    int32_t sum = 0;
    for (int i = 0; i < kCluster; ++i) {
      sum += (block / kCluster * kCluster + i) * 100 + (thread + i) % kThreads;
    }
    return sum;
  };
  launch(exchange_kernel, cluster, sums.data());
  for (int i = 0; i < kBlocks * kThreads; ++i) {
    const int32_t wanted = 5 * sum_of_numbers(i / kThreads, i % kThreads) + kCluster * 150005;
    expect(sums[i] == wanted, "exchange by store_async16");
  }
  launch(remote_store_kernel<true>, cluster, sums.data());
  for (int i = 0; i < kBlocks * kThreads; ++i) {
    expect(sums[i] == sum_of_numbers(i / kThreads, i % kThreads), "exchange by store_remote");
  }
  launch(remote_store_kernel<false>, cluster, sums.data());
  expect(sums[0] != sum_of_numbers(0, 0), "store_remote is late without a cluster_sync");
}

void test_schedules_find_races() {
  const auto results = [](auto kernel) {
    std::vector<std::vector<int32_t>> all;
    for (int seed = 0; seed < 16; ++seed) {
      setenv("RBM_EMULATED_SCHEDULE", std::to_string(seed).c_str(), 1);
      all.emplace_back(128, 0);
      launch(kernel, {1, 128, 512}, all.back().data());
    }
    setenv("RBM_EMULATED_SCHEDULE", "0", 1);
    bool same = true;
    for (const auto& result : all) same = same && result == all[0];
    return same;
  };
  expect(results(rotate_kernel<true>), "a kernel with all barriers is the same in every order");
  expect(!results(rotate_kernel<false>), "a missing barrier shows in some order");
}

__global__ void bulk_kernel(const int32_t* in, int steps, int32_t* out) {
  auto* full = reinterpret_cast<uint64_t*>(shared_memory());         // [2]
  auto* empty = full + 2;                                            // [2]
  auto* buffers = reinterpret_cast<int32_t*>(shared_memory() + 64);  // [2, 64]
  const int thread = threadIdx.x;
  if (thread == 0) {
    for (int i = 0; i < 2; ++i) barrier_init(full + i, 1), barrier_init(empty + i, 64);
    barrier_fence_init();
  }
  __syncthreads();
  if (thread == 64) {  // the producer
    for (int step = 0; step < steps; ++step) {
      const int buffer = step % 2;
      barrier_wait(empty + buffer, (step / 2 + 1) % 2);
      barrier_arrive_expect(full + buffer, 256);
      bulk_copy(buffers + buffer * 64, in + step * 64, 128, full + buffer);
      bulk_copy(buffers + buffer * 64 + 32, in + step * 64 + 32, 128, full + buffer);
    }
  } else if (thread < 64) {
    int32_t sum = 0;
    for (int step = 0; step < steps; ++step) {
      const int buffer = step % 2;
      barrier_wait(full + buffer, step / 2 % 2);
      sum = static_cast<int32_t>(sum * 31u + buffers[buffer * 64 + (thread + 1) % 64]);
      barrier_arrive(empty + buffer);
    }
    out[thread] = sum;
  }
}

// What is in shared memory while a copy is under way, and after it.
__global__ void late_kernel(const int32_t* in, int32_t* out) {
  auto* barrier = reinterpret_cast<uint64_t*>(shared_memory());
  auto* buffer = reinterpret_cast<int32_t*>(shared_memory() + 64);
  const int thread = threadIdx.x;
  buffer[thread] = 0;
  if (thread == 0) barrier_init(barrier, 1);
  warp_sync();
  if (thread == 0) {
    barrier_arrive_expect(barrier, 128);
    bulk_copy(buffer, in, 128, barrier);
  }
  warp_sync();
  out[thread] = buffer[thread];
  barrier_wait(barrier, 0);
  out[32 + thread] = buffer[thread];
}

void test_bulk_copies() {
  constexpr int kSteps = 5;
  alignas(16) int32_t in[64 * kSteps];
  for (auto& x : in) x = static_cast<int32_t>(generator());
  std::vector<int32_t> out(64), wanted(64, 0);
  for (int t = 0; t < 64; ++t) {
    for (int step = 0; step < kSteps; ++step) {
      wanted[t] = static_cast<int32_t>(wanted[t] * 31u + in[step * 64 + (t + 1) % 64]);
    }
  }
  launch(bulk_kernel, {1, 96, 64 + 512}, in, kSteps, out.data());
  expect(out == wanted, "a pipeline of bulk_copy");

  launch(late_kernel, {1, 32, 64 + 128}, in, out.data());
  for (int t = 0; t < 32; ++t) {
    // A random schedule may complete the copy at any time.
    expect(out[t] == kPoison || (std::getenv("RBM_EMULATED_SCHEDULE")[0] != '0' && out[t] == in[t]),
           "bulk_copy leaves poison until it is waited for");
    expect(out[32 + t] == in[t], "bulk_copy after the wait");
  }
}

enum class Wgmma { right, early_read, early_overwrite, unfenced };

// d [64 x N] = 3 + a b', a [64, 128], b [N, 128], with two products in flight.
template <int N, bool b_signed, Wgmma how, bool a_signed>
__global__ void wgmma_kernel(const unsigned char* a, const unsigned char* b, int32_t* d) {
  constexpr int kDepth = 128, kLeading = 128, kStride = kDepth / 16 * 128;
  unsigned char* shared = shared_memory();  // [N / 8, depth / 16, 8, 16]
  const int thread = threadIdx.x, lane = thread % 32;
  for (int i = thread; i < N * kDepth; i += 128) {
    const int n = i / kDepth, k = i % kDepth;
    shared[n / 8 * kStride + k / 16 * kLeading + n % 8 * 16 + k % 16] = b[i];
  }
  proxy_fence();
  __syncthreads();
  uint32_t rows[kDepth / 32][4];
  int32_t sums[N / 2];
  for (int32_t& sum : sums) sum = 3;
  const int row = thread / 32 * 16 + lane / 4;
  for (int step = 0; step < kDepth / 32; ++step) {
    for (int i = 0; i < 4; ++i) {
      std::memcpy(rows[step] + i,
                  a + (row + i % 2 * 8) * kDepth + step * 32 + i / 2 * 16 + lane % 4 * 4, 4);
    }
    if (how != Wgmma::unfenced) wgmma_fence();
    wgmma_registers<N, b_signed, a_signed>(
        sums, rows[step], matrix_descriptor(shared + step * 2 * kLeading, kLeading, kStride));
    wgmma_commit();
    if (how == Wgmma::early_overwrite) rows[step][0] = 0;
    wgmma_wait<1>();
  }
  if (how != Wgmma::early_read) wgmma_wait<0>();
  for (int i = 0; i < N / 2; ++i) {
    d[(row + i / 2 % 2 * 8) * N + i / 4 * 8 + lane % 4 * 2 + i % 2] = sums[i];
  }
  if (how == Wgmma::early_read) wgmma_wait<0>();
}

template <int N, bool b_signed, Wgmma how = Wgmma::right, bool a_signed = false>
std::vector<int32_t> run_wgmma(const std::vector<unsigned char>& a,
                               const std::vector<unsigned char>& b) {
  std::vector<int32_t> d(64 * N);
  launch(wgmma_kernel<N, b_signed, how, a_signed>, {1, 128, N * 128}, a.data(), b.data(), d.data());
  return d;
}

template <int N> void test_wgmma() {
  const auto a = random_bytes(64 * 128), b = random_bytes(N * 128);
  expect(run_wgmma<N, true>(a, b) == product(a, false, b, true, 64, N, 128, 3),
         "wgmma u8 s8, N = " + std::to_string(N));
  expect(run_wgmma<N, false>(a, b) == product(a, false, b, false, 64, N, 128, 3),
         "wgmma u8 u8, N = " + std::to_string(N));
  expect(run_wgmma<N, true, Wgmma::right, true>(a, b) == product(a, true, b, true, 64, N, 128, 3),
         "wgmma s8 s8, N = " + std::to_string(N));
}

void test_misuse_of_wgmma() {
  const auto a = random_bytes(64 * 128), b = random_bytes(32 * 128);
  const auto wanted = product(a, false, b, true, 64, 32, 128, 3);
  expect(run_wgmma<32, true, Wgmma::early_read>(a, b) == std::vector<int32_t>(64 * 32, kPoison),
         "wgmma leaves poison until it is waited for");
  expect(run_wgmma<32, true, Wgmma::early_overwrite>(a, b) != wanted,
         "wgmma reads its registers late");
  expect_error("without a wgmma_fence", [&] {
    run_wgmma<32, true, Wgmma::unfenced>(a, b);
    return 0;
  });
}

__global__ void deadlock_kernel() {
  if (threadIdx.x < 32) {
    named_barrier(3, 64);
  } else if (threadIdx.x < 96) {
    __syncthreads();
  }
}
__global__ void lost_phase_kernel() {
  auto* barrier = reinterpret_cast<uint64_t*>(shared_memory());
  if (threadIdx.x == 0) barrier_init(barrier, 2);
  warp_sync();
  if (threadIdx.x == 1) barrier_arrive(barrier);
  if (threadIdx.x == 2) barrier_wait(barrier, 0);
}
__global__ void divergent_kernel() {
  if (threadIdx.x % 2) {
    warp_sync();
  } else {
    ballot(true);
  }
}
__global__ void uninitialized_kernel() {
  barrier_arrive(reinterpret_cast<uint64_t*>(shared_memory()));
}
// The second block writes to the first when that has ended, or perhaps has not started.
template <bool sync> __global__ void lonely_kernel() {
  if (sync) cluster_sync();
  if (cluster_rank() == 0) return;
  for (int i = 0; i < 100; ++i) warp_sync();
  store_remote(remote_address(shared_address(shared_memory()), 0), 1);
}
__global__ void forgotten_copy_kernel(const int32_t* in) {
  auto* barrier = reinterpret_cast<uint64_t*>(shared_memory());
  barrier_init(barrier, 1);
  barrier_arrive_expect(barrier, 16);
  bulk_copy(shared_memory() + 16, in, 16, barrier);
}
enum class Group { one_warp, other_operands, forgotten };
template <Group how> __global__ void group_kernel() {
  if (how == Group::one_warp && threadIdx.x >= 32) return;
  const uint32_t a[4] = {};
  int32_t d[8] = {};
  const int column = how == Group::other_operands && threadIdx.x == 5 ? 128 : 0;
  wgmma_fence();
  wgmma_registers<16, true>(d, a, matrix_descriptor(shared_memory() + column, 128, 256));
  wgmma_commit();
  if (how != Group::forgotten) wgmma_wait<0>();
}
// All but one warp of each block end while that warp waits for the rest.
__global__ void early_end_kernel(int32_t* out) {
  const bool stays = threadIdx.x < 32;
  if (!stays) {
    for (int i = 0; i < 50; ++i) warp_sync();
    return;
  }
  __syncthreads();
  cluster_sync();
  out[blockIdx.x * 32 + threadIdx.x] = 1;
}
__global__ void overflow_kernel() { shared_memory()[64 + threadIdx.x] = 0; }
__global__ void poison_kernel(int32_t* out) {
  out[threadIdx.x] = reinterpret_cast<int32_t*>(shared_memory())[threadIdx.x];
  reinterpret_cast<int32_t*>(shared_memory())[threadIdx.x] = 0;
}
__global__ void indices_kernel(int32_t* out) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  ++out[block * (blockDim.x * blockDim.y * blockDim.z) + thread];
}

void test_launches() {
  expect(launch(deadlock_kernel, {1, 1025}) == cudaErrorInvalidConfiguration, "too many threads");
  expect(launch(deadlock_kernel, {0, 32}) == cudaErrorInvalidConfiguration, "no blocks");
  expect(launch(deadlock_kernel, {3, 32, 0, 2}) == cudaErrorInvalidConfiguration,
         "ragged clusters");
  expect(launch(deadlock_kernel, {1, 32, 228 * 1024}) == cudaErrorInvalidValue, "shared memory");

  std::vector<int32_t> counts(2 * 3 * 2 * 5 * 4 * 2, 0);
  launch(indices_kernel, {{2, 3, 2}, {5, 4, 2}}, counts.data());
  expect(counts == std::vector<int32_t>(counts.size(), 1), "every thread runs once");

  std::vector<int32_t> memory(32);
  launch(poison_kernel, {2, 32, 128}, memory.data());
  expect(memory == std::vector<int32_t>(32, kPoison), "shared memory is poisoned for each block");

  expect_error("block (0, 0, 0) wrote beyond its shared memory",
               [] { return launch(overflow_kernel, {1, 1, 64}); });
  expect_error("32 threads wait at named_barrier(3, 64)",
               [] { return launch(deadlock_kernel, {1, 128}); });
  expect_error("1 threads wait at barrier_wait(shared memory + 0, parity 0)",
               [] { return launch(lost_phase_kernel, {1, 32, 8}); });
  std::vector<int32_t> ended(64, 0);
  launch(early_end_kernel, {2, 96, 0, 2}, ended.data());
  expect(ended == std::vector<int32_t>(64, 1), "barriers do not wait for threads that have ended");
  expect_error("that block have ended", [] { return launch(lonely_kernel<true>, {2, 32, 4, 2}); });
  expect_error("before cluster_sync", [] { return launch(lonely_kernel<false>, {2, 32, 4, 2}); });
  alignas(16) const int32_t in[4] = {};
  expect_error("block has ended", [&] { return launch(forgotten_copy_kernel, {1, 1, 32}, in); });
  expect_error("not all warps of a warpgroup",
               [] { return launch(group_kernel<Group::one_warp>, {1, 128, 1024}); });
  expect_error("issued different wgmma",
               [] { return launch(group_kernel<Group::other_operands>, {1, 128, 1024}); });
  expect_error("wgmma in flight",
               [] { return launch(group_kernel<Group::forgotten>, {1, 128, 1024}); });
  expect_error("different instructions", [] { return launch(divergent_kernel, {1, 32}); });
  expect_error("16 threads wait at warp_sync",
               [] { return launch(lost_phase_kernel, {1, 16, 8}); });
  expect_error("not initialized", [] { return launch(uninitialized_kernel, {1, 1, 8}); });
}

void test_all() {
  for (int seed = 0; seed < 8; ++seed) {
    setenv("RBM_EMULATED_SCHEDULE", std::to_string(seed).c_str(), 1);
    test_warps();
    test_mma<false, false>(), test_mma<false, true>();
    test_mma<true, false>(), test_mma<true, true>();
    test_asynchronous_copies();
    test_barriers();
    test_bulk_copies();
    test_wgmma<16>(), test_wgmma<32>(), test_wgmma<48>(), test_wgmma<64>();
    test_wgmma<80>(), test_wgmma<96>(), test_wgmma<112>(), test_wgmma<128>();
    test_misuse_of_wgmma();
    test_launches();
  }
  test_schedules_find_races();
}

}  // namespace

int main() {
  try {
    test_all();
  } catch (const std::exception& error) {
    expect(false, error.what());
  }
  return failures ? 1 : 0;
}
