// Chains of Gaussian visible units whose weights are spread over a cluster of Hopper's blocks.
//
// Real states are large, so a block keeps those of its chains as the signed digits that wgmma
// takes, and floats live only in the registers of the lane that drew them: until the blocks have
// agreed on the chains' scales. Scales (one byte a chain), digits and hidden bits cross the
// cluster.
#include <iterator>

#include "cuda/resident/cluster.h"
#include "cuda/resident/gaussian_cluster_sm90a.h"
#include "include/rbm/fixed_point.h"

namespace rbm::cuda {
namespace {

constexpr int kMostGroups = 2;  // warpgroups of a block, with up to 255 registers a thread

// Units that a warpgroup computes at once. A visible slice cannot be larger, as its values stay in
// registers. Products of real states have a sum for each weight of the digits.
constexpr int kVisibleUnits = 96, kHiddenUnits[2] = {64, 32};  // [digits - 2]

// A step of a warp's visible states: for each digit, 16 bytes for each lane of the product.
constexpr unsigned kDigitBytes = 32 * kWarpChains;
constexpr unsigned kScaleBytes = 16 * kWarpChains;  // a byte a chain from up to 16 blocks

struct GaussianModel : ClusterModel {
  unsigned spread, precision;      // of the visible slice
  unsigned warps, warp_bytes;      // what each warp has of its sixteen chains:
  unsigned hidden_states, scales;  // from its start on, where its visible states are
};

// What the warps of all blocks that have the same sixteen chains tell one another.
struct WarpBarriers {
  uint64_t scales[2];  // the other blocks' have come, of even and of odd sweeps
  uint64_t visible;    // the other blocks' digits have come
  uint64_t hidden;     // the other blocks' words have come
};
GaussianModel gaussian_model(int n_visible, int n_hidden, int digits, int cluster,
                             int shared_bytes) {
  GaussianModel m{};
  m.spread = lay_out_layers<WarpBarriers>(m, n_visible, n_hidden, digits, cluster, kMostGroups);
  const unsigned visible_rows = static_cast<unsigned>(largest_slice(n_visible, cluster));
  m.precision = m.spread + 4 * visible_rows;
  m.warps = m.precision + 4 * visible_rows;
  // Hidden words are read one step ahead, past the last: into the scales.
  m.hidden_states = static_cast<unsigned>(digits * m.hidden.steps) * kDigitBytes;
  m.scales = m.hidden_states + 4u * kWarpChains * static_cast<unsigned>(m.visible.steps);
  m.warp_bytes = m.scales + 2 * kScaleBytes;
  const auto end = [&](int groups) {
    return m.warps + 4 * m.warp_bytes * static_cast<unsigned>(groups);
  };
  m.groups = visible_rows <= static_cast<unsigned>(kVisibleUnits) ? kMostGroups : 0;
  while (m.groups > 0 && end(m.groups) > static_cast<unsigned>(shared_bytes)) --m.groups;
  m.shared_bytes = end(m.groups);
  return m;
}

// Where a digit of a step has the sixteen bytes of the product's lane 4 r + q: word q of chains r
// and r + 8, then word q + 4 of both (byte b of word k is term 8 b + k). The XOR is there for those
// who write: eight chains' bytes are in different banks.
RBM_DEVICE unsigned fragment_place(int r, int q) {
  return static_cast<unsigned>(16 * (4 * r + (q ^ r / 2)));
}

// x = the sums of the warpgroup's 64 chains of real states for N hidden units; see multiply_states.
template <int digits, int N>
RBM_DEVICE void multiply_values(float (&x)[N / 2], const ClusterLayer& l, int slice_rows, int row,
                                const unsigned char* states, const WarpChains& w) {
  constexpr int weights = 2 * digits - 1;
  int32_t sums[weights][N / 2];
#pragma unroll
  for (int j = 0; j < weights * N / 2; ++j) sums[j / (N / 2)][j % (N / 2)] = 0;
  const uint32_t rows = static_cast<uint32_t>(slice_rows), steps = static_cast<uint32_t>(l.steps);
  const uint64_t first =
      matrix_descriptor(shared_memory() + l.planes + row * kChunk, rows * kChunk, 8 * kChunk);
  uint32_t planes = static_cast<uint32_t>(first);
  const uint64_t layout = first >> 32 << 32;
  const unsigned char* fragments = states + fragment_place(w.r, w.q);
  const auto load = [&](uint32_t (&a)[digits][4]) {
#pragma unroll
    for (int d = 0; d < digits; ++d, fragments += kDigitBytes) {
      const uint4 four = *reinterpret_cast<const uint4*>(fragments);
      a[d][0] = four.x, a[d][1] = four.y, a[d][2] = four.z, a[d][3] = four.w;
    }
  };
  const auto issue = [&](const uint32_t (&a)[digits][4]) {
    wgmma_fence();
#pragma unroll
    for (int of_a = 0; of_a < digits; ++of_a) {
#pragma unroll
      for (int of_b = 0; of_b < digits; ++of_b) {
        wgmma_registers<N, true, true>(sums[of_a + of_b], a[of_a],
                                       layout | (planes + 2 * of_b * steps * rows));
      }
    }
    wgmma_commit();
    planes += 2 * rows;
  };
  // While a step is multiplied, the fragments of the one before it are free to be loaded.
  uint32_t even[digits][4], odd[digits][4];
  for (uint32_t step = 0;; step += 2) {
    load(even);
    issue(even);
    wgmma_wait<1>();
    if (step + 1 >= steps) break;
    load(odd);
    issue(odd);
    wgmma_wait<1>();
    if (step + 2 >= steps) break;
  }
  wgmma_wait<0>();
#pragma unroll
  for (int of = 0; of < weights; ++of) wgmma_results(sums[of]);
#pragma unroll
  for (int j = 0; j < N / 2; ++j) {
    int32_t parts[weights];
#pragma unroll
    for (int of = 0; of < weights; ++of) parts[of] = sums[of][j];
    x[j] = real_sum(whole_sum(parts));
  }
}

// A warp and its part of the block.
struct ClusterWarp {
  WarpChains chains;
  Slice hidden, visible;
  unsigned char* states;  // of the visible layer, and behind them what GaussianModel says
  WarpBarriers* barriers;
  uint32_t sweep;  // of this warp so far, over all its chains
};

// What a scale is told by: the exponent of a float, 0 for a chain without values that are not zero,
// which comes before all powers of two, and 255 for NaN. So the largest of the blocks' bytes is
// that of the largest magnitude of all.
RBM_DEVICE uint32_t byte_of_scale(int32_t most, int digits) {
  return most == 0 ? 0 : static_cast<uint32_t>(as_int(scale_of(most, digits))) >> 23;
}
RBM_DEVICE float scale_of_byte(uint32_t byte) {
  if (byte == 0) return 1.0f;
  return as_float(byte == 255 ? 0x7FC00000 : static_cast<int32_t>(byte << 23));
}

// The scales of the lane's chains, from its largest magnitudes and those of all other lanes and
// blocks that have some of their units.
template <int digits> RBM_DEVICE void agree_on_scales(float (&scale)[2], const GaussianModel& m,
                                                      const ClusterWarp& c,
                                                      const int32_t (&most)[2]) {
  const WarpChains& w = c.chains;
  const int size = static_cast<int>(cluster_size()), rank = static_cast<int>(cluster_rank());
  unsigned char* bytes = c.states + m.scales + kScaleBytes * (c.sweep % 2);  // [blocks][16 chains]
  unsigned char* own = bytes + kWarpChains * rank;
#pragma unroll
  for (int s = 0; s < 2; ++s) {
    int32_t of_chain = larger(most[s], shuffle_xor(most[s], 1));
    of_chain = larger(of_chain, shuffle_xor(of_chain, 2));
    if (w.q == s) own[w.r + 8 * s] = static_cast<unsigned char>(byte_of_scale(of_chain, digits));
  }
  warp_sync();
  uint64_t* barrier = &c.barriers->scales[c.sweep % 2];
  if (w.lane < size && w.lane != rank) {
    const uint32_t target = static_cast<uint32_t>(w.lane);
    store_async16(remote_address(shared_address(own), target), *reinterpret_cast<const uint4*>(own),
                  remote_address(shared_address(barrier), target));
  }
  if (w.lane == 0) barrier_arrive_expect(barrier, static_cast<uint32_t>(kWarpChains * (size - 1)));
  barrier_wait(barrier, c.sweep / 2 & 1);
#pragma unroll
  for (int s = 0; s < 2; ++s) {
    int32_t byte = 0;
    for (int block = w.q; block < size; block += 4) {
      byte = larger(byte, bytes[kWarpChains * block + w.r + 8 * s]);
    }
    byte = larger(byte, shuffle_xor(byte, 1));
    byte = larger(byte, shuffle_xor(byte, 2));
    scale[s] = scale_of_byte(static_cast<uint32_t>(byte));
  }
}

// Sends the digits of the block's units to the other blocks, and announces theirs.
template <int digits>
RBM_DEVICE void exchange_digits(const GaussianModel& m, const ClusterWarp& c) {
  constexpr int kStepBytes = digits * static_cast<int>(kDigitBytes);
  const uint32_t size = cluster_size(), rank = cluster_rank();
  const int own = c.visible.last_word - c.visible.first_word, lane = c.chains.lane;
  const unsigned char* first = c.states + kStepBytes * c.visible.first_word;
  const uint32_t address = shared_address(first), barrier = shared_address(&c.barriers->visible);
  for (int at = 16 * lane; at < kStepBytes * own; at += 16 * 32) {
    const uint4 chunk = *reinterpret_cast<const uint4*>(first + at);
    for (uint32_t i = 1; i < size; ++i) {
      const uint32_t target = rank + i < size ? rank + i : rank + i - size;
      store_async16(remote_address(address + static_cast<uint32_t>(at), target), chunk,
                    remote_address(barrier, target));
    }
  }
  if (lane == 0) {
    barrier_arrive_expect(&c.barriers->visible,
                          static_cast<uint32_t>(kStepBytes * (m.hidden.steps - own)));
  }
}

// Which of four units take a given value: the clamped ones, or all at a chain's start.
RBM_DEVICE uint32_t taken_of_four(const Chain& a, bool start, int64_t row, int unit) {
  if (row >= a.rows) return 0;
  const int count = a.n_visible - unit;
  const uint32_t exist = count >= 4 ? 0xFu : count > 0 ? (1u << count) - 1u : 0u;
  if (start) return exist;
  uint32_t taken = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (exist >> i & 1u) taken |= (a.mask[row * a.mask_stride + unit + i] ? 1u : 0u) << i;
  }
  return taken;
}

RBM_DEVICE void take_four(float (&values)[4], const Chain& a, bool start, int64_t row, int unit,
                          uint32_t taken) {
  const void* data = start ? a.start_values.data : a.held;
  const int64_t at = row * (start ? a.start_values.row_stride : a.held_stride) + unit;
  with_element(start ? a.start_values.element : a.held_element, [&](auto typed) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (taken >> i & 1u) values[i] = load_element(data, decltype(typed)::value, at + i);
    }
  });
}

