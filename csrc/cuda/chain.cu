// Chains whose weights fit into the shared memory of one block, for any GPU from sm_80.
//
// Sixteen chains are run by a team of one to sixteen warps, which share the units of each layer. A
// team waits only for itself, so the matrix instructions of some overlap the draws of others.
#include <algorithm>

#include "chain.h"
#include "chain_warp.h"

namespace rbm::cuda {
namespace {

constexpr int kWarps = 16;

// Shared memory: the digits of both layers' weights as planes of whole groups of 16 rows and whole
// steps of terms, the biases, and the states of each team.
struct BlockLayer {
  int units, groups, steps;  // drawn units, groups of 16 of them, and steps of given units
  unsigned planes, bias;     // byte offsets
};

struct BlockModel {
  BlockLayer hidden, visible;
  unsigned states, team_bytes;
  int team;  // warps of a team
};

unsigned planes_bytes(const BlockLayer& l, int digits) {
  return static_cast<unsigned>(digits * l.steps * kStep) * static_cast<unsigned>(l.groups * 16);
}

BlockModel block_model(int n_visible, int n_hidden, int digits, int team) {
  BlockModel m{};
  m.hidden = {n_hidden, groups_of(n_hidden), state_words(n_visible), 0, 0};
  m.visible = {n_visible, groups_of(n_visible), state_words(n_hidden), 0, 0};
  m.visible.planes = planes_bytes(m.hidden, digits);
  m.hidden.bias = m.visible.planes + planes_bytes(m.visible, digits);
  m.visible.bias = m.hidden.bias + 64u * static_cast<unsigned>(m.hidden.groups);
  m.states = m.visible.bias + 64u * static_cast<unsigned>(m.visible.groups);
  m.team_bytes = 4u * kWarpChains * static_cast<unsigned>(m.hidden.steps + m.visible.steps);
  m.team = team;
  return m;
}

unsigned shared_bytes_of(const BlockModel& m) {
  return m.states + m.team_bytes * static_cast<unsigned>(kWarps / m.team);
}

// The smallest team, whose blocks run the most chains, that leaves room for all states; 0: none.
int smallest_team(int n_visible, int n_hidden, int digits, int shared_bytes) {
  // Offsets are 32-bit; nothing near this size fits.
  if (int64_t{n_visible} * n_hidden > shared_bytes) return 0;
  for (int team = 1; team <= kWarps; team *= 2) {
    const BlockModel m = block_model(n_visible, n_hidden, digits, team);
    if (shared_bytes_of(m) <= static_cast<unsigned>(shared_bytes)) return team;
  }
  return 0;
}

RBM_DEVICE void load_layer(const BlockLayer& l, int digits, const Planes& planes,
                           const float* bias) {
  unsigned char* shared = shared_memory();
  const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
  const int rows = 16 * l.groups, chunks = 2 * l.steps;
  for (int piece = thread; piece < digits * chunks * rows; piece += threads) {
    const int row = piece % rows, chunk = piece / rows % chunks, digit = piece / rows / chunks;
    copy_async16(shared + l.planes + piece * kChunk,
                 planes.data + chunk_offset(planes, digit, chunk, row), true);
  }
  float* own_bias = reinterpret_cast<float*>(shared + l.bias);
  for (int i = thread; i < rows; i += threads) own_bias[i] = i < l.units ? -bias[i] : 0.0f;
}

// The sixteen chains' sums for groups group0 .. group0 + groups - 1, of which the layer has
// `count`: x[g][s][i] as draw_units wants them.
template <int digits, int groups>
RBM_DEVICE void multiply_states(float (&x)[groups][2][4], const BlockLayer& l,
                                const uint32_t* states, const WarpChains& w, int group0,
                                int count) {
  int32_t sums[digits][2 * groups][4];
#pragma unroll
  for (int j = 0; j < digits * 2 * groups * 4; ++j) {
    sums[j / (8 * groups)][j / 4 % (2 * groups)][j % 4] = 0;
  }
  const int rows = 16 * l.groups;
  // Lane's row of the four matrices of 8 rows: two of chunks by two of rows.
  const unsigned char* planes =
      shared_memory() + l.planes +
      (w.lane / 8 % 2 * rows + 16 * group0 + 8 * (w.lane / 16) + w.lane % 8) * kChunk;
  const uint32_t* words = states + 2 * w.r;
#pragma unroll 1
  for (int step = 0; step < l.steps; ++step) {
    uint32_t a[4];
    unpack_states(a, *reinterpret_cast<const uint2*>(words + kWarpChains * step), w.q);
#pragma unroll
    for (int g = 0; g < groups; ++g) {
      if (g >= count) break;
#pragma unroll
      for (int d = 0; d < digits; ++d) {
        uint32_t f[4];
        load_matrices(f, planes + (2 * (d * l.steps + step) * rows + 16 * g) * kChunk);
        const uint32_t tiles[2][2] = {{f[0], f[1]}, {f[2], f[3]}};
        mma_u8s8(sums[d][2 * g], a, tiles[0]);
        mma_u8s8(sums[d][2 * g + 1], a, tiles[1]);
      }
    }
  }
  // All at once, as floats leave the draws more registers than the sums of each digit would.
#pragma unroll
  for (int j = 0; j < 8 * groups; ++j) {
    const int g = j / 8, s = j / 4 % 2, i = j % 4;
    int32_t parts[digits];
#pragma unroll
    for (int d = 0; d < digits; ++d) parts[d] = sums[d][2 * g + i / 2][2 * s + i % 2];
    x[g][s][i] = binary_sum(parts);
  }
}

// Field by field: a reference to either would put both on the stack.
RBM_DEVICE BlockLayer drawn_layer(const BlockModel& m, bool visible) {
  return {visible ? m.visible.units : m.hidden.units, visible ? m.visible.groups : m.hidden.groups,
          visible ? m.visible.steps : m.hidden.steps, visible ? m.visible.planes : m.hidden.planes,
          visible ? m.visible.bias : m.hidden.bias};
}

RBM_DEVICE void team_sync(int first_warp, int team) {
  if (team == 1) {
    warp_sync();
  } else {
    named_barrier(1 + first_warp / team, 32 * team);
  }
}

// kGroups: groups of 16 units that a warp computes together; as many as 128 registers allow.
template <int digits, int kGroups> __global__ void __launch_bounds__(32 * kWarps, 1)
    chain_in_block(const Chain a, const BlockModel m) {
  if (a.guard.state != nullptr && *a.guard.state != a.guard.wanted) return;
  unsigned char* shared = shared_memory();
  load_layer(m.hidden, digits, a.to_hidden, a.hidden_bias);
  load_layer(m.visible, digits, a.to_visible, a.visible_bias);
  copy_async_commit();
  copy_async_wait<0>();
  __syncthreads();

  const int warp = static_cast<int>(threadIdx.x) / 32, member = warp % m.team;
  const int teams = kWarps / m.team, team = warp / m.team;
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
        const LayerDraw draw{key_of(a.seed, a.half_sweep + static_cast<uint64_t>(t)),
                             -*a.weight_scale, 16 * group0,
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

bool chain_fits(int n_visible, int n_hidden, int digits, int shared_bytes) {
  return smallest_team(n_visible, n_hidden, digits, shared_bytes) != 0;
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
  int team = smallest_team(a.n_visible, a.n_hidden, digits, shared_bytes);
  if (team == 0) return cudaErrorInvalidValue;

  // Few chains: more warps on each, as long as no multiprocessor has to run two blocks for it and
  // the larger layer gives every warp something to do.
  const int kernel_groups = digits == 2 ? 4 : 2;
  const int64_t teams = (a.rows + kWarpChains - 1) / kWarpChains;
  const int largest = groups_of(std::max(a.n_visible, a.n_hidden));
  while (team < kWarps && team * kernel_groups < largest &&
         2 * team * teams <= int64_t{kWarps} * multiprocessors) {
    team *= 2;
  }
  const BlockModel m = block_model(a.n_visible, a.n_hidden, digits, team);
  const int64_t blocks = (teams * team + kWarps - 1) / kWarps;
  const dim3 grid(static_cast<unsigned>(std::min<int64_t>(blocks, multiprocessors)));
  const auto kernel = digits == 2 ? chain_in_block<2, 4> : chain_in_block<3, 2>;
  return launch(kernel, {grid, dim3(32 * kWarps), shared_bytes_of(m), 1, stream}, a, m);
}

}  // namespace rbm::cuda
