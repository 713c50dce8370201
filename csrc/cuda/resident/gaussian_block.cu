// Chains of Gaussian visible units, in bernoulli_block.cu's way: weights in the shared memory of
// one block, sixteen chains for a team of warps.
//
// The values of a step of 32 units are [16 chains][8 groups][4 words]: group t has those of units
// t, t + 8, t + 16 and t + 24, which are four bytes of the product's operand. A thread's fragments
// of the operand are of the four groups that thread_group names. First these hold floats; then
// quantize_step puts the fragments in their place, that of digit d into the d-th, so that a product
// reads it at once. A chain's groups are permuted by an XOR: eight lanes that read theirs, or draw,
// come to eight groups of banks.
#include "cuda/resident/block.h"
#include "include/rbm/fixed_point.h"

namespace rbm::cuda {
namespace {

RBM_HD int group_place(int chain, int group) {
  const int reversed = (chain & 1) << 2 | (chain & 2) | (chain & 4) >> 2;
  return 4 * (8 * chain + (group ^ reversed));
}
RBM_HD int value_place(int chain, int unit) {
  return unit / 32 * kStepValues + group_place(chain, unit & 7) + (unit >> 3 & 3);
}

// The largest magnitudes of sixteen chains, as magnitude_bits: all lanes tell theirs, those of
// equal r of the same two chains.
RBM_DEVICE void tell_largest(int32_t* largest, const WarpChains& w, const int32_t (&own)[2]) {
#pragma unroll
  for (int s = 0; s < 2; ++s) {
    int32_t most = larger(own[s], shuffle_xor(own[s], 1));
    most = larger(most, shuffle_xor(most, 2));
    if (w.q == 0) atomic_max(largest + w.r + 8 * s, most);
  }
}

// Reads the chains' start, steps `first`, first + step, ... of it, each value times its unit's
// precision, and raises `largest` to their magnitudes.
RBM_DEVICE void load_start_values(const Chain& a, uint32_t* words, int32_t* largest, int64_t row0,
                                  int first, int step) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll 1
  for (int chain = 0; chain < kWarpChains; ++chain) {
    const int64_t row = row0 + chain;
    int32_t most = 0;
    for (int i = first; i < state_words(a.n_visible); i += step) {
      const int unit = 32 * i + lane;
      float value = 0.0f;
      if (row < a.rows && unit < a.n_visible) {
        const Matrix& start = a.start_values;
        value = mul(load_element(start.data, start.element, row * start.row_stride + unit),
                    a.precision[unit]);
      }
      words[value_place(chain, unit)] = static_cast<uint32_t>(as_int(value));
      most = larger(most, magnitude_bits(value));
    }
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) most = larger(most, shuffle_xor(most, mask));
    if (lane == 0) atomic_max(largest + chain, most);
  }
}

// Where the thread's group j of a step lies: of its chain in slot j % 2, units q + 4 (j / 2), ...
RBM_DEVICE int thread_group(const WarpChains& w, int j) {
  return group_place(w.r, w.q + j / 2 * 4) + j % 2 * (kStepValues / 2);
}

// Floats of a step become digits. inverse: 1 / scale of the thread's two chains.
template <int digits>
RBM_DEVICE void quantize_step(uint32_t* step, const WarpChains& w, const float (&inverse)[2]) {
  uint32_t fragments[3][4];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const uint4 group = *reinterpret_cast<const uint4*>(step + thread_group(w, j));
    const uint32_t bits[4] = {group.x, group.y, group.z, group.w};
    uint32_t q[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      q[i] = signed_digits(quantize(as_float(static_cast<int32_t>(bits[i])), inverse[j % 2]));
    }
    // Bytes 0 and 1 of two values, then of four.
    const uint32_t low = byte_permute(q[0], q[1], 0x5140), high = byte_permute(q[2], q[3], 0x5140);
    fragments[0][j] = byte_permute(low, high, 0x5410);
    fragments[1][j] = byte_permute(low, high, 0x7632);
    fragments[2][j] =
        byte_permute(byte_permute(q[0], q[1], 0x0062), byte_permute(q[2], q[3], 0x0062), 0x5410);
  }
