// The CPU kernels, compiled once per instruction set: the products, and what is done with each
// tile of 16 units of a product before it leaves the cache.
#include "cpu/kernels.h"

// clang-format off: the vectors come first, everything else is written in their terms.
#if defined(RBM_ISA_AVX512)
#include "cpu/simd_avx512.h"
#define RBM_TABLE kAvx512Kernels
#define RBM_NAME "avx512"
#elif defined(RBM_ISA_AMX)
#include "cpu/simd_avx512.h"
#define RBM_TABLE kAmxKernels
#define RBM_NAME "amx"
#elif defined(RBM_ISA_AMX_EMULATED)
#include "cpu/simd_avx512.h"
#define RBM_TABLE kAmxEmulatedKernels
#define RBM_NAME "amx_emulated"
#elif defined(RBM_ISA_AVX2)
#include "cpu/simd_avx2.h"
#define RBM_TABLE kAvx2Kernels
#define RBM_NAME "avx2"
#else
#include "cpu/simd_plain.h"
#define RBM_TABLE kPlainKernels
#define RBM_NAME "plain"
#endif

#if defined(RBM_ISA_AMX) || defined(RBM_ISA_AMX_EMULATED)
#include "cpu/amx.h"
#else
#include "cpu/lookup.h"
#endif
#include "cpu/real.h"
// clang-format on

#include <cstdlib>