RBM_DEVICE void store_four(const Chain& a, const float (&values)[4], int64_t row, int unit,
                           bool vector) {
  if (row >= a.rows) return;
  float* states = static_cast<float*>(a.states) + row * a.n_visible + unit;
  if (vector && unit < a.n_visible) {
    *reinterpret_cast<float4*>(states) = make_float4(values[0], values[1], values[2], values[3]);
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (unit + i < a.n_visible) states[i] = values[i];
  }
}

// The visible states that sweep t starts from, or after all sweeps the results: the block's units,
// at most N, are drawn, or loaded where t is 0. Then the scales of the lane's chains, and all units
// as digits in the warp's states.
template <int digits, int N> RBM_DEVICE void visible_units(float (&scale)[2], const Chain& a,
                                                           const GaussianModel& m,
                                                           const ClusterWarp& c, int64_t t) {
  const WarpChains& w = c.chains;
  const bool start = t == 0, last = t == a.sweeps;
  const int first_unit = 32 * c.visible.first_word, count = c.visible.rows / 16;
  const HalfSweepKey key = key_of(a.seed, a.half_sweep + static_cast<uint64_t>(2 * t - 1));
  const float weight_scale = *a.weight_scale;
  const bool vector = a.n_visible % 4 == 0 && aligned16(a.states);
  float x[N / 2];
  if (start) {
#pragma unroll
    for (int j = 0; j < N / 2; ++j) x[j] = 0.0f;
  } else if (count > 0) {
    multiply_states<digits, N>(x, m.visible, c.visible.rows, 0,
                               reinterpret_cast<const uint32_t*>(c.states + m.hidden_states), w);
  }

  int32_t most[2] = {};
#pragma unroll
  for (int g = 0; g < N / 16; ++g) {
    if (g >= count) break;
    const int at = 16 * g + 4 * w.q, unit = first_unit + at;
    const auto vector_of = [&](unsigned offset) {
      return *reinterpret_cast<const float4*>(shared_memory() + offset + 4 * at);
    };
    float values[2][4] = {};
    if (!start) {
      const float4 bias4 = vector_of(m.visible.bias), spread4 = vector_of(m.spread);
      const float minus_bias[4] = {bias4.x, bias4.y, bias4.z, bias4.w};
      const float spread[4] = {spread4.x, spread4.y, spread4.z, spread4.w};
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        float means[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          means[i] = fma(x[4 * (2 * g + i / 2) + 2 * s + i % 2], weight_scale, -minus_bias[i]);
        }
        draw_four_values(values[s], a, key, static_cast<uint32_t>(unit / 4), w.chain + 8 * s,
                         w.beta[s], means, spread);
      }
    }
    const float4 precision4 = vector_of(m.precision);
    const float precision[4] = {precision4.x, precision4.y, precision4.z, precision4.w};
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      const int64_t row = w.row0 + w.r + 8 * s;
      if (start || a.mask != nullptr) {
        const uint32_t taken = taken_of_four(a, start, row, unit);
        if (taken != 0) take_four(values[s], a, start, row, unit, taken);
      }
      if (last) {
        store_four(a, values[s], row, unit, vector);
        continue;
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float scaled = mul(values[s][i], precision[i]);
        most[s] = larger(most[s], magnitude_bits(scaled));
        x[4 * (2 * g + i / 2) + 2 * s + i % 2] = scaled;
      }
    }
  }
  if (last) return;

  agree_on_scales<digits>(scale, m, c, most);
  const float inverse[2] = {inverse_of(scale[0]), inverse_of(scale[1])};
  // Unit 16 g + 4 q + i is term 16 (g % 2) + 4 q + i of its step, and so in word 4 (q % 2) + i.
  const unsigned place = fragment_place(w.r, 0) + 8 * (w.q & 1) + (w.q >> 1);
  unsigned char* steps = c.states + digits * kDigitBytes * c.visible.first_word;