#pragma unroll
  for (int d = 0; d < digits; ++d) {
    const uint32_t (&f)[4] = fragments[d];
    *reinterpret_cast<uint4*>(step + thread_group(w, d)) = make_uint4(f[0], f[1], f[2], f[3]);
  }
}

// What the draws of sixteen Gaussian units need to know. The vectors are in shared memory, from the
// first unit on.
struct ValueDraw {
  HalfSweepKey key;
  float scale;
  int first_unit;  // a multiple of 16
  const float* minus_bias;
  const float* spread;  // what value_spread gives
  const float* precision;
  uint32_t* values;  // where they go, from the first unit's step on
  bool last;         // of the chain: they go to `states` instead
};

// Stores a value for the next product and raises `most` to its magnitude.
RBM_DEVICE void store_value(uint32_t* place, float value, float precision, int32_t& most) {
  const float scaled = mul(value, precision);
  most = larger(most, magnitude_bits(scaled));
  *place = static_cast<uint32_t>(as_int(scaled));
}

// Stores the values that the thread's units keep. Bit 4 s + i of the result: that unit is not to be
// drawn, or is none.
RBM_DEVICE uint32_t store_held(const Chain& a, const ValueDraw& draw, int32_t (&most)[2],
                               const WarpChains& w) {
  if (a.mask == nullptr && draw.first_unit + 16 <= a.n_visible) return 0;
  uint32_t kept = 0;
#pragma unroll 1
  for (int j = 0; j < 8; ++j) {
    const int s = j / 4, at = 4 * w.q + j % 4, unit = draw.first_unit + at;
    const int64_t row = w.row0 + w.r + 8 * s;
    const bool exists = unit < a.n_visible, written = exists && row < a.rows;
    if (written && a.mask != nullptr && a.mask[row * a.mask_stride + unit]) {
      const float value = load_element(a.held, a.held_element, row * a.held_stride + unit);
      if (draw.last) {
        static_cast<float*>(a.states)[row * a.n_visible + unit] = value;
      } else {
        int32_t magnitude = 0;
        uint32_t* place = draw.values + value_place(w.r + 8 * s, draw.first_unit % 32 + at);
        store_value(place, value, draw.precision[at], magnitude);
        // Not by an index, which would put them on the stack.
        if (s == 0) most[0] = larger(most[0], magnitude);
        if (s == 1) most[1] = larger(most[1], magnitude);
      }
    } else if (exists) {
      continue;
    }
    kept |= 1u << j;
  }
  return kept;
}

// Draws them, of which the thread's largest magnitudes raise `most`. Units past the layer's are not
// stored: what their words hold is multiplied by weights of zero.
RBM_DEVICE void draw_values(int32_t (&most)[2], const Chain& a, const ValueDraw& draw,
                            const WarpChains& w, const float (&sums)[1][2][4]) {
  const bool vector = a.n_visible % 4 == 0 && aligned16(a.states);
  const uint32_t kept = store_held(a, draw, most, w);
  const int unit = draw.first_unit + 4 * w.q;
  // Of the first one; the others' groups follow, up to the XOR.
  const int place = group_place(w.r, unit & 4) + (unit >> 3 & 3);
#pragma unroll
  for (int s = 0; s < 2; ++s) {
    const float4 bias4 = *reinterpret_cast<const float4*>(draw.minus_bias + 4 * w.q);
    const float4 spread4 = *reinterpret_cast<const float4*>(draw.spread + 4 * w.q);
    const float minus_bias[4] = {bias4.x, bias4.y, bias4.z, bias4.w};
    const float spread[4] = {spread4.x, spread4.y, spread4.z, spread4.w};
    float means[4], values[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) means[i] = fma(sums[0][s][i], draw.scale, -minus_bias[i]);
    draw_four_values(values, a, draw.key, static_cast<uint32_t>(unit / 4), w.chain + 8 * s,
                     w.beta[s], means, spread);
    const uint32_t kept_four = kept >> (4 * s) & 0xFu;
    if (draw.last) {
      const int64_t row = w.row0 + w.r + 8 * s;
      if (row >= a.rows) continue;
      float* states = static_cast<float*>(a.states) + row * a.n_visible + unit;
      if (vector && kept_four == 0) {
        *reinterpret_cast<float4*>(states) =
            make_float4(values[0], values[1], values[2], values[3]);
        continue;
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (!(kept_four >> i & 1u)) states[i] = values[i];
      }
      continue;
    }
    const float4 precision4 = *reinterpret_cast<const float4*>(draw.precision + 4 * w.q);
    const float precision[4] = {precision4.x, precision4.y, precision4.z, precision4.w};
    uint32_t* of_slot = draw.values + kStepValues / 2 * s;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (kept_four >> i & 1u) continue;
      store_value(of_slot + (place ^ 4 * i), values[i], precision[i], most[s]);
    }
  }
}

