// What the kernels of chains in one block share, whatever their visible units are.
#pragma once

#include "cuda/resident/warp.h"

namespace rbm::cuda {

constexpr int kBlockWarps = 16;
// Words of a step's real states: one for each unit and chain.
constexpr int kStepValues = 32 * kWarpChains;

// Shared memory: the digits of both layers' weights as planes of whole groups of 16 rows and whole
// steps of terms, the biases, and the states of each team.
struct BlockLayer {
  int units, groups, steps;  // drawn units, groups of 16 of them, and steps of given units
  unsigned planes, bias;     // byte offsets
};

// The states of a team: visible ones, bits or values, then hidden ones, then the sixteen largest
// magnitudes of the values.
struct BlockModel {
  BlockLayer hidden, visible;
  unsigned states, hidden_states, largest, team_bytes;  // the middle two from the team's on
  int team;                                             // warps of a team
  unsigned spread, precision;                           // of Gaussian units, beside the biases
};

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

// Lane's row of the four matrices of 8 rows that it loads for a group: two of chunks by two of
// rows.
RBM_DEVICE const unsigned char* lane_planes(const BlockLayer& l, const WarpChains& w, int group) {
  const int rows = 16 * l.groups;
  return shared_memory() + l.planes +
         (w.lane / 8 % 2 * rows + 16 * group + 8 * (w.lane / 16) + w.lane % 8) * kChunk;
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
  const unsigned char* planes = lane_planes(l, w, group0);
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

RBM_DEVICE void team_sync(int first_warp, int team) {
  if (team == 1) {
    warp_sync();
  } else {
    named_barrier(1 + first_warp / team, 32 * team);
  }
}

// Puts gaussian_chain_in_block on a stream (gaussian_block.cu); a cudaError_t.
int launch_gaussian_chain(const Chain& a, const BlockModel& m, int digits, const Launch& where);

}  // namespace rbm::cuda