#pragma unroll
  for (int g = 0; g < N / 16; ++g) {
    if (g >= count) break;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const int s = j / 4, i = j % 4;
      const float scaled = x[4 * (2 * g + i / 2) + 2 * s + i % 2];
      const uint32_t packed = signed_digits(quantize(scaled, inverse[s]));
      unsigned char* bytes = steps + (place ^ 16u * i) + 4 * s + 2 * (g % 2);
#pragma unroll
      for (int d = 0; d < digits; ++d) {
        bytes[kDigitBytes * (digits * (g / 2) + d)] = static_cast<unsigned char>(packed >> 8 * d);
      }
    }
  }
  warp_sync();
  exchange_digits<digits>(m, c);
  barrier_wait(&c.barriers->visible, c.sweep & 1);
}

template <int digits> RBM_DEVICE void visible_slice(float (&scale)[2], const Chain& a,
                                                    const GaussianModel& m, const ClusterWarp& c,
                                                    int64_t t) {
  if (c.visible.rows <= 32) {
    visible_units<digits, 32>(scale, a, m, c, t);
  } else if (c.visible.rows <= 64) {
    visible_units<digits, 64>(scale, a, m, c, t);
  } else {
    visible_units<digits, kVisibleUnits>(scale, a, m, c, t);
  }
}