// The sums of a group of sixteen hidden units, all digits of the values times all of the weights'.
template <int digits> RBM_DEVICE void multiply_values(float (&x)[1][2][4], const BlockLayer& l,
                                                      const uint32_t* values, const WarpChains& w,
                                                      int group) {
  constexpr int weights = 2 * digits - 1;
  int32_t sums[weights][2][4];
#pragma unroll
  for (int j = 0; j < weights * 8; ++j) sums[j / 8][j / 4 % 2][j % 4] = 0;
  const int rows = 16 * l.groups;
  const unsigned char* planes = lane_planes(l, w, group);
#pragma unroll 1
  for (int step = 0; step < l.steps; ++step) {
    uint32_t a[digits][4];
#pragma unroll
    for (int d = 0; d < digits; ++d) {
      const uint32_t* place = values + kStepValues * step + thread_group(w, d);
      const uint4 four = *reinterpret_cast<const uint4*>(place);
      a[d][0] = four.x, a[d][1] = four.y, a[d][2] = four.z, a[d][3] = four.w;
    }
#pragma unroll
    for (int db = 0; db < digits; ++db) {
      uint32_t f[4];
      load_matrices(f, planes + 2 * (db * l.steps + step) * rows * kChunk);
      const uint32_t tiles[2][2] = {{f[0], f[1]}, {f[2], f[3]}};
#pragma unroll
      for (int da = 0; da < digits; ++da) {
        mma_s8s8(sums[da + db][0], a[da], tiles[0]);
        mma_s8s8(sums[da + db][1], a[da], tiles[1]);
      }
    }
  }
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const int s = j / 4, i = j % 4;
    int32_t parts[weights];
#pragma unroll
    for (int d = 0; d < weights; ++d) parts[d] = sums[d][i / 2][2 * s + i % 2];
    x[0][s][i] = real_sum(whole_sum(parts));
  }
}

// Stores the states of a group of sixteen hidden units, half a word.
RBM_DEVICE void store_group(uint32_t* states, const WarpChains& w, int group,
                            const uint32_t (&bits)[2][1]) {
  const uint32_t slots[4] = {bits[0][0], bits[1][0], 0, 0};
  const uint32_t half = gather_rows(slots, w.q);
  if (w.q >= 2) return;
  uint32_t* word = states + kWarpChains * (group / 2) + 2 * w.r + w.q;
  reinterpret_cast<uint16_t*>(word)[group % 2] = static_cast<uint16_t>(half);
}

