// The CPU kernels, compiled once per instruction set.
//
// Nearly every product in an RBM has a binary operand, so it is a sum of chosen rows. The rows are
// taken in groups of six: a table holds the 64 sums that a group can give, and each chain adds the
// entry that its six states select ("four Russians"; Arlazarov et al. 1970). One addition of 16
// int32 thereby does the work of 96 multiply-adds, which on processors without matrix units beats
// int8 dot products by two to three, and gives the same exact integers.
#include "kernels.h"

#if defined(RBM_ISA_AVX512)
#include "simd_avx512.h"
#define RBM_TABLE kAvx512Kernels
#define RBM_NAME "avx512"
#elif defined(RBM_ISA_AVX2)
#include "simd_avx2.h"
#define RBM_TABLE kAvx2Kernels
#define RBM_NAME "avx2"
#else
#include "simd_plain.h"
#define RBM_TABLE kPlainKernels
#define RBM_NAME "plain"
#endif

#include <cstdlib>

namespace rbm {
namespace {

constexpr int kChunk = 12;         // tables looked up per pass over the chains: 48 KB at group 6
constexpr int64_t kBlock = 1024;   // chains per pass: their sums stay in the second-level cache
constexpr int64_t kRealChunk = 128;  // rows of 46-bit products whose sums stay below 2^53

// What a thread needs while it works on a tile.
struct Scratch {
  alignas(64) char tables[kChunk << (kMaxGroup + 6)];
  alignas(64) int32_t sums[kBlock * kTile];    // [rows, 16] running int32 sums
  alignas(64) double totals[kBlock * kTile];   // [rows, 16] exact totals
  alignas(64) double high[kBlock * kTile];     // [rows, 16] totals above 2^24 (real operands)
  alignas(64) double weighted[kBlock * kTile];  // [rows, 16] both phases of a gradient
  alignas(64) double weights[kRealChunk * kTile];
};

Scratch& scratch() {
  struct Owner {
    Scratch* mine = static_cast<Scratch*>(std::aligned_alloc(64, sizeof(Scratch)));
    ~Owner() { std::free(mine); }
  };
  static thread_local Owner owner;
  return *owner.mine;
}

// Rows of the right operand as integers, sixteen columns at a time.
struct WeightRows {
  const Matrix& w;
  F16 inverse_scale;
  int64_t col;
  int n;

  // Rows k .. k + count - 1 into out[0 .. count), count <= 16.
  void get(int64_t k, int count, I16* out) const {
    if (w.col_stride == 1) {
      const float* p = w.data + k * w.row_stride + col;
      for (int r = 0; r < count; ++r, p += w.row_stride) {
        out[r] = to_int(mul(n == kTile ? load(p) : load(p, n), inverse_scale));
      }
      return;
    }
    F16 rows[16];
    for (int lane = 0; lane < 16; ++lane) {
      const float* p = w.data + (col + lane) * w.col_stride + k;
      rows[lane] = lane >= n ? F16(0.0f) : count == 16 ? load(p) : load(p, count);
    }
    transpose(rows);
    for (int r = 0; r < count; ++r) out[r] = to_int(mul(rows[r], inverse_scale));
  }
};

// The hidden probabilities of a batch are integers already; their rows are padded to whole tiles.
struct HiddenRows {
  const int32_t* data;
  int64_t stride;
  int64_t col;