// Draws hidden units row .. row + N - 1 of the slice in sweep t.
template <int digits, int N> RBM_DEVICE void hidden_units(const Chain& a, const GaussianModel& m,
                                                          const ClusterWarp& c, int64_t t,
                                                          const float (&scale)[2], int row) {
  const WarpChains& w = c.chains;
  const int unit = 32 * c.hidden.first_word + row;
  const float weight_scale = *a.weight_scale;
  const LayerDraw draw{key_of(a.seed, a.half_sweep + static_cast<uint64_t>(2 * t)),
                       {-mul(scale[0], weight_scale), -mul(scale[1], weight_scale)},
                       unit,
                       reinterpret_cast<const float*>(shared_memory() + m.hidden.bias) + row};
  float x[N / 2];
  multiply_values<digits, N>(x, m.hidden, c.hidden.rows, row, c.states, w);
  uint32_t bits[2][(N + 31) / 32];
  draw_units<N / 16>(bits, draw, w, (c.hidden.rows - row) / 16,
                     [&](int g, int s, int i) { return x[4 * (2 * g + i / 2) + 2 * s + i % 2]; });
  store_states(a, reinterpret_cast<uint32_t*>(c.states + m.hidden_states), false, w, unit / 32,
               c.hidden.last_word, bits);
}

template <int digits> RBM_DEVICE void hidden_slice(const Chain& a, const GaussianModel& m,
                                                   const ClusterWarp& c, int64_t t,
                                                   const float (&scale)[2]) {
  constexpr int kMost = kHiddenUnits[digits - 2];
  for (int row = 0; row < c.hidden.rows; row += kMost) {
    if (kMost == 32 || c.hidden.rows - row <= 32) {
      hidden_units<digits, 32>(a, m, c, t, scale, row);
    } else {
      hidden_units<digits, kMost>(a, m, c, t, scale, row);
    }
  }
  warp_sync();
  exchange(reinterpret_cast<const uint32_t*>(c.states + m.hidden_states), c.hidden,
           state_words(m.hidden.units), &c.barriers->hidden, c.chains.lane);
  barrier_wait(&c.barriers->hidden, c.sweep & 1);
}