// A warp computes one group of units at a time: drawing takes most of the time, so what counts is
// that all warps of a team have something to draw.
//
// A team waits before and after it turns values into digits. So `largest` is complete when it is
// read, is cleared when all have read it, and is raised again only after the next wait; the digits
// have been read by then too, and drawn values may take their place. So may what the next chains
// start from: the last half-sweep reads nothing but hidden states, which are not written before the
// next two waits.
template <int digits> __global__ void __launch_bounds__(32 * kBlockWarps, 1)
    gaussian_chain_in_block(const Chain a, const BlockModel m) {
  if (guarded_out(a.guard)) return;
  unsigned char* shared = shared_memory();
  load_layer(m.hidden, digits, a.to_hidden, a.hidden_bias);
  load_layer(m.visible, digits, a.to_visible, a.visible_bias);
  copy_async_commit();
  const float* hidden_bias = reinterpret_cast<const float*>(shared + m.hidden.bias);
  const float* visible_bias = reinterpret_cast<const float*>(shared + m.visible.bias);
  float* spread = reinterpret_cast<float*>(shared + m.spread);
  float* precision = reinterpret_cast<float*>(shared + m.precision);
  for (int i = static_cast<int>(threadIdx.x); i < 16 * m.visible.groups; i += 32 * kBlockWarps) {
    spread[i] = i < a.n_visible ? value_spread(a, i) : 0.0f;
    precision[i] = i < a.n_visible ? a.precision[i] : 0.0f;
  }

  const int warp = static_cast<int>(threadIdx.x) / 32, member = warp % m.team;
  const int teams = kBlockWarps / m.team, team = warp / m.team, first_warp = m.team * team;
  unsigned char* states = shared + m.states + m.team_bytes * static_cast<unsigned>(team);
  uint32_t* values = reinterpret_cast<uint32_t*>(states);
  uint32_t* hidden_states = reinterpret_cast<uint32_t*>(states + m.hidden_states);
  int32_t* largest = reinterpret_cast<int32_t*>(states + m.largest);
  const bool clears = member == 0 && threadIdx.x % 32 < kWarpChains;
  if (clears) largest[threadIdx.x % 32] = 0;
  copy_async_wait<0>();
  __syncthreads();

  const int64_t blocks = gridDim.x;
  for (int64_t of_team = blockIdx.x + team * blocks; kWarpChains * of_team < a.rows;
       of_team += teams * blocks) {
    const WarpChains w = warp_chains(a, kWarpChains * of_team);
    load_start_values(a, values, largest, w.row0, member, m.team);
    for (int64_t sweep = 0; sweep < a.sweeps; ++sweep) {
      const uint64_t half_sweep = a.half_sweep + static_cast<uint64_t>(2 * sweep);
      team_sync(first_warp, m.team);
      float minus_scale[2], inverse[2];
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        const float scale = scale_of(largest[w.r + 8 * s], digits);
        minus_scale[s] = -mul(scale, *a.weight_scale);
        inverse[s] = inverse_of(scale);
      }
      for (int step = member; step < m.hidden.steps; step += m.team) {
        quantize_step<digits>(values + kStepValues * step, w, inverse);
      }
      team_sync(first_warp, m.team);
      if (clears) largest[w.lane] = 0;

      for (int group = member; group < m.hidden.groups; group += m.team) {
        float x[1][2][4];
        multiply_values<digits>(x, m.hidden, values, w, group);
        const LayerDraw draw{key_of(a.seed, half_sweep),
                             {minus_scale[0], minus_scale[1]},
                             16 * group,
                             hidden_bias + 16 * group};
        uint32_t bits[2][1];
        draw_units<1>(bits, draw, w, 1, [&](int g, int s, int i) { return x[g][s][i]; });
        store_group(hidden_states, w, group, bits);
      }
      team_sync(first_warp, m.team);

      int32_t most[2] = {};
      const bool last = sweep == a.sweeps - 1;
      for (int group = member; group < m.visible.groups; group += m.team) {
        float x[1][2][4];
        multiply_states<digits, 1>(x, m.visible, hidden_states, w, group, 1);
        const ValueDraw draw{key_of(a.seed, half_sweep + 1),
                             *a.weight_scale,
                             16 * group,
                             visible_bias + 16 * group,
                             spread + 16 * group,
                             precision + 16 * group,
                             values + kStepValues * (group / 2),
                             last};
        draw_values(most, a, draw, w, x);
      }
      if (!last) tell_largest(largest, w, most);
    }
  }
}

}  // namespace

int launch_gaussian_chain(const Chain& a, const BlockModel& m, int digits, const Launch& where) {
  return launch(digits == 2 ? gaussian_chain_in_block<2> : gaussian_chain_in_block<3>, where, a, m);
}

}  // namespace rbm::cuda