  void get(int64_t k, int count, I16* out) const {
    const int32_t* p = data + k * stride + col;
    for (int r = 0; r < count; ++r, p += stride) out[r] = load(p);
  }
};

// A few rows ahead, so that transposed weights are read sixteen rows at a time.
template <class Rows> struct RowReader {
  const Rows& rows;
  const int64_t K;
  int64_t begin = 0, end = 0;
  I16 buffer[16];

  RowReader(const Rows& source, int64_t count) : rows(source), K(count) {}

  const I16& operator[](int64_t k) {
    if (k >= end) {
      begin = k;
      end = k + 16 < K ? k + 16 : K;
      rows.get(begin, static_cast<int>(end - begin), buffer);
    }
    return buffer[k - begin];
  }
};

// table[e] = sum of the rows whose bit is set in e. The sums of the first three rows stay in
// registers, so that the table is only written.
template <int group, class Reader> void build_table(Reader& rows, int64_t k, int64_t K, char* table) {
  I16 row[group];
  for (int bit = 0; bit < group; ++bit) row[bit] = k + bit < K ? rows[k + bit] : I16(0);
  constexpr int kLow = group < 3 ? group : 3;
  I16 low[1 << kLow], high[1 << (group - kLow)];
  low[0] = high[0] = I16(0);
  for (int bit = 0; bit < kLow; ++bit) {
    for (int e = 0; e < 1 << bit; ++e) low[(1 << bit) + e] = add(low[e], row[bit]);
  }
  for (int bit = 0; bit < group - kLow; ++bit) {
    for (int e = 0; e < 1 << bit; ++e) high[(1 << bit) + e] = add(high[e], row[kLow + bit]);
  }
  int32_t* entry = reinterpret_cast<int32_t*>(table);
  for (const I16& h : high) {
    for (const I16& l : low) {
      store(entry, add(h, l));
      entry += kTile;
    }
  }
}

template <int group, int count>
void add_entries(const uint16_t* groups, int64_t stride, int64_t rows, const char* tables, int32_t* sums) {
  for (int64_t m = 0; m < rows; ++m, groups += stride, sums += kTile) {
    I16 sum = load(sums);
#pragma GCC unroll 16
    for (int g = 0; g < count; ++g) {
      sum = add(sum, load(reinterpret_cast<const int32_t*>(tables + (g << (group + 6)) + groups[g])));
    }
    store(sums, sum);
  }
}

void clear(int32_t* sums, int64_t rows) {
  for (int64_t i = 0; i < rows; ++i) store(sums + i * kTile, I16(0));
}
void clear(double* totals, int64_t rows) {
  for (int64_t i = 0; i < 2 * rows; ++i) store(totals + 8 * i, splat(0.0));
}

// totals += weight * sums; sums = 0.
void fold(int32_t* sums, int64_t rows, double weight, double* totals) {
  const D8 w = splat(weight);
  for (int64_t m = 0; m < rows; ++m, sums += kTile, totals += kTile) {
    D8 low, high;
    widen(load(sums), low, high);
    store(totals, fma(w, low, load(totals)));
    store(totals + 8, fma(w, high, load(totals + 8)));
    store(sums, I16(0));
  }
}

template <int group, class Rows>
void binary_product(const Operand& a, const Rows& rows, int64_t begin, int64_t end, Scratch& s, double* totals,
                    double weight) {
  RowReader<Rows> reader(rows, a.K);
  const int64_t count = end - begin;
  const uint16_t* groups = a.groups + begin * a.n_groups;
  int64_t pending = 0;
  for (int64_t g = 0; g < a.n_groups; g += kChunk) {
    const int n = static_cast<int>(a.n_groups - g < kChunk ? a.n_groups - g : kChunk);
    if (totals && pending + n * group > kSafeRows) {
      fold(s.sums, count, weight, totals);
      pending = 0;
    }
    pending += n * group;
    for (int i = 0; i < n; ++i) build_table<group>(reader, (g + i) * group, a.K, s.tables + (i << (group + 6)));
    int i = 0;
    if (n == kChunk) {
      add_entries<group, kChunk>(groups + g, a.n_groups, count, s.tables, s.sums);
      i = kChunk;
    }
    for (; i + 4 <= n; i += 4)
      add_entries<group, 4>(groups + g + i, a.n_groups, count, s.tables + (i << (group + 6)), s.sums);
    for (; i < n; ++i)
      add_entries<group, 1>(groups + g + i, a.n_groups, count, s.tables + (i << (group + 6)), s.sums);
  }
  if (totals) fold(s.sums, count, weight, totals);
}

// sums += binary operand @ rows, folded into totals (if there are any) before int32 can overflow.
template <class Rows>
void binary_product(const Operand& a, const Rows& rows, int64_t begin, int64_t end, Scratch& s, double* totals,
                    double weight) {
  clear(s.sums, end - begin);
  switch (a.group) {
    case 1: return binary_product<1>(a, rows, begin, end, s, totals, weight);
    case 2: return binary_product<2>(a, rows, begin, end, s, totals, weight);
    case 3: return binary_product<3>(a, rows, begin, end, s, totals, weight);
    case 4: return binary_product<4>(a, rows, begin, end, s, totals, weight);
    case 5: return binary_product<5>(a, rows, begin, end, s, totals, weight);
    default: return binary_product<6>(a, rows, begin, end, s, totals, weight);
  }
}

template <int count>
void multiply_rows(const float* a, int64_t stride, int64_t K, const double* w, double* totals) {
  D8 sum[count][2];
  for (int r = 0; r < count; ++r) {
    sum[r][0] = load(totals + r * kTile);
    sum[r][1] = load(totals + r * kTile + 8);
  }
  for (int64_t k = 0; k < K; ++k, w += kTile) {
    const D8 w0 = load(w), w1 = load(w + 8);
#pragma GCC unroll 8
    for (int r = 0; r < count; ++r) {
      const D8 x = splat(a[r * stride + k]);
      sum[r][0] = fma(x, w0, sum[r][0]);
      sum[r][1] = fma(x, w1, sum[r][1]);
    }
  }
  for (int r = 0; r < count; ++r) {
    store(totals + r * kTile, sum[r][0]);
    store(totals + r * kTile + 8, sum[r][1]);
  }
}

// out += weight * (real operand @ rows). Products of two 24-bit integers have 46 bits: after 128
// of them a sum is split at 2^24 into two doubles that both stay exact; the total is rounded once.
template <class Rows>
void real_product(const Operand& a, const Rows& rows, int64_t begin, int64_t end, Scratch& s, double* out,
                  double weight) {
  RowReader<Rows> reader(rows, a.K);
  const int64_t count = end - begin;
  double* low = s.totals;
  clear(low, count);
  clear(s.high, count);
  const D8 magic = splat(6755399441055744.0), down = splat(0x1p-24), up = splat(-0x1p24);
  for (int64_t k = 0; k < a.K; k += kRealChunk) {
    const int64_t n = a.K - k < kRealChunk ? a.K - k : kRealChunk;
    for (int64_t i = 0; i < n; ++i) {
      D8 w0, w1;
      widen(reader[k + i], w0, w1);
      store(s.weights + i * kTile, w0);
      store(s.weights + i * kTile + 8, w1);
    }
    const float* p = a.fixed + begin * a.K + k;
    int64_t m = 0;
    for (; m + kRealRows <= count; m += kRealRows)
      multiply_rows<kRealRows>(p + m * a.K, a.K, n, s.weights, low + m * kTile);
    for (; m < count; ++m) multiply_rows<1>(p + m * a.K, a.K, n, s.weights, low + m * kTile);
    for (int64_t i = 0; i < 2 * count; ++i) {
      const D8 total = load(low + 8 * i);
      const D8 top = sub(add(mul(total, down), magic), magic);
      store(s.high + 8 * i, add(load(s.high + 8 * i), top));
      store(low + 8 * i, fma(top, up, total));
    }
  }
  const D8 w = splat(weight), unit = splat(0x1p24);
  for (int64_t i = 0; i < 2 * count; ++i) {
    const D8 total = fma(load(s.high + 8 * i), unit, load(low + 8 * i));
    store(out + 8 * i, out == low ? mul(w, total) : add(mul(w, total), load(out + 8 * i)));
  }
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

template <bool random> void finish_rows(const HalfSweep& h, int64_t tile, int64_t begin, int64_t end, const Scratch& s, bool totals) {
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
        if (held) state = select(held, load(h.held_states + m * h.held_states_stride + col, n), state);
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
      if (h.fixed) store(h.fixed + m * h.fixed_stride + col, to_int(mul(select(valid, p, zero), fixed_one)));
    }
    if (h.softplus) h.softplus[tile * h.given.rows + m] = sum_lanes(select(valid, softplus(x), zero));
  }
}

void half_sweep(const HalfSweep& h, int64_t tile, int64_t row_begin, int64_t row_end) {
  Scratch& s = scratch();
  const int64_t col = tile * kTile;
  const int64_t left = h.weight.cols - col;
  const WeightRows rows{h.weight, F16(h.inverse_scale), col, static_cast<int>(left < kTile ? left : kTile)};
  const bool random = h.bits || h.states || h.bytes;
  const bool real = h.given.fixed != nullptr;
  const bool totals = real || h.given.K > (h.wide ? kSafeRows : kSafeNarrowRows);
  for (int64_t begin = row_begin; begin < row_end; begin += kBlock) {
    const int64_t end = begin + kBlock < row_end ? begin + kBlock : row_end;
    if (real) {
      real_product(h.given, rows, begin, end, s, s.totals, 1.0);
    } else {
      if (totals) clear(s.totals, end - begin);
      binary_product(h.given, rows, begin, end, s, totals ? s.totals : nullptr, 1.0);
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
  for (int64_t begin = row_begin; begin < row_end; begin += kBlock) {
    const int64_t end = begin + kBlock < row_end ? begin + kBlock : row_end;
    clear(s.weighted, end - begin);
    for (const Phase& phase : g.phase) {
      const HiddenRows rows{phase.hidden, phase.hidden_stride, col};
      if (phase.visible.fixed) {
        real_product(phase.visible, rows, begin, end, s, s.weighted, phase.weight);
      } else {
        binary_product(phase.visible, rows, begin, end, s, s.weighted, phase.weight);
      }
    }
    for (int64_t m = begin; m < end; ++m) {
      const double* total = s.weighted + (m - begin) * kTile;
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
  if (i < n) most = max(most, bit_and(as_int(load(values + i, static_cast<int>(n - i))), magnitude));
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

const Kernels RBM_TABLE = {RBM_NAME, largest,    pack_floats, pack_bytes, group_offsets,
                           fix,      half_sweep, gradient,    exp_neg_all};

}  // namespace rbm