// Nothing is overwritten before it has been read, because every block sends its bytes of the scales
// in every sweep, whether or not it has units of a layer: whoever has waited for the scales of
// sweep n knows that all blocks have sent theirs, and so are done with what came before.
//
// Digits and hidden words. They are written, by this block or another, after that block's wait for
// the scales of n. All blocks have then read the hidden words of n - 1, to draw the visible states
// of n or the results, and before that the digits of n - 1. Scales, which have two buffers. Those
// of n are written where those of n - 2 were, after the wait for the scales of n - 1: all blocks
// had read those of n - 2 when they sent the ones of n - 1.
//
// Nor does anything arrive at a barrier for a phase before the last one has ended. What is sent to
// `visible` or `hidden` of a block for n comes after the wait for the scales of n, which that block
// sent after its wait for n - 1 at either. What is sent to `scales` for n comes after the wait for
// those of n - 1, which that block sent after it had waited for those of n - 2, at the same
// barrier. And no phase ends while a warp still waits for the one before, as it has its own part in
// each.
//
// Sweeps are counted on from one group of chains to the next, with nothing sent between them.
template <int digits> __global__ void __launch_bounds__(kMostGroups* kGroupThreads, 1)
    gaussian_chain_in_cluster(const Chain a, const GaussianModel m) {
  if (guarded_out(a.guard)) return;
  unsigned char* shared = shared_memory();
  const ClusterThread c(m);
  WarpBarriers* barriers = warp_barriers<WarpBarriers>(c.warp);
  c.start_loading(a, m, digits, [&] {
    for (uint64_t* barrier :
         {&barriers->scales[0], &barriers->scales[1], &barriers->visible, &barriers->hidden}) {
      barrier_init(barrier, 1);
    }
  });
  for (int i = static_cast<int>(threadIdx.x); i < c.visible.rows;
       i += static_cast<int>(blockDim.x)) {
    const int unit = 32 * c.visible.first_word + i;
    const bool exists = unit < a.n_visible;
    reinterpret_cast<float*>(shared + m.spread)[i] = exists ? value_spread(a, unit) : 0.0f;
    reinterpret_cast<float*>(shared + m.precision)[i] = exists ? a.precision[unit] : 0.0f;
  }
  c.finish_loading();

  uint32_t sweep = 0;
  c.for_each_chains(a.rows, m, [&](int64_t row0) {
    const WarpChains chains = warp_chains(a, row0);
    unsigned char* states = shared + m.warps + m.warp_bytes * static_cast<unsigned>(c.warp);
    for (int64_t t = 0;; ++t, ++sweep) {
      const ClusterWarp warp{chains, c.hidden, c.visible, states, barriers, sweep};
      float scale[2];
      visible_slice<digits>(scale, a, m, warp, t);
      if (t == a.sweeps) break;
      hidden_slice<digits>(a, m, warp, t, scale);
    }
  });
}

}  // namespace

bool gaussian_chain_fits(int n_visible, int n_hidden, int digits, int cluster, int shared_bytes) {
  return gaussian_model(n_visible, n_hidden, digits, cluster, shared_bytes).groups > 0;
}

int gaussian_chain_clusters(int digits, int cluster, int shared_bytes, int& clusters) {
  constexpr int kThreads = kMostGroups * kGroupThreads;
  return digits == 2 ? count_clusters<gaussian_chain_in_cluster<2>>(kThreads, cluster, shared_bytes,
                                                                    clusters)
                     : count_clusters<gaussian_chain_in_cluster<3>>(kThreads, cluster, shared_bytes,
                                                                    clusters);
}

int gaussian_chain_sm90a(const Chain& a, int digits, int cluster, int shared_bytes,
                         cudaStream_t stream) {
  const GaussianModel m = gaussian_model(a.n_visible, a.n_hidden, digits, cluster, shared_bytes);
  if (m.groups == 0) return cudaErrorInvalidValue;
  constexpr int kThreads = kMostGroups * kGroupThreads;
  return digits == 2 ? launch_clusters<gaussian_chain_in_cluster<2>>(a, m, kThreads, cluster,
                                                                     shared_bytes, stream)
                     : launch_clusters<gaussian_chain_in_cluster<3>>(a, m, kThreads, cluster,
                                                                     shared_bytes, stream);
}

}  // namespace rbm::cuda
