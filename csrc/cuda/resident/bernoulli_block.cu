// Chains whose weights fit into the shared memory of one block, for any GPU from sm_80.
//
// Sixteen chains are run by a team of one to sixteen warps, which share the units of each layer. A
// team waits only for itself, so the matrix instructions of some overlap the draws of others.
#include <algorithm>

#include "cuda/resident/block.h"

namespace rbm::cuda {
namespace {

unsigned planes_bytes(const BlockLayer& l, int digits) {
  return static_cast<unsigned>(digits * l.steps * kStep) * static_cast<unsigned>(l.groups * 16);
}

BlockModel block_model(int n_visible, int n_hidden, int digits, int team, bool gaussian) {
  BlockModel m{};
  m.hidden = {n_hidden, groups_of(n_hidden), state_words(n_visible), 0, 0};
  m.visible = {n_visible, groups_of(n_visible), state_words(n_hidden), 0, 0};
  m.visible.planes = planes_bytes(m.hidden, digits);
  m.hidden.bias = m.visible.planes + planes_bytes(m.visible, digits);
  m.visible.bias = m.hidden.bias + 64u * static_cast<unsigned>(m.hidden.groups);
  const unsigned vector = 64u * static_cast<unsigned>(m.visible.groups);
  m.spread = m.visible.bias + vector;
  m.precision = m.spread + (gaussian ? vector : 0);
  m.states = m.precision + (gaussian ? vector : 0);
  const unsigned visible_step = 4u * (gaussian ? kStepValues : kWarpChains);
  m.hidden_states = visible_step * static_cast<unsigned>(m.hidden.steps);
  m.largest = m.hidden_states + 4u * kWarpChains * static_cast<unsigned>(m.visible.steps);
  m.team_bytes = m.largest + (gaussian ? 4u * kWarpChains : 0);
  m.team = team;
  return m;
}

unsigned shared_bytes_of(const BlockModel& m) {
  return m.states + m.team_bytes * static_cast<unsigned>(kBlockWarps / m.team);
}

// The smallest team, whose blocks run the most chains, that leaves room for all states; 0: none.
int smallest_team(int n_visible, int n_hidden, int digits, int shared_bytes, bool gaussian) {
  // Offsets are 32-bit; nothing near this size fits.
  if (int64_t{n_visible} * n_hidden > shared_bytes) return 0;
  for (int team = 1; team <= kBlockWarps; team *= 2) {
    const BlockModel m = block_model(n_visible, n_hidden, digits, team, gaussian);
    if (shared_bytes_of(m) <= static_cast<unsigned>(shared_bytes)) return team;
  }
  return 0;
}

// Field by field: a reference to either would put both on the stack.
RBM_DEVICE BlockLayer drawn_layer(const BlockModel& m, bool visible) {
  return {visible ? m.visible.units : m.hidden.units, visible ? m.visible.groups : m.hidden.groups,
          visible ? m.visible.steps : m.hidden.steps, visible ? m.visible.planes : m.hidden.planes,
          visible ? m.visible.bias : m.hidden.bias};
}

// kGroups: groups of 16 units that a warp computes together; as many as 128 registers allow.
template <int digits, int kGroups> __global__ void __launch_bounds__(32 * kBlockWarps, 1)
    chain_in_block(const Chain a, const BlockModel m) {
  if (guarded_out(a.guard)) return;
  unsigned char* shared = shared_memory();
  load_layer(m.hidden, digits, a.to_hidden, a.hidden_bias);
  load_layer(m.visible, digits, a.to_visible, a.visible_bias);
  copy_async_commit();
  copy_async_wait<0>();
  __syncthreads();

  const int warp = static_cast<int>(threadIdx.x) / 32, member = warp % m.team;
  const int teams = kBlockWarps / m.team, team = warp / m.team;
  uint32_t* visible_states =
      reinterpret_cast<uint32_t*>(shared + m.states + m.team_bytes * static_cast<unsigned>(team));
  uint32_t* hidden_states = visible_states + kWarpChains * m.hidden.steps;
  const int64_t blocks = gridDim.x;

  for (int64_t of_team = blockIdx.x + team * blocks; kWarpChains * of_team < a.rows;
       of_team += teams * blocks) {
    const WarpChains w = warp_chains(a, kWarpChains * of_team);
    load_start(a, visible_states, w.row0, member, m.team);
    team_sync(m.team * team, m.team);
    for (int64_t t = 0; t < 2 * a.sweeps; ++t) {
      const bool visible = t % 2 != 0;
      const BlockLayer l = drawn_layer(m, visible);
      const uint32_t* given = visible ? hidden_states : visible_states;
      uint32_t* drawn = visible ? visible_states : hidden_states;
      for (int group0 = kGroups * member; group0 < l.groups; group0 += kGroups * m.team) {
        const int count = l.groups - group0;
        float x[kGroups][2][4];
        multiply_states<digits, kGroups>(x, l, given, w, group0, count);
        const float minus_scale = -*a.weight_scale;
        const LayerDraw draw{key_of(a.seed, a.half_sweep + static_cast<uint64_t>(t)),
                             {minus_scale, minus_scale},
                             16 * group0,
                             reinterpret_cast<const float*>(shared + l.bias) + 16 * group0};
        uint32_t bits[2][(kGroups + 1) / 2];
        draw_units<kGroups>(bits, draw, w, count, [&](int g, int s, int i) { return x[g][s][i]; });
        const int last_word = state_words(l.units), word = group0 / 2;
        store_states(a, drawn, visible, w, word, last_word, bits);
        if (t == 2 * a.sweeps - 1) {
          warp_sync();
          const int end = word + kGroups / 2;
          write_results(a, drawn, w, word, end < last_word ? end : last_word);
        }
      }
      // A layer is complete before it is read, and has been read before it is written again: by
      // then the other layer has been waited for.
      team_sync(m.team * team, m.team);
    }
  }
}

}  // namespace

bool chain_fits(int n_visible, int n_hidden, int digits, int shared_bytes, bool gaussian) {
  return smallest_team(n_visible, n_hidden, digits, shared_bytes, gaussian) != 0;
}

int chain(const Chain& a, int digits, cudaStream_t stream) {
  if (a.rows == 0 || a.n_visible == 0) return cudaSuccess;
  int device = 0, multiprocessors = 0, shared_bytes = 0;
  int status = cudaGetDevice(&device);
  if (status == cudaSuccess) {
    status = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  }
  if (status == cudaSuccess) {
    status = cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  if (status != cudaSuccess) return status;
  const bool gaussian = a.log_var != nullptr;
  int team = smallest_team(a.n_visible, a.n_hidden, digits, shared_bytes, gaussian);
  if (team == 0) return cudaErrorInvalidValue;

  // Few chains: more warps on each, as long as no multiprocessor has to run two blocks for it and
  // the larger layer gives every warp something to do.
  const int kernel_groups = gaussian ? 1 : digits == 2 ? 4 : 2;
  const int64_t teams = (a.rows + kWarpChains - 1) / kWarpChains;
  const int largest = groups_of(std::max(a.n_visible, a.n_hidden));
  while (team < kBlockWarps && team * kernel_groups < largest &&
         2 * team * teams <= int64_t{kBlockWarps} * multiprocessors) {
    team *= 2;
  }
  const BlockModel m = block_model(a.n_visible, a.n_hidden, digits, team, gaussian);
  const int64_t blocks = (teams * team + kBlockWarps - 1) / kBlockWarps;
  const dim3 grid(static_cast<unsigned>(std::min<int64_t>(blocks, multiprocessors)));
  const Launch where{grid, dim3(32 * kBlockWarps), shared_bytes_of(m), 1, stream};
  if (gaussian) return launch_gaussian_chain(a, m, digits, where);
  return launch(digits == 2 ? chain_in_block<2, 4> : chain_in_block<3, 2>, where, a, m);
}

}  // namespace rbm::cuda
