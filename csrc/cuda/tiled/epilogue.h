// From the sums of a product to states, probabilities and statistics.
//
// A warp holds 32 rows x 32 units of sums, whichever instructions made them: the thread of lane
// 4 r + q has rows r + 8 s (s = 0..3, a "slot") and units 16 g + 4 q + i (g = 0, 1; i = 0..3); see
// operand_layout.h. So a thread has whole calls of Philox, and whole words of transposed planes.
#pragma once

#include "cuda/operands/element.h"
#include "cuda/tiled/half_sweep.h"
#include "include/rbm/digit_sums.h"
#include "include/rbm/math.h"
#include "include/rbm/philox.h"

namespace rbm::cuda {

RBM_DEVICE HalfSweepKey key_of(const int64_t* seed, uint64_t half_sweep) {
  // The offset is read here and not on the host, so that a captured graph draws anew at each
  // replay.
  return half_sweep_key(static_cast<uint64_t>(seed[0]), static_cast<uint64_t>(seed[1]) + half_sweep,
                        0);
}

// The words of a chain's units 4 * quad .. 4 * quad + 3.
RBM_DEVICE void random_words(uint32_t (&words)[4], const HalfSweepKey& key, uint32_t quad,
                             uint32_t chain) {
  words[0] = quad, words[1] = chain, words[2] = key.step, words[3] = key.stream;
  philox4x32(words, key.key0, key.key1);
}

// Which of four Bernoulli units are on, from their e = exp(-x): where threshold(u, e) < 1, here
// with both sides times 2^24, which is exact and spares scaling u.
RBM_DEVICE uint32_t draw_four(const float (&e)[4], const uint32_t (&words)[4]) {
  uint32_t nibble = 0;
#pragma unroll
  for (int i = 3; i >= 0; --i) {
    const float u = to_float(shift_right_logical<8>(static_cast<int32_t>(words[i])));
    const float above = sub(threshold(u, e[i]), 16777216.0f);
    nibble = nibble << 1 | static_cast<uint32_t>(as_int(above)) >> 31;  // its sign
  }
  return nibble;
}

// p as the unsigned fixed point of the statistics.
template <int digits> RBM_DEVICE uint32_t fixed_probability(float p) {
  const float scaled = mul(p, digits == 3 ? 8388608.0f : 32768.0f);
#ifdef __CUDA_ARCH__
  return static_cast<uint32_t>(__float2int_rn(scaled));
#else
  return static_cast<uint32_t>(std::nearbyint(scaled));
#endif
}

// The OR over the four lanes of equal r of one word for each slot; lane q is left with slot q's.
RBM_DEVICE uint32_t gather_rows(const uint32_t (&slots)[4], int q) {
  const bool odd = q & 1, high = q & 2;
  uint32_t low = odd ? slots[1] : slots[0], upper = odd ? slots[3] : slots[2];
  low |= shuffle_xor(odd ? slots[0] : slots[1], 1);
  upper |= shuffle_xor(odd ? slots[2] : slots[3], 1);
  return (high ? upper : low) | shuffle_xor(high ? low : upper, 2);
}

// The same over the eight lanes of equal q, by `combine`; lane r is left with unit r / 2's.
template <class T, class Combine>
RBM_DEVICE T gather_units(const T (&units)[4], int r, const Combine& combine) {
  const bool high = r & 4, middle = r & 2;
  T low = high ? units[2] : units[0], upper = high ? units[3] : units[1];
  low = combine(low, shuffle_xor(high ? units[0] : units[2], 16));
  upper = combine(upper, shuffle_xor(high ? units[1] : units[3], 16));
  T kept = combine(middle ? upper : low, shuffle_xor(middle ? low : upper, 8));
  return combine(kept, shuffle_xor(kept, 4));
}

RBM_DEVICE bool aligned16(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

// Turns a warp's sums over rows row0 .. row0 + 31 and units unit0 .. unit0 + 31 (unit0 a multiple
// of 32) into what `a` asks for. sum(g, s, i) is the rounded sum of the thread's slot s and unit i.
template <int digits, bool real, class Sum>
RBM_DEVICE void finish_half_sweep(const HalfSweep& a, int64_t row0, int64_t unit0, const Sum& sum) {
  const int lane = static_cast<int>(threadIdx.x % 32), r = lane / 4, q = lane % 4;
  HalfSweepKey key{};
  if (a.draw != Draw::none) key = key_of(a.seed, a.half_sweep);
  const float weight_scale = *a.weight_scale;
  const bool vector = a.units % 4 == 0;

  uint32_t row_bits[4] = {};
  double softplus_sums[4] = {};
#pragma unroll
  for (int g = 0; g < 2; ++g) {
    const int64_t unit = unit0 + 16 * g + 4 * q;
    const int count = static_cast<int>(unit >= a.units      ? 0
                                       : a.units - unit < 4 ? a.units - unit
                                                            : 4);
    float bias[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) bias[i] = i < count ? a.bias[unit + i] : 0.0f;

    uint32_t planes[digits][4] = {};  // a byte for each slot
    uint32_t terms[4] = {};           // a bit for each slot
    uint32_t fixed_sums[4] = {};
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      const int64_t row = row0 + r + 8 * s;
      if (row >= a.rows || count == 0) continue;
      const float scale = real ? mul(a.value_scales[row], weight_scale) : weight_scale;
      const float beta = a.betas != nullptr ? a.betas[row] : a.beta;
      float x[4], e[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        x[i] = mul(beta, fma(sum(g, s, i), scale, bias[i]));
        e[i] = exp_neg(x[i]);
      }
      uint32_t words[4] = {};
      if (a.draw != Draw::none) {
        random_words(words, key, static_cast<uint32_t>(unit / 4),
                     a.chain_offset + static_cast<uint32_t>(row));
      }
      const int64_t at = row * a.units + unit;

      if (a.draw == Draw::bernoulli) {
        uint32_t nibble = draw_four(e, words) & ((1u << count) - 1u);
        if (a.mask != nullptr) {
          for (int i = 0; i < count; ++i) {
            float value = static_cast<float>(nibble >> i & 1u);
            if (a.mask[row * a.mask_stride + unit + i]) {
              value = load_element(a.held, a.held_element, row * a.held_stride + unit + i);
              nibble = (nibble & ~(1u << i)) | ((value != 0.0f ? 1u : 0u) << i);
            }
            if (a.states != nullptr) static_cast<float*>(a.states)[at + i] = value;
          }
        } else if (a.states != nullptr) {
          if (vector) {
            store_four_bits(a.states, a.states_element, at, nibble);
          } else {
            for (int i = 0; i < count; ++i) {
              store_bit(a.states, a.states_element, at + i, nibble >> i & 1u);
            }
          }
        }
        row_bits[s] |= nibble << (16 * g + 4 * q);
#pragma unroll
        for (int i = 0; i < 4; ++i) terms[i] |= (nibble >> i & 1u) << (8 * s + r);
      }
      if (a.draw == Draw::gaussian) {
        float z[4];
        normal_pair<float>(static_cast<int32_t>(words[0]), static_cast<int32_t>(words[1]), z[0],
                           z[1]);
        normal_pair<float>(static_cast<int32_t>(words[2]), static_cast<int32_t>(words[3]), z[2],
                           z[3]);
        // The spread at inverse temperature beta is sigma / sqrt(beta); the mean does not move.
        const float root = rbm::sqrt(a.betas != nullptr ? a.betas[row] : a.beta);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (i >= count) continue;
          const float mean = fma(sum(g, s, i), scale, bias[i]);
          const float sigma = div(exp_neg(mul(-0.5f, a.log_var[unit + i])), root);
          float value = fma(sigma, z[i], mean);
          if (a.mask != nullptr && a.mask[row * a.mask_stride + unit + i]) {
            value = load_element(a.held, a.held_element, row * a.held_stride + unit + i);
          }
          if (a.states != nullptr) static_cast<float*>(a.states)[at + i] = value;
          if (a.means != nullptr) a.means[at + i] = mean;
        }
      }
      if (a.draw != Draw::gaussian && (a.means != nullptr || a.statistics.data != nullptr)) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (i >= count) continue;
          const float p = sigmoid_of_exp(e[i]);
          // exp_neg would hide a NaN.
          if (a.means != nullptr) a.means[at + i] = x[i] == x[i] ? p : x[i];
          if (a.statistics.data == nullptr) continue;
          const uint32_t fixed = fixed_probability<digits>(p);
          fixed_sums[i] += fixed;
#pragma unroll
          for (int d = 0; d < digits; ++d) planes[d][i] |= (fixed >> (8 * d) & 0xFFu) << (8 * s);
        }
      }
      if (a.softplus != nullptr) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (i < count) softplus_sums[s] += static_cast<double>(softplus(x[i], e[i]));
        }
      }
    }

    if (a.statistics.data != nullptr) {
      // The thread's rows are word r of the step of 32 terms: bytes 4 r .. 4 r + 3.
      const int64_t chunk = (a.first_term + row0) / kStep * 2 + r / 4;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (i >= count) continue;
        const int64_t row = row_of_unit(unit + i);
#pragma unroll
        for (int d = 0; d < digits; ++d) {
          uint8_t* place = a.statistics.data + chunk_offset(a.statistics, d, chunk, row);
          reinterpret_cast<uint32_t*>(place)[r % 4] = planes[d][i];
        }
      }
      const uint32_t total =
          gather_units(fixed_sums, r, [](uint32_t x, uint32_t y) { return x + y; });
      if (r % 2 == 0 && r / 2 < count) atomic_add(a.statistics_sums + unit + r / 2, 0ull + total);
    }
    if (a.drawn_terms != nullptr) {
      const uint32_t word = gather_units(terms, r, [](uint32_t x, uint32_t y) { return x | y; });
      if (r % 2 == 0 && r / 2 < count) {
        a.drawn_terms[(unit + r / 2) * a.terms_words + a.term_word + row0 / 32] = word;
        if (a.drawn_sums != nullptr) atomic_add(a.drawn_sums + unit + r / 2, 0ull + popcount(word));
      }
    }
  }

  if (a.drawn_bits != nullptr) {
    const uint32_t word = gather_rows(row_bits, q);
    const int64_t row = row0 + r + 8 * q;
    if (row < a.rows && unit0 < a.units) {
      a.drawn_bits[row * words_of(a.units) + unit0 / 32] = word;
    }
  }
  if (a.softplus != nullptr) {
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      double total = softplus_sums[s];
      total += shuffle_xor(total, 1);
      total += shuffle_xor(total, 2);
      const int64_t row = row0 + r + 8 * s;
      if (q == s && row < a.rows && unit0 < a.units) {
        a.softplus[unit0 / 32 * a.rows + row] = total;
      }
    }
  }
}

}  // namespace rbm::cuda
