// What the chains in a cluster of Hopper's blocks share, whatever their visible units are.
//
// Each block has the digits of its slice of either layer's units and computes that slice for all
// chains of the cluster, 64 of them a warpgroup.
#pragma once

#include <algorithm>
#include <atomic>

#include "cuda/arch/hopper.h"
#include "cuda/resident/chain.h"
#include "cuda/resident/warp.h"

namespace rbm::cuda {

constexpr int kGroupChains = 64, kGroupThreads = 128;
constexpr int kClusters[] = {1, 2, 4, 8, 16};

// A block's part of a layer: whole words of 32 units, the last block's up to a half more.
struct Slice {
  int first_word, last_word, rows;  // rows: units up to a multiple of 16
};

RBM_HD Slice slice_of(int units, int blocks, int rank) {
  const int groups = groups_of(units), whole = groups / 2;
  const int first = (rank * whole + blocks - 1) / blocks;
  if (rank + 1 == blocks) return {first, state_words(units), 16 * groups - 32 * first};
  const int last = ((rank + 1) * whole + blocks - 1) / blocks;
  return {first, last, 32 * (last - first)};
}

// Units of the largest slice, up to a multiple of 16.
RBM_HD int largest_slice(int units, int blocks) {
  int rows = 0;
  for (int rank = 0; rank < blocks; ++rank) {
    const int own = slice_of(units, blocks, rank).rows;
    rows = rows > own ? rows : own;
  }
  return rows;
}

// Where the weights of one direction lie in the shared memory of every block of a cluster.
struct ClusterLayer {
  int units, steps;       // drawn units, and steps of 32 given ones
  unsigned planes, bias;  // byte offsets
};

// More bytes of weights than a whole cluster has, so that offsets of what cannot fit do not
// overflow.
inline bool far_too_large(int n_visible, int n_hidden, int shared_bytes) {
  return int64_t{n_visible} * n_hidden > int64_t{16} * shared_bytes;
}

RBM_DEVICE uint32_t slice_bytes(const ClusterLayer& l, const Slice& slice, int digits) {
  return static_cast<uint32_t>(digits * kStep * l.steps * slice.rows);
}

// Starts a warp's share of the copies of a slice; one thread calls.
RBM_DEVICE void load_slice(const ClusterLayer& l, const Slice& slice, int digits,
                           const Planes& planes, int warp, uint64_t* barrier) {
  if (slice.rows == 0) return;
  unsigned char* shared = shared_memory() + l.planes;
  const int chunks = 2 * l.steps, bytes = slice.rows * kChunk;
  for (int piece = warp; piece < digits * chunks; piece += static_cast<int>(blockDim.x) / 32) {
    const int64_t from =
        chunk_offset(planes, piece / chunks, piece % chunks, int64_t{32} * slice.first_word);
    bulk_copy(shared + piece * bytes, planes.data + from, static_cast<uint32_t>(bytes), barrier);
  }
}

RBM_DEVICE void load_bias(const ClusterLayer& l, const Slice& slice, const float* bias) {
  float* shared = reinterpret_cast<float*>(shared_memory() + l.bias);
  for (int i = static_cast<int>(threadIdx.x); i < slice.rows; i += static_cast<int>(blockDim.x)) {
    const int unit = 32 * slice.first_word + i;
    shared[i] = unit < l.units ? -bias[unit] : 0.0f;
  }
}

// x = the sums of the warpgroup's 64 chains for N units of a slice, from row `row` of its planes
// on, in the order of wgmma's registers. Rows past the slice's are whatever follows it in memory.
template <int digits, int N>
RBM_DEVICE void multiply_states(float (&x)[N / 2], const ClusterLayer& l, int slice_rows, int row,
                                const uint32_t* states, const WarpChains& w) {
  int32_t sums[digits][N / 2];
#pragma unroll
  for (int j = 0; j < digits * N / 2; ++j) sums[j / (N / 2)][j % (N / 2)] = 0;
  // In the descriptor's units of 16 bytes, a chunk of the slice is `rows` long.
  const uint32_t rows = static_cast<uint32_t>(slice_rows), steps = static_cast<uint32_t>(l.steps);
  const uint64_t first =
      matrix_descriptor(shared_memory() + l.planes + row * kChunk, rows * kChunk, 8 * kChunk);
  uint32_t planes = static_cast<uint32_t>(first);
  const uint64_t layout = first >> 32 << 32;
  const uint2* words = reinterpret_cast<const uint2*>(states + 2 * w.r);
  const auto issue = [&](const uint32_t (&a)[4]) {
    wgmma_fence();
#pragma unroll
    for (int d = 0; d < digits; ++d) {
      wgmma_registers<N, true>(sums[d], a, layout | (planes + 2 * d * steps * rows));
    }
    wgmma_commit();
    planes += 2 * rows;
  };
  // A fragment's registers are free when the step after it has been issued and all but that one
  // are done. Words are read one step ahead, at the end past the last.
  constexpr int kStepWords = kWarpChains / 2;
  uint32_t even[4], odd[4];
  uint2 next = words[0];
  for (uint32_t step = 0;; step += 2, words += 2 * kStepWords) {
    unpack_states(even, next, w.q);
    next = words[kStepWords];
    issue(even);
    wgmma_wait<1>();
    if (step + 1 >= steps) break;
    unpack_states(odd, next, w.q);
    next = words[2 * kStepWords];
    issue(odd);
    wgmma_wait<1>();
    if (step + 2 >= steps) break;
  }
  wgmma_wait<0>();
#pragma unroll
  for (int d = 0; d < digits; ++d) wgmma_results(sums[d]);
#pragma unroll
  for (int j = 0; j < N / 2; ++j) {
    int32_t parts[digits];
#pragma unroll
    for (int d = 0; d < digits; ++d) parts[d] = sums[d][j];
    x[j] = binary_sum(parts);
  }
}

// Sends the block's words of the warp's states to the other blocks, and announces theirs.
RBM_DEVICE void exchange(const uint32_t* states, const Slice& slice, int words, uint64_t* full,
                         int lane) {
  const uint32_t size = cluster_size(), rank = cluster_rank();
  const int own = slice.last_word - slice.first_word;
  const uint32_t* first = states + kWarpChains * slice.first_word;
  const uint32_t address = shared_address(first), barrier = shared_address(full);
  for (uint32_t i = 1 + static_cast<uint32_t>(lane) / 16; i < size; i += 2) {
    const uint32_t target = (rank + i) % size;
    for (int chunk = lane % 16; chunk < 4 * own; chunk += 16) {
      store_async16(remote_address(address + 16 * static_cast<uint32_t>(chunk), target),
                    reinterpret_cast<const uint4*>(first)[chunk], remote_address(barrier, target));
    }
  }
  if (lane == 0) {
    barrier_arrive_expect(full, static_cast<uint32_t>(4 * kWarpChains * (words - own)));
  }
}

// How many clusters of a kernel run at a time, one block on a multiprocessor. Asked once for all
// models.
template <auto kernel>
int clusters_at_a_time(int threads, int cluster, int shared_bytes, int& clusters) {
  static std::atomic<int> known[17];
  clusters = known[cluster];
  if (clusters != 0) return cudaSuccess;
  const unsigned size = static_cast<unsigned>(cluster);
  const Launch largest{dim3(size), dim3(static_cast<unsigned>(threads)),
                       static_cast<unsigned>(shared_bytes), size, nullptr};
  const int status = resident_clusters(kernel, largest, clusters);
  if (status == cudaSuccess) known[cluster] = clusters;
  return status;
}

}  // namespace rbm::cuda
