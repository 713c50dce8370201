// Bernoulli chains whose weights are spread over the shared memory of a cluster of Hopper's blocks.
//
// While a warpgroup draws, another one multiplies. Nothing but bits crosses the cluster, and nobody
// waits for all: a warp waits for the warps of the other blocks that have its sixteen chains.
#include <iterator>

#include "cuda/resident/cluster.h"
#include "cuda/resident/gaussian_cluster_sm90a.h"

namespace rbm::cuda {
namespace {

constexpr int kMostGroups = 3;  // warpgroups of a block

// Units that a warpgroup computes at once. Two warpgroups have 255 registers a thread for their
// sums, three have 168.
constexpr int kUnits[2][2] = {{128, 96}, {96, 64}};  // [warpgroups - 2][digits - 2]

// The warps' states are two buffers, one a layer, or one for both: see chain_in_cluster.
struct BernoulliModel : ClusterModel {
  unsigned states, warp_bytes, hidden_states;  // the last: from a warp's visible states on
  bool one_buffer;
};

// What the warps of all blocks that have the same sixteen chains tell one another.
struct WarpBarriers {
  uint64_t full[2];  // the other blocks' words of the hidden and of the visible states have come
  uint64_t free[2];  // all blocks have read the states given to even and to odd half-sweeps
};

// For at most that many warpgroups, of which 0 may fit.
BernoulliModel bernoulli_model(int n_visible, int n_hidden, int digits, int cluster,
                               int most_groups, int shared_bytes) {
  const unsigned available = static_cast<unsigned>(shared_bytes);
  BernoulliModel m{};
  m.states = lay_out_layers<WarpBarriers>(m, n_visible, n_hidden, digits, cluster, kMostGroups);
  const unsigned words_bytes = 4u * kWarpChains;
  const int at_once = kUnits[most_groups - 2][digits - 2];
  m.one_buffer =
      std::max(largest_slice(n_hidden, cluster), largest_slice(n_visible, cluster)) <= at_once;
  const unsigned visible_states = words_bytes * static_cast<unsigned>(m.hidden.steps);
  const unsigned hidden_states = words_bytes * static_cast<unsigned>(m.visible.steps);
  m.hidden_states = m.one_buffer ? 0 : visible_states;
  m.warp_bytes =
      m.one_buffer ? std::max(visible_states, hidden_states) : visible_states + hidden_states;

  const auto end = [&](int groups) {
    const unsigned read_ahead = words_bytes;  // past the last warp's states
    return m.states + 4u * m.warp_bytes * static_cast<unsigned>(groups) + read_ahead;
  };
  m.groups = most_groups;
  while (m.groups > 0 && end(m.groups) > available) --m.groups;
  m.shared_bytes = end(m.groups);
  return m;
}

RBM_DEVICE ClusterLayer drawn_layer(const BernoulliModel& m, bool visible) {
  return {visible ? m.visible.units : m.hidden.units, visible ? m.visible.steps : m.hidden.steps,
          visible ? m.visible.planes : m.hidden.planes, visible ? m.visible.bias : m.hidden.bias};
}

RBM_DEVICE void tell_read(uint64_t* free, int lane) {
  warp_sync();
  if (lane < static_cast<int>(cluster_size())) {
    barrier_arrive_remote(remote_address(shared_address(free), static_cast<uint32_t>(lane)));
  }
}

struct HalfSweepOfWarp {
  ClusterLayer layer;
  Slice slice;
  const uint32_t* given;
  uint32_t* drawn;
  bool visible;
  int64_t index;
  uint64_t* free;
};

// Draws units row .. row + N - 1 of the slice.
template <int digits, int N>
RBM_DEVICE void run_units(const Chain& a, const HalfSweepOfWarp& h, const WarpChains& w, int row) {
  const int unit = 32 * h.slice.first_word + row;
  // Before the product, so that its loads need not be waited for after it.
  const float minus_scale = -*a.weight_scale;
  const LayerDraw draw{key_of(a.seed, a.half_sweep + static_cast<uint64_t>(h.index)),
                       {minus_scale, minus_scale},
                       unit,
                       reinterpret_cast<const float*>(shared_memory() + h.layer.bias) + row};
  float x[N / 2];
  multiply_states<digits, N>(x, h.layer, h.slice.rows, row, h.given, w);
  if (row + N >= h.slice.rows) tell_read(h.free, w.lane);
  uint32_t bits[2][(N + 31) / 32];
  draw_units<N / 16>(bits, draw, w, (h.slice.rows - row) / 16,
                     [&](int g, int s, int i) { return x[4 * (2 * g + i / 2) + 2 * s + i % 2]; });
  store_states(a, h.drawn, h.visible, w, unit / 32, h.slice.last_word, bits);
}

template <int digits, int groups>
RBM_DEVICE void run_slice(const Chain& a, const HalfSweepOfWarp& h, const WarpChains& w) {
  constexpr int kMost = kUnits[groups - 2][digits - 2];
  if (h.slice.rows == 0) tell_read(h.free, w.lane);
  for (int row = 0; row < h.slice.rows; row += kMost) {
    const int rows = h.slice.rows - row;
    if (rows <= 32) {
      run_units<digits, 32>(a, h, w, row);
    } else if (rows <= 64 || kMost == 64) {
      run_units<digits, 64>(a, h, w, row);
    } else if constexpr (kMost > 64) {
      if (rows <= 96 || kMost == 96) {
        run_units<digits, 96>(a, h, w, row);
      } else if constexpr (kMost > 96) {
        if (rows <= 112) {
          run_units<digits, 112>(a, h, w, row);
        } else {
          run_units<digits, 128>(a, h, w, row);
        }
      }
    }
  }
}

// Nothing is overwritten before it has been read:
//
// One buffer. The states that half-sweep n draws are written, by this block or another, when all
// blocks have read those it was given: `free` of n has ended its phase. Two buffers, which a slice
// needs that is computed piece by piece. They are written where those given to half-sweep n - 1
// were; the wait for `free` of n - 1 is at the start of n.
//
// Nor does anything arrive at a barrier for a phase before the last one has ended. Between arriving
// at `free` for n and for n + 2 a warp waits at least once for states from all blocks, which sent
// them after arriving for n. (It need not for n and n + 1: nothing is sent at the end of a chain.)
// To send to a block's `full` in n, it waits for `free` of n or of n - 1, at which that block
// arrived after it had waited for the last phase of this `full`. And no phase ends while a warp
// still waits for the one before, as it has its own part in each.
template <int digits, int groups> __global__ void __launch_bounds__(groups* kGroupThreads, 1)
    chain_in_cluster(const Chain a, const BernoulliModel m) {
  if (guarded_out(a.guard)) return;
  const ClusterThread c(m);
  WarpBarriers* barriers = warp_barriers<WarpBarriers>(c.warp);
  c.start_loading(a, m, digits, [&] {
    for (int i = 0; i < 2; ++i) {
      barrier_init(&barriers->full[i], 1);
      barrier_init(&barriers->free[i], static_cast<uint32_t>(c.size));
    }
  });
  c.finish_loading();

  uint32_t* visible_states = reinterpret_cast<uint32_t*>(
      shared_memory() + m.states + m.warp_bytes * static_cast<unsigned>(c.warp));
  uint32_t* hidden_states = visible_states + m.hidden_states / 4;
  uint32_t hidden_phases = 0, visible_phases = 0, n = 0;  // n: half-sweeps of this warp so far
  c.for_each_chains(a.rows, m, [&](int64_t row0) {
    const WarpChains w = warp_chains(a, row0);
    load_start(a, visible_states, w.row0, 0, 1);
    warp_sync();
    for (int64_t t = 0; t < 2 * a.sweeps; ++t, ++n) {
      const bool even = t % 2 == 0, last = t == 2 * a.sweeps - 1;
      const HalfSweepOfWarp h{drawn_layer(m, !even),
                              even ? c.hidden : c.visible,
                              even ? visible_states : hidden_states,
                              even ? hidden_states : visible_states,
                              !even,
                              t,
                              &barriers->free[n % 2]};
      if (even && t != 0) barrier_wait(&barriers->full[1], visible_phases++ & 1);
      if (!even) barrier_wait(&barriers->full[0], hidden_phases++ & 1);
      if (!m.one_buffer && n != 0) barrier_wait(&barriers->free[(n - 1) % 2], (n - 1) / 2 & 1);
      run_slice<digits, groups>(a, h, w);
      warp_sync();
      if (m.one_buffer) barrier_wait(h.free, n / 2 & 1);
      if (last) {
        write_results(a, h.drawn, w, h.slice.first_word, h.slice.last_word);
        warp_sync();
      } else {
        exchange(h.drawn, h.slice, state_words(h.layer.units), &barriers->full[h.visible], c.lane);
      }
    }
  });
}

template <int digits, int groups> int launch_groups(const Chain& a, const BernoulliModel& m,
                                                    int cluster, int shared_bytes,
                                                    cudaStream_t stream) {
  return launch_clusters<chain_in_cluster<digits, groups>>(a, m, groups * kGroupThreads, cluster,
                                                           shared_bytes, stream);
}

}  // namespace

int smallest_cluster(int n_visible, int n_hidden, int digits, int shared_bytes, bool gaussian) {
  if (n_visible < 1 || n_hidden < 1 || far_too_large(n_visible, n_hidden, shared_bytes)) return 0;
  for (int cluster : kClusters) {
    if (gaussian) {
      if (gaussian_chain_fits(n_visible, n_hidden, digits, cluster, shared_bytes)) return cluster;
      continue;
    }
    // One warpgroup alone would leave the tensor cores idle while it draws.
    if (bernoulli_model(n_visible, n_hidden, digits, cluster, 2, shared_bytes).groups == 2) {
      return cluster;
    }
  }
  return 0;
}

int clusters_at_once(int digits, int cluster, int shared_bytes, bool gaussian) {
  int clusters = 0, status = cudaSuccess;
  constexpr int kThreads = 2 * kGroupThreads;
  if (gaussian) {
    status = gaussian_chain_clusters(digits, cluster, shared_bytes, clusters);
  } else if (digits == 2) {
    status = count_clusters<chain_in_cluster<2, 2>>(kThreads, cluster, shared_bytes, clusters);
  } else {
    status = count_clusters<chain_in_cluster<3, 2>>(kThreads, cluster, shared_bytes, clusters);
  }
  return status == cudaSuccess ? clusters : 0;
}

int chain_sm90a(const Chain& a, int digits, int cluster, cudaStream_t stream) {
  if (a.rows == 0 || a.n_visible == 0) return cudaSuccess;
  int device = 0, shared_bytes = 0;
  int status = cudaGetDevice(&device);
  if (status == cudaSuccess) {
    status = cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  if (status != cudaSuccess) return status;
  const bool known =
      std::find(std::begin(kClusters), std::end(kClusters), cluster) != std::end(kClusters);
  if (!known || a.n_hidden < 1 || far_too_large(a.n_visible, a.n_hidden, shared_bytes)) {
    return cudaErrorInvalidValue;
  }
  if (a.log_var != nullptr) return gaussian_chain_sm90a(a, digits, cluster, shared_bytes, stream);
  const auto model = [&](int most_groups) {
    return bernoulli_model(a.n_visible, a.n_hidden, digits, cluster, most_groups, shared_bytes);
  };
  // Three warpgroups where they fit and still compute a slice at once.
  const BernoulliModel three = model(3), two = model(2);
  if (three.groups == 3 && three.one_buffer) {
    return digits == 2 ? launch_groups<2, 3>(a, three, cluster, shared_bytes, stream)
                       : launch_groups<3, 3>(a, three, cluster, shared_bytes, stream);
  }
  if (two.groups == 0) return cudaErrorInvalidValue;
  return digits == 2 ? launch_groups<2, 2>(a, two, cluster, shared_bytes, stream)
                     : launch_groups<3, 2>(a, two, cluster, shared_bytes, stream);
}

}  // namespace rbm::cuda
