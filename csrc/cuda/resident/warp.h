// What the resident chains' kernels share: a warp and the sixteen chains that it runs.
//
// Lane 4 r + q has chains r and r + 8 (slots s = 0, 1) and, in each group g of sixteen units, units
// 16 g + 4 q + i. States are bits in shared memory: [words of 32 units][16 chains], chain r + 8 s
// at 2 r + s, so that a thread reads the words of both its chains at once and without bank
// conflicts.
#pragma once

#include "cuda/resident/chain.h"
#include "cuda/tiled/epilogue.h"

namespace rbm::cuda {

constexpr int kWarpChains = 16;

RBM_HD int groups_of(int units) { return (units + 15) / 16; }
RBM_HD int state_words(int units) { return (units + 31) / 32; }
RBM_HD int state_place(int chain) { return 2 * (chain & 7) + (chain >> 3); }

// The chains of a warp, from global row `row0` on. Those past the last are run, but not written.
struct WarpChains {
  int lane, r, q;
  int64_t row0;
  uint32_t chain;  // of slot 0, as Philox counts them
  float beta[2];
};

RBM_DEVICE WarpChains warp_chains(const Chain& a, int64_t row0) {
  const int lane = static_cast<int>(threadIdx.x) % 32, r = lane / 4;
  WarpChains w{lane, r, lane % 4, row0, a.chain_offset + static_cast<uint32_t>(row0 + r), {}};
#pragma unroll
  for (int s = 0; s < 2; ++s) {
    const int64_t row = row0 + r + 8 * s;
    w.beta[s] = a.betas != nullptr && row < a.rows ? a.betas[row] : a.beta;
  }
  return w;
}

// Reads the chains' start, the warp's share of it: blocks of four words `first`, first + step, ...
RBM_DEVICE void load_start(const Chain& a, uint32_t* states, int64_t row0, int first, int step) {
  const int lane = static_cast<int>(threadIdx.x) % 32, chain = lane % kWarpChains;
  const int words = state_words(a.n_visible);
  const int64_t row = row0 + chain;
  for (int block = first + lane / kWarpChains * step; 4 * block < words; block += 2 * step) {
    uint4 four{};
    if (row < a.rows) {
      const uint32_t* source = a.start + row * words_of(a.n_visible) + 4 * block;
      four = *reinterpret_cast<const uint4*>(source);
    }
    const uint32_t of[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int word = 4 * block + i;
      if (word < words) states[kWarpChains * word + state_place(chain)] = of[i];
    }
  }
}

// A step's word of 32 states of both chains as the thread's fragment of the left operand.
RBM_DEVICE void unpack_states(uint32_t (&a)[4], uint2 words, int q) {
  const uint32_t low = words.x >> q, high = words.y >> q;
  a[0] = low & 0x01010101u;
  a[1] = high & 0x01010101u;
  a[2] = low >> 4 & 0x01010101u;
  a[3] = high >> 4 & 0x01010101u;
}

// What the draws of a half-sweep need to know. Scale and bias are negated: the draws want -x.
struct LayerDraw {
  HalfSweepKey key;
  float minus_scale[2];     // of both slots' sums
  int first_unit;           // of the biases and of the sums, a multiple of 16
  const float* minus_bias;  // in shared memory, readable up to a whole group of 16
};

// Draws `count` groups of sixteen units, at most `groups`: bits[s][w] gets the thread's nibbles of
// slot s in word w from the first unit on. sum(g, s, i) is the rounded sum of a unit.
template <int groups, class Sum>
RBM_DEVICE void draw_units(uint32_t (&bits)[2][(groups + 1) / 2], const LayerDraw& draw,
                           const WarpChains& w, int count, const Sum& sum) {
#pragma unroll
  for (int word = 0; word < (groups + 1) / 2; ++word) bits[0][word] = bits[1][word] = 0;
#pragma unroll
  for (int g = 0; g < groups; ++g) {
    if (g >= count) break;
    const float4 four = *reinterpret_cast<const float4*>(draw.minus_bias + 16 * g + 4 * w.q);
    const float minus_bias[4] = {four.x, four.y, four.z, four.w};
    const uint32_t quad = static_cast<uint32_t>(draw.first_unit / 4 + 4 * g + w.q);
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      float e[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float minus_x = mul(w.beta[s], fma(sum(g, s, i), draw.minus_scale[s], minus_bias[i]));
        e[i] = exp_clamped(minus_x);
      }
      uint32_t words[4];
      random_words(words, draw.key, quad, w.chain + 8 * s);
      bits[s][g / 2] |= draw_four(e, words) << (16 * (g % 2) + 4 * w.q);
    }
  }
}

// Puts the clamped units' values into a word of drawn visible states.
RBM_DEVICE uint32_t keep_held(const Chain& a, int64_t row, int word, uint32_t drawn) {
#pragma unroll 1
  for (int i = 0; i < 32 && 32 * word + i < a.n_visible; ++i) {
    const int64_t unit = 32 * word + i;
    if (!a.mask[row * a.mask_stride + unit]) continue;
    const bool on = load_element(a.held, a.held_element, row * a.held_stride + unit) != 0.0f;
    drawn = (drawn & ~(1u << i)) | (on ? 1u : 0u) << i;
  }
  return drawn;
}