namespace rbm::cpu {
namespace {

// What a thread needs while it works on a tile.
struct Scratch {
  BinaryScratch binary;
  RealScratch real;
  alignas(64) int32_t sums[kPassRows * kTile];   // [rows, 16] exact sums that int32 holds
  alignas(64) double totals[kPassRows * kTile];  // [rows, 16] those that it does not
};

Scratch& scratch() {
  struct Owner {
    Scratch* mine = static_cast<Scratch*>(std::aligned_alloc(64, sizeof(Scratch)));
    ~Owner() { std::free(mine); }
  };
  static thread_local Owner owner;
  return *owner.mine;
}

double sum_lanes(F16 x) {
  D8 low, high;
  widen(x, low, high);
  alignas(64) double lane[8];
  store(lane, add(low, high));
  return ((lane[0] + lane[4]) + (lane[2] + lane[6])) + ((lane[1] + lane[5]) + (lane[3] + lane[7]));
}

uint32_t load_bits(const uint8_t* bits, int64_t tile) {
  return static_cast<uint32_t>(bits[2 * tile]) | static_cast<uint32_t>(bits[2 * tile + 1]) << 8;
}

template <bool random> void finish_rows(const HalfSweep& h, int64_t tile, int64_t begin,
                                        int64_t end, const Scratch& s, bool totals) {
  const int64_t col = tile * kTile;
  const int64_t N = h.weight.cols;
  const int n = static_cast<int>(N - col < kTile ? N - col : kTile);
  const uint32_t valid = (1u << n) - 1u;
  const F16 bias = load(h.bias + col, n), one(1.0f), zero(0.0f);
  const F16 fixed_one(h.fixed_one);
  const F16 sigma = h.sigma ? load(h.sigma + col, n) : zero;
  I16 words[2];
  for (int64_t m = begin; m < end; ++m) {
    const int64_t i = m - begin;
    F16 total;
    if (totals) {
      total = narrow(load(s.totals + i * kTile), load(s.totals + i * kTile + 8));
    } else {
      total = to_float(load(s.sums + i * kTile));
    }
    if (h.sums) {
      for (int lane = 0; lane < n; ++lane)
        h.sums[m * N + col + lane] = totals ? s.totals[i * kTile + lane] : s.sums[i * kTile + lane];
    }
    const float beta = h.beta[m * h.beta_stride];
    const float scale = h.given.row_scale ? h.given.row_scale[m] * h.scale : h.scale;
    F16 x = fma(total, F16(scale), bias);
    if (!h.sigma) x = mul(F16(beta), x);

    if (random && i % 2 == 0) {
      const uint32_t chain = h.chain_offset + static_cast<uint32_t>(m);
      random_words(h.key, static_cast<uint32_t>(col / 4), chain, chain + 1, words);
    }
    const uint32_t held = h.held ? load_bits(h.held + m * h.held_stride, tile) : 0;
    if (h.sigma) {
      if (h.means) store(h.means + m * N + col, x, n);
      if (random) {
        F16 z0, z1;
        normal_pair<F16>(even_lanes(words[i % 2]), odd_lanes(words[i % 2]), z0, z1);
        const F16 spread = div(sigma, sqrt(F16(beta)));
        F16 state = fma(spread, interleave(z0, z1), x);
        if (held)
          state = select(held, load(h.held_states + m * h.held_states_stride + col, n), state);
        store(h.states + m * N + col, state, n);
      }
      continue;
    }
    const F16 e = exp_neg(x);
    if (random) {
      const F16 u = uniform<F16>(words[i % 2]);
      uint32_t on = less(threshold(u, e), one) & valid;
      if (held) on = (on & ~held) | (load_bits(h.held_bits + m * h.held_bits_stride, tile) & held);
      if (h.bits) {
        uint8_t* p = h.bits + m * h.bits_stride + 2 * tile;
        p[0] = static_cast<uint8_t>(on);
        p[1] = static_cast<uint8_t>(on >> 8);
      }
      if (h.states) store(h.states + m * N + col, select(on, one, zero), n);
      if (h.bytes) {
        uint8_t* p = h.bytes + m * N + col;
        if (n == kTile) {
          store_bytes(p, on);
        } else {
          for (int lane = 0; lane < n; ++lane) p[lane] = on >> lane & 1;
        }
      }
    }
    if (h.means || h.fixed) {
      const F16 p = sigmoid_of_exp(e);
      if (h.means) store(h.means + m * N + col, p, n);
      if (h.fixed)
        store(h.fixed + m * h.fixed_stride + col, to_int(mul(select(valid, p, zero), fixed_one)));
    }
    if (h.softplus)
      h.softplus[tile * h.given.rows + m] = sum_lanes(select(valid, softplus(x, e), zero));
  }
}

void half_sweep(const HalfSweep& h, int64_t tile, int64_t row_begin, int64_t row_end) {
  Scratch& s = scratch();
  const int64_t col = tile * kTile;
  const int64_t left = h.weight.cols - col;
  const WeightRows rows{h.weight, F16(h.inverse_scale), col,
                        static_cast<int>(left < kTile ? left : kTile)};
  const bool random = h.bits || h.states || h.bytes;
  const bool real = h.given.fixed != nullptr;
  const bool totals = real || h.given.K > (h.wide ? kSafeRows : kSafeNarrowRows);
  for (int64_t begin = row_begin; begin < row_end; begin += kPassRows) {
    const int64_t end = begin + kPassRows < row_end ? begin + kPassRows : row_end;
    if (totals) clear(s.totals, end - begin);
    if (real) {
      real_product(h.given, rows, begin, end, s.real, s.totals, 1.0);
    } else {
      binary_product(h.given, rows, begin, end, s.binary, s.sums, totals ? s.totals : nullptr, 1.0);
    }
    if (random) {
      finish_rows<true>(h, tile, begin, end, s, totals);
    } else {
      finish_rows<false>(h, tile, begin, end, s, totals);
    }
  }
}

void gradient(const Gradient& g, int64_t tile, int64_t row_begin, int64_t row_end) {
  Scratch& s = scratch();
  const int64_t col = tile * kTile;
  const int n = static_cast<int>(g.n_hidden - col < kTile ? g.n_hidden - col : kTile);
  for (int64_t begin = row_begin; begin < row_end; begin += kPassRows) {
    const int64_t end = begin + kPassRows < row_end ? begin + kPassRows : row_end;
    clear(s.totals, end - begin);
    for (const Phase& phase : g.phase) {
      const HiddenRows rows{phase.hidden, phase.hidden_stride, col};
      if (phase.visible.fixed) {
        real_product(phase.visible, rows, begin, end, s.real, s.totals, phase.weight);
      } else {
        binary_product(phase.visible, rows, begin, end, s.binary, s.sums, s.totals, phase.weight);
      }
    }
    for (int64_t m = begin; m < end; ++m) {
      const double* total = s.totals + (m - begin) * kTile;
      const bool is_bias = m == g.n_visible;  // the row of ones
      F16 value = mul(narrow(load(total), load(total + 8)), F16(is_bias ? g.bias_unit : g.unit));
      float* out = is_bias ? g.bias + col : g.weight + m * g.weight_stride + col;
      if (g.accumulate) value = add(value, load(out, n));
      store(out, value, n);
    }
  }
}

uint32_t largest(const float* values, int64_t n) {
  I16 most(0);
  const I16 magnitude(0x7fffffff);
  int64_t i = 0;
  for (; i + kTile <= n; i += kTile) most = max(most, bit_and(as_int(load(values + i)), magnitude));
  if (i < n)
    most = max(most, bit_and(as_int(load(values + i, static_cast<int>(n - i))), magnitude));
  alignas(64) int32_t lane[kTile];
  store(lane, most);
  int32_t result = 0;
  for (int32_t x : lane) result = x > result ? x : result;
  return static_cast<uint32_t>(result);
}

void put_bits(uint8_t* bits, int64_t i, uint32_t on) {
  bits[i / 8] = static_cast<uint8_t>(on);
  bits[i / 8 + 1] = static_cast<uint8_t>(on >> 8);
}

bool pack_floats(const float* row, int64_t n, uint8_t* bits) {
  bool binary = true;
  for (int64_t i = 0; i < n; i += kTile) {
    const int count = static_cast<int>(n - i < kTile ? n - i : kTile);
    const F16 x = count == kTile ? load(row + i) : load(row + i, count);
    const uint32_t on = equal(x, F16(1.0f));
    binary = binary && (on | equal(x, F16(0.0f))) == 0xFFFFu;
    put_bits(bits, i, on);
  }
  return binary;
}

bool pack_bytes(const uint8_t* row, int64_t n, uint8_t* bits) {
  bool binary = true;
  int64_t i = 0;
  for (; i + kTile <= n; i += kTile) put_bits(bits, i, load_bytes(row + i, binary));
  if (i < n) {
    uint8_t rest[kTile] = {};
    for (int64_t j = i; j < n; ++j) rest[j - i] = row[j];
    put_bits(bits, i, load_bytes(rest, binary));
  }
  return binary;
}

void group_offsets(const uint8_t* bits, int64_t n_groups, int group, uint16_t* out) {
  for (int64_t g = 0; g < n_groups; g += 4) {
    const int64_t position = g * group;
    uint64_t word;
    std::memcpy(&word, bits + position / 8, 8);
    const uint64_t four = spread4(word >> (position % 8), group);
    if (g + 4 <= n_groups) {
      std::memcpy(out + g, &four, 8);
    } else {
      std::memcpy(out + g, &four, 2 * static_cast<size_t>(n_groups - g));
    }
  }
}

void expand_bits(const uint8_t* bits, int64_t n, uint8_t* bytes) {
  for (int64_t i = 0; i < n; i += kTile) store_bytes(bytes + i, load_bits(bits, i / kTile));
}

void fix(const float* values, int64_t n, float inverse_scale, float* out) {
  for (int64_t i = 0; i < n; i += kTile) {
    const int count = static_cast<int>(n - i < kTile ? n - i : kTile);
    store(out + i, to_float(to_int(mul(load(values + i, count), F16(inverse_scale)))), count);
  }
}

void exp_neg_all(const float* x, int64_t n, float* out) {
  for (int64_t i = 0; i < n; i += kTile) {
    const int count = static_cast<int>(n - i < kTile ? n - i : kTile);
    store(out + i, exp_neg(load(x + i, count)), count);
  }
}

}  // namespace

const Kernels RBM_TABLE = {RBM_NAME,   kBinaryAsBytes, largest,     pack_floats,
                           pack_bytes, group_offsets,  expand_bits, fix,
                           half_sweep, gradient,       exp_neg_all};

}  // namespace rbm::cpu
