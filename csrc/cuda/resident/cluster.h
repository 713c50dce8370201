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

// Shared memory starts with the barrier that the weights complete, then come the barriers of each
// warp, which differ between the kernels.
constexpr unsigned kBarriersStart = 16;

template <class Barriers> RBM_DEVICE Barriers* warp_barriers(int warp) {
  return reinterpret_cast<Barriers*>(shared_memory() + kBarriersStart) + warp;
}

// Where things lie in the shared memory of every block, as far as both kinds of visible units have
// them.
struct ClusterModel {
  ClusterLayer hidden, visible;
  int groups;  // warpgroups of a block
  unsigned shared_bytes;
};

// Lays both layers out behind the barriers of `most_groups` warpgroups; returns where they end.
template <class Barriers> unsigned lay_out_layers(ClusterModel& m, int n_visible, int n_hidden,
                                                  int digits, int cluster, int most_groups) {
  m.hidden = {n_hidden, state_words(n_visible), 0, 0};
  m.visible = {n_visible, state_words(n_hidden), 0, 0};
  const unsigned hidden_rows = static_cast<unsigned>(largest_slice(n_hidden, cluster));
  const unsigned visible_rows = static_cast<unsigned>(largest_slice(n_visible, cluster));
  const unsigned barriers_end =
      kBarriersStart + 4 * static_cast<unsigned>(most_groups * sizeof(Barriers));
  m.hidden.planes = static_cast<unsigned>(round_up(barriers_end, 128));
  m.visible.planes =
      m.hidden.planes + static_cast<unsigned>(digits * kStep * m.hidden.steps) * hidden_rows;
  m.hidden.bias =
      m.visible.planes + static_cast<unsigned>(digits * kStep * m.visible.steps) * visible_rows;
  m.visible.bias = m.hidden.bias + 4 * hidden_rows;
  return m.visible.bias + 4 * visible_rows;
}

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

// A thread's place in its cluster, and what all kernels begin and end with: a block's weights are
// loaded once, then every warp runs its own chains.
struct ClusterThread {
  int warp, lane;  // of the block
  int size, rank;  // of the cluster
  Slice hidden, visible;

  __device__ __forceinline__ explicit ClusterThread(const ClusterModel& m)
      // By a shuffle, so that the compiler knows it to be the same for all lanes.
      : warp(shuffle(static_cast<int>(threadIdx.x) / 32, 0)),
        lane(static_cast<int>(threadIdx.x) % 32),
        size(static_cast<int>(cluster_size())),
        rank(static_cast<int>(cluster_rank())),
        hidden(slice_of(m.hidden.units, size, rank)),
        visible(slice_of(m.visible.units, size, rank)) {}

  // Starts to load the block's weights and biases. init_barriers() initializes the warp's own
  // barriers; one lane of each warp calls it.
  template <class Init>
  __device__ __forceinline__ void start_loading(const Chain& a, const ClusterModel& m, int digits,
                                                const Init& init_barriers) const {
    if (lane == 0) {
      init_barriers();
      if (warp == 0) barrier_init(weights_full(), 1);
      barrier_fence_init();
      proxy_fence();  // the copy engine is to see its barrier
    }
    __syncthreads();
    if (lane == 0) {
      load_slice(m.hidden, hidden, digits, a.to_hidden, warp, weights_full());
      load_slice(m.visible, visible, digits, a.to_visible, warp, weights_full());
      if (warp == 0) {
        barrier_arrive_expect(weights_full(), slice_bytes(m.hidden, hidden, digits) +
                                                  slice_bytes(m.visible, visible, digits));
      }
    }
    load_bias(m.hidden, hidden, a.hidden_bias);
    load_bias(m.visible, visible, a.visible_bias);
  }

  // Returns when all blocks have initialized their barriers and this block has its weights.
  __device__ __forceinline__ void finish_loading() const {
    cluster_sync();
    barrier_wait(weights_full(), 0);
  }

  // Calls run(row0) for the first row of every sixteen chains that this warp runs: a warpgroup
  // takes 64 at a time, one cluster's warpgroups those after the other's.
  template <class RunChains>
  __device__ __forceinline__ void for_each_chains(int64_t rows, const ClusterModel& m,
                                                  const RunChains& run) const {
    const int64_t clusters = gridDim.x / static_cast<unsigned>(size);
    for (int64_t group = blockIdx.x / static_cast<unsigned>(size) + warp / 4 * clusters;
         kGroupChains * group < rows; group += m.groups * clusters) {
      run(kGroupChains * group + kWarpChains * static_cast<int64_t>(warp % 4));
    }
    cluster_sync();  // no block leaves while another one may still tell it something
  }

 private:
  __device__ __forceinline__ static uint64_t* weights_full() {
    return reinterpret_cast<uint64_t*>(shared_memory());
  }
};

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
int count_clusters(int threads, int cluster, int shared_bytes, int& clusters) {
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

// Puts a kernel on a stream, a cluster for each 64 chains up to as many as run at a time. threads:
// the most that a block of this kernel has.
template <auto kernel, class Model> int launch_clusters(const Chain& a, const Model& m, int threads,
                                                        int cluster, int shared_bytes,
                                                        cudaStream_t stream) {
  int clusters = 0;
  const int status = count_clusters<kernel>(threads, cluster, shared_bytes, clusters);
  if (status != cudaSuccess) return status;
  if (clusters == 0) return cudaErrorInvalidConfiguration;
  const int64_t needed = (a.rows + kGroupChains - 1) / kGroupChains;
  const unsigned blocks = static_cast<unsigned>(std::min<int64_t>(needed, clusters) * cluster);
  const dim3 block(static_cast<unsigned>(m.groups * kGroupThreads));
  const Launch where{dim3(blocks), block, m.shared_bytes, static_cast<unsigned>(cluster), stream};
  return launch(kernel, where, a, m);
}

}  // namespace rbm::cuda