// Stores what draw_units drew as words `first_word` .. of the layer, up to `last_word`.
template <int words> RBM_DEVICE void store_states(const Chain& a, uint32_t* states, bool visible,
                                                  const WarpChains& w, int first_word,
                                                  int last_word, const uint32_t (&bits)[2][words]) {
#pragma unroll
  for (int pair = 0; pair < words; pair += 2) {
    const int next = pair + 1 < words ? pair + 1 : pair;
    const uint32_t items[4] = {bits[0][pair], bits[1][pair], bits[0][next], bits[1][next]};
    uint32_t states_of_word = gather_rows(items, w.q);
    const int s = w.q & 1, word = first_word + pair + (w.q >> 1);
    if (word >= last_word || word >= first_word + words) continue;
    const int64_t row = w.row0 + w.r + 8 * s;
    if (visible && a.mask != nullptr && row < a.rows) {
      states_of_word = keep_held(a, row, word, states_of_word);
    }
    states[kWarpChains * word + 2 * w.r + s] = states_of_word;
  }
}

// Writes what was asked for of the last visible states: words first .. last - 1 of the chains.
RBM_DEVICE void write_results(const Chain& a, const uint32_t* states, const WarpChains& w,
                              int first, int last) {
  const int64_t row = w.row0 + w.lane % kWarpChains;
  const bool vector = a.n_visible % 4 == 0 && aligned16(a.states);
#pragma unroll 1
  for (int word = first; word < last; ++word) {
    const int unit0 = 32 * word, count = a.n_visible - unit0;
    uint32_t own = 0;  // of one chain in lanes 0 to 15, and again in 16 to 31
    if (row < a.rows) {
      own = states[kWarpChains * word + state_place(w.lane % kWarpChains)];
      if (count < 32) own &= (1u << count) - 1u;
      if (a.visible_bits != nullptr && w.lane < kWarpChains) {
        a.visible_bits[row * words_of(a.n_visible) + word] = own;
      }
    }
    if (a.visible_terms != nullptr || a.visible_sums != nullptr) {
      uint32_t column = 0;
#pragma unroll
      for (int chain = 0; chain < kWarpChains; ++chain) {
        column |= (shuffle(own, chain) >> w.lane & 1u) << chain;
      }
      const int64_t unit = unit0 + w.lane;
      if (w.lane < count && a.visible_terms != nullptr) {
        // Sixteen chains are half a word, rows of a multiple of 32 in its lower half.
        uint16_t* terms = reinterpret_cast<uint16_t*>(a.visible_terms);
        const int64_t half = 2 * (unit * a.terms_words + a.term_word) + w.row0 / kWarpChains;
        terms[half] = static_cast<uint16_t>(column);
      }
      if (w.lane < count && a.visible_sums != nullptr && column != 0) {
        atomic_add(a.visible_sums + unit, 0ull + popcount(column));
      }
    }
    if (a.states != nullptr) {
#pragma unroll
      for (int chain0 = 0; chain0 < kWarpChains; chain0 += 4) {
        const int chain = chain0 + w.lane / 8, quad = w.lane % 8;
        const uint32_t nibble = shuffle(own, chain) >> (4 * quad) & 0xFu;
        const int64_t at = (w.row0 + chain) * a.n_visible + unit0 + 4 * quad;
        if (w.row0 + chain >= a.rows || 4 * quad >= count) continue;
        if (vector) {
          store_four_bits(a.states, a.states_element, at, nibble);
        } else {
          for (int i = 0; i < 4 && 4 * quad + i < count; ++i) {
            store_bit(a.states, a.states_element, at + i, nibble >> i & 1u);
          }
        }
      }
    }
  }
}

RBM_DEVICE int32_t larger(int32_t x, int32_t y) { return x > y ? x : y; }

// The standard deviation of a Gaussian unit, or the part of it that a row's own beta leaves alone.
RBM_DEVICE float value_spread(const Chain& a, int unit) {
  const float sigma = exp_neg(mul(-0.5f, a.log_var[unit]));
  return a.betas == nullptr ? div(sigma, rbm::sqrt(a.beta)) : sigma;
}

// Draws Gaussian units 4 quad .. 4 quad + 3 of a chain. spread: what value_spread gives.
RBM_DEVICE void draw_four_values(float (&values)[4], const Chain& a, const HalfSweepKey& key,
                                 uint32_t quad, uint32_t chain, float beta, const float (&means)[4],
                                 const float (&spread)[4]) {
  uint32_t words[4];
  random_words(words, key, quad, chain);
  float z[4];
  normal_pair<float>(static_cast<int32_t>(words[0]), static_cast<int32_t>(words[1]), z[0], z[1]);
  normal_pair<float>(static_cast<int32_t>(words[2]), static_cast<int32_t>(words[3]), z[2], z[3]);
  const float root = a.betas == nullptr ? 1.0f : rbm::sqrt(beta);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float sigma = a.betas == nullptr ? spread[i] : div(spread[i], root);
    values[i] = fma(sigma, z[i], means[i]);
  }
}

}  // namespace rbm::cuda
