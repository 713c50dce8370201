// The tiled kernels with Hopper's instructions against the portable ones, on the emulated GPU:
// every byte that they write. Built and run by test_native.py; ends with status 1 where they
// differ.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <random>
#include <vector>

#include "cuda/tiled/gradient.h"
#include "cuda/tiled/half_sweep.h"

using namespace rbm;
using namespace rbm::cuda;

namespace {

std::mt19937 generator(7);
int failures = 0;

template <class T> struct Array {
  std::vector<T> values;
  explicit Array(int64_t size) : values(static_cast<size_t>(size)) {
    std::memset(values.data(), 0x5A, values.size() * sizeof(T));
  }
  T* data() { return values.data(); }
  bool operator==(const Array& other) const {
    return std::memcmp(values.data(), other.values.data(), values.size() * sizeof(T)) == 0;
  }
};

void expect_equal(bool equal, const char* what, const char* test) {
  if (equal) return;
  ++failures;
  std::printf("FAILED: %s differs in %s\n", what, test);
}

float random_float(float largest) {
  return std::uniform_real_distribution<float>(-largest, largest)(generator);
}

Array<uint32_t> random_words(int64_t count) {
  Array<uint32_t> words(count);
  for (uint32_t& word : words.values) word = generator();
  return words;
}

template <class T> Array<T> random_floats(int64_t count, float largest) {
  Array<T> floats(count);
  for (T& x : floats.values) x = random_float(largest);
  return floats;
}

// Planes of which `rows` rows (as row_of_unit) and the terms of `ranges` hold random digits, signed
// or of at most `highest` in the uppermost; the rest is zero.
struct RandomPlanes {
  std::vector<uint8_t> bytes;
  Planes planes;
};
RandomPlanes random_planes(int digits, int64_t rows, int64_t padded_rows, int64_t padded_terms,
                           const std::vector<std::pair<int64_t, int64_t>>& ranges, int highest) {
  RandomPlanes result;
  result.planes = {nullptr, padded_rows, padded_terms};
  result.bytes.assign(static_cast<size_t>(digits * padded_rows * padded_terms + 16), 0);
  uint8_t* start = result.bytes.data();
  result.planes.data = start + (16 - reinterpret_cast<uintptr_t>(start) % 16) % 16;
  for (int digit = 0; digit < digits; ++digit) {
    for (const auto& range : ranges) {
      for (int64_t term = range.first; term < range.second; ++term) {
        for (int64_t row = 0; row < rows; ++row) {
          uint32_t byte = generator() & 0xFFu;
          if (digit == digits - 1 && highest) byte %= static_cast<uint32_t>(highest + 1);
          result.planes.data[byte_offset(result.planes, digit, term, row_of_unit(row))] =
              static_cast<uint8_t>(byte);
        }
      }
    }
  }
  return result;
}

template <class T> T* aligned(std::vector<T>& storage) {
  const auto start = reinterpret_cast<uintptr_t>(storage.data());
  return reinterpret_cast<T*>((start + 15) / 16 * 16);
}

struct HalfSweepResults {
  Array<uint32_t> bits, terms;
  Array<unsigned long long> sums, statistics_sums;
  Array<float> states, means;
  Array<uint8_t> statistics;
  Array<double> softplus;
  HalfSweepResults(int64_t rows, int64_t units, int digits)
      : bits(rows * words_of(units)),
        terms(units * words_of(rows)),
        sums(units),
        statistics_sums(units),
        states(rows * units),
        means(rows * units),
        statistics(digits * round_up(units, 64) * round_up(rows, kBlock)),
        softplus(slices_of(units) * rows) {}
};

// A guard that is not met: the kernels write nothing.
const int32_t kState = 1;
const Guard kUnmet = {&kState, 0}, kMet = {&kState, 1};

void test_half_sweep(const char* name, int64_t rows, int given, int units, int digits, Draw draw) {
  auto bit_words = random_words(rows * words_of(given) + 4);
  RandomPlanes weights =
      random_planes(digits, units, round_up(units, 128), round_up(given, kBlock), {{0, given}}, 0);
  auto bias = random_floats<float>(units, 1.0f), log_var = random_floats<float>(units, 1.0f);
  auto betas = random_floats<float>(rows, 1.0f);
  for (float& beta : betas.values) beta = 1.5f + beta;
  const float scale = digits == 2 ? 1.0f / (1 << 17) : 1.0f / (1 << 25);
  const int64_t seed[2] = {0x123456789, 41};

  const auto run = [&](auto kernel, HalfSweepResults& r, const Guard& guard) {
    HalfSweep a{};
    a.guard = guard;
    a.rows = rows, a.given = given, a.units = units;
    a.bits = aligned(bit_words.values);
    a.weights = weights.planes;
    a.weight_scale = &scale;
    a.bias = bias.data();
    a.beta = 1.0f;
    if (draw == Draw::bernoulli) a.betas = betas.data();
    a.draw = draw;
    a.seed = seed, a.chain_offset = 3, a.half_sweep = 5;
    a.log_var = log_var.data();
    a.states = r.states.data(), a.states_element = Element::float32;
    a.means = r.means.data();
    if (draw == Draw::bernoulli) {
      a.drawn_bits = r.bits.data();
      a.drawn_terms = r.terms.data(), a.terms_words = words_of(rows);
      a.drawn_sums = r.sums.data();
    }
    if (draw != Draw::gaussian) {
      a.statistics = {r.statistics.data(), round_up(units, 64), round_up(rows, kBlock)};
      a.statistics_sums = r.statistics_sums.data();
      a.softplus = r.softplus.data();
    }
    return kernel(a);
  };
  const auto portable = [&](const HalfSweep& a) { return half_sweep(a, digits, false, nullptr); };
  const auto hopper = [&](const HalfSweep& a) { return half_sweep_sm90a(a, digits, nullptr); };
  HalfSweepResults expected(rows, units, digits), got = expected, untouched = expected;
  const int status = run(portable, expected, {}) + run(hopper, got, kMet);
  expect_equal(status == 0, "the status", name);
  expect_equal(got.bits == expected.bits, "drawn_bits", name);
  expect_equal(got.terms == expected.terms, "drawn_terms", name);
  expect_equal(got.sums == expected.sums, "drawn_sums", name);
  expect_equal(got.states == expected.states, "states", name);
  expect_equal(got.means == expected.means, "means", name);
  expect_equal(got.statistics == expected.statistics, "statistics", name);
  expect_equal(got.statistics_sums == expected.statistics_sums, "statistics_sums", name);
  expect_equal(got.softplus == expected.softplus, "softplus", name);
  // A comparison of two kernels that wrote nothing would pass too.
  expect_equal(!(expected.means == untouched.means), "nothing", name);
  HalfSweepResults guarded = untouched;
  run(hopper, guarded, kUnmet);
  expect_equal(guarded.means == untouched.means, "what an unmet guard leaves", name);
}

void test_gradient(const char* name, int n_visible, int n_hidden, int64_t data_rows,
                   int64_t chain_rows, int digits) {
  const int64_t first_chain = round_up(data_rows, kBlock);
  const int64_t terms = first_chain + round_up(chain_rows, kBlock);
  auto bit_words = random_words(n_visible * terms / 32 + 4);
  RandomPlanes statistics =
      random_planes(digits, n_hidden, round_up(n_hidden, 64), terms,
                    {{0, data_rows}, {first_chain, first_chain + chain_rows}}, 127);
  std::vector<unsigned long long> sums[4];
  for (int i = 0; i < 4; ++i) {
    sums[i].resize(static_cast<size_t>(i < 2 ? n_visible : n_hidden));
    for (auto& sum : sums[i]) sum = generator();
  }
  const int64_t stride = n_hidden + 3;
  int64_t common = data_rows;
  while (common % chain_rows) common += data_rows;

  struct Results {
    Array<float> W, b, c;
  };
  const auto first_W = random_floats<float>(n_visible * stride, 1.0f);
  const auto first_b = random_floats<float>(n_visible, 1.0f);
  const auto first_c = random_floats<float>(n_hidden, 1.0f);
  for (const bool accumulate : {false, true}) {
    Results expected{first_W, first_b, first_c}, got = expected;
    Gradient a{};
    a.data_rows = data_rows, a.chain_rows = chain_rows;
    a.data_weight = static_cast<double>(common / data_rows);
    a.chain_weight = static_cast<double>(common / chain_rows);
    a.unit = 1.0f / 32768.0f / static_cast<float>(common);
    a.common = static_cast<double>(common);
    a.n_visible = n_visible, a.n_hidden = n_hidden;
    a.bits = aligned(bit_words.values);
    a.statistics = statistics.planes;
    a.visible_sums[0] = sums[0].data(), a.visible_sums[1] = sums[1].data();
    a.hidden_sums[0] = sums[2].data(), a.hidden_sums[1] = sums[3].data();
    a.grad_stride = stride;
    a.accumulate = accumulate;
    const auto into = [&](Results& r) {
      a.grad_W = r.W.data(), a.grad_b = r.b.data(), a.grad_c = r.c.data();
    };
    into(expected);
    int status = gradient(a, digits, false, nullptr);
    into(got);
    a.guard = kMet;
    status += gradient_sm90a(a, digits, nullptr);
    expect_equal(status == 0, "the status", name);
    expect_equal(got.W == expected.W, "grad_W", name);
    expect_equal(got.b == expected.b, "grad_b", name);
    expect_equal(got.c == expected.c, "grad_c", name);
    expect_equal(!(expected.W == first_W), "nothing", name);
    Results guarded{first_W, first_b, first_c};
    into(guarded);
    a.guard = kUnmet;
    status += gradient_sm90a(a, digits, nullptr);
    expect_equal(guarded.W == first_W, "what an unmet guard leaves", name);
  }
}

}  // namespace

int main() {
  try {
    // Several tiles of 256 rows for each block of the grid, the last of them ragged.
    test_half_sweep("two digits", 600, 300, 200, 2, Draw::bernoulli);
    test_half_sweep("three digits", 300, 200, 203, 3, Draw::bernoulli);
    test_half_sweep("Gaussian units", 70, 129, 40, 2, Draw::gaussian);
    test_half_sweep("probabilities only", 257, 31, 70, 3, Draw::none);
    // The ring goes round, and comes round again.
    test_half_sweep("many terms", 40, 4200, 33, 2, Draw::bernoulli);

    // Rows of the planes that end within a tile; phases that end within a block.
    test_gradient("equal counts, two digits", 300, 130, 200, 200, 2);
    test_gradient("equal counts, three digits", 260, 70, 130, 130, 3);
    test_gradient("another count, two digits", 270, 130, 200, 300, 2);
    test_gradient("another count, three digits", 40, 77, 257, 129, 3);
    test_gradient("a short phase", 33, 5, 1, 260, 2);
  } catch (const std::exception& error) {
    std::printf("FAILED: %s\n", error.what());
    return 1;
  }
  return failures ? 1 : 0;
}
