// The resident chains on the emulated GPU against plain loops, in several orders of its threads.
// Built and run by test_native.py. Ends with status 1 where a result differs.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "cuda/operands/element.h"
#include "cuda/resident/chain.h"
#include "include/rbm/digit_sums.h"
#include "include/rbm/fixed_point.h"
#include "include/rbm/math.h"
#include "include/rbm/philox.h"

using namespace rbm;
using namespace rbm::cuda;

namespace {

int failures = 0;

struct Case {
  int n_visible, n_hidden, digits, rows, sweeps;
  int cluster;  // 0: chain(), else chain_sm90a()
  bool betas = false, masked = false;
  Element element = Element::float32;
};

std::mt19937 generator(1);
int below(int n) { return static_cast<int>(generator() % static_cast<unsigned>(n)); }
float normal() { return std::normal_distribution<float>()(generator); }

template <class T> struct Aligned {  // as the caller's allocator aligns
  std::vector<T> memory;
  T* data;
  explicit Aligned(size_t count, T value = T{}) : memory(count + 256 / sizeof(T), value) {
    const auto start = reinterpret_cast<uintptr_t>(memory.data());
    data = memory.data() + (256 - start % 256) % 256 / sizeof(T);
  }
};

// Weights as integers q, whose digits both layouts hold.
struct Model {
  std::vector<int> q;  // [n_visible, n_hidden]
  std::vector<float> visible_bias, hidden_bias;
  float scale;
  Aligned<uint8_t> to_hidden_bytes, to_visible_bytes;
  Planes to_hidden, to_visible;

  explicit Model(const Case& c)
      : q(static_cast<size_t>(c.n_visible) * c.n_hidden),
        to_hidden_bytes(c.digits * round_up(c.n_hidden, 128) * round_up(c.n_visible, 128)),
        to_visible_bytes(c.digits * round_up(c.n_hidden, 128) * round_up(c.n_visible, 128)) {
    const int largest = c.digits == 2 ? 32639 : 8355711;
    scale = 4.0f / static_cast<float>(largest) /
            std::sqrt(static_cast<float>(std::max(c.n_visible, c.n_hidden)));
    to_hidden = {to_hidden_bytes.data, round_up(c.n_hidden, 128), round_up(c.n_visible, 128)};
    to_visible = {to_visible_bytes.data, round_up(c.n_visible, 128), round_up(c.n_hidden, 128)};
    for (int i = 0; i < c.n_visible; ++i) {
      for (int j = 0; j < c.n_hidden; ++j) {
        int& weight = q[static_cast<size_t>(i) * c.n_hidden + j];
        weight = below(2 * largest + 1) - largest;
        int rest = weight;
        for (int d = 0; d < c.digits; ++d) {
          const int digit = static_cast<int8_t>(rest);
          rest = (rest - digit) / 256;
          to_hidden.data[byte_offset(to_hidden, d, i, row_of_unit(j))] =
              static_cast<uint8_t>(digit);
          to_visible.data[byte_offset(to_visible, d, j, row_of_unit(i))] =
              static_cast<uint8_t>(digit);
        }
      }
    }
    for (int i = 0; i < c.n_visible; ++i) visible_bias.push_back(normal());
    for (int j = 0; j < c.n_hidden; ++j) hidden_bias.push_back(normal());
  }
};

using States = std::vector<std::vector<bool>>;  // [rows][units]

// One half-sweep in plain loops.
States draw(const Case& c, const Model& m, const States& given, bool visible, uint64_t seed,
            uint64_t step, uint32_t chain_offset, const std::vector<float>& betas) {
  const int units = visible ? c.n_visible : c.n_hidden;
  const HalfSweepKey key = half_sweep_key(seed, step, 0);
  States drawn(given.size(), std::vector<bool>(static_cast<size_t>(units)));
  for (size_t row = 0; row < given.size(); ++row) {
    for (int u = 0; u < units; ++u) {
      int64_t sum = 0;
      for (size_t k = 0; k < given[row].size(); ++k) {
        if (!given[row][k]) continue;
        sum += visible ? m.q[static_cast<size_t>(u) * c.n_hidden + k] : m.q[k * c.n_hidden + u];
      }
      const float bias = visible ? m.visible_bias[u] : m.hidden_bias[u];
      const float x = mul(betas[row], rbm::fma(static_cast<float>(sum), m.scale, bias));
      uint32_t words[4] = {static_cast<uint32_t>(u / 4), chain_offset + static_cast<uint32_t>(row),
                           key.step, key.stream};
      philox4x32(words, key.key0, key.key1);
      const float uniform_draw = uniform<float>(static_cast<int32_t>(words[u % 4]));
      drawn[row][u] = threshold(uniform_draw, exp_neg(x)) < 1.0f;
    }
  }
  return drawn;
}

using Values = std::vector<std::vector<float>>;  // [rows][units]

// Gaussian units in plain loops.
struct GaussianUnits {
  std::vector<float> log_var, precision;

  explicit GaussianUnits(const Case& c) {
    for (int i = 0; i < c.n_visible; ++i) {
      log_var.push_back(0.5f * normal());
      precision.push_back(exp_neg(log_var.back()));
    }
  }

  States draw_hidden(const Case& c, const Model& m, const Values& given, HalfSweepKey key,
                     uint32_t chain_offset, const std::vector<float>& betas) const {
    States drawn(given.size(), std::vector<bool>(static_cast<size_t>(c.n_hidden)));
    for (size_t row = 0; row < given.size(); ++row) {
      int32_t largest = 0;
      for (int k = 0; k < c.n_visible; ++k) {
        largest = std::max(largest, magnitude_bits(mul(given[row][k], precision[k])));
      }
      const float scale = scale_of(largest, c.digits);
      for (int u = 0; u < c.n_hidden; ++u) {
        int64_t sum = 0;
        for (int k = 0; k < c.n_visible; ++k) {
          sum += int64_t{m.q[static_cast<size_t>(k) * c.n_hidden + u]} *
                 quantize(mul(given[row][k], precision[k]), inverse_of(scale));
        }
        const float x =
            mul(betas[row], rbm::fma(real_sum(sum), mul(scale, m.scale), m.hidden_bias[u]));
        uint32_t words[4] = {static_cast<uint32_t>(u / 4),
                             chain_offset + static_cast<uint32_t>(row), key.step, key.stream};
        philox4x32(words, key.key0, key.key1);
        const float uniform_draw = uniform<float>(static_cast<int32_t>(words[u % 4]));
        drawn[row][u] = threshold(uniform_draw, exp_neg(x)) < 1.0f;
      }
    }
    return drawn;
  }

  Values draw_visible(const Case& c, const Model& m, const States& given, HalfSweepKey key,
                      uint32_t chain_offset, const std::vector<float>& betas) const {
    Values drawn(given.size(), std::vector<float>(static_cast<size_t>(c.n_visible)));
    for (size_t row = 0; row < given.size(); ++row) {
      for (int u = 0; u < c.n_visible; ++u) {
        int64_t sum = 0;
        for (int k = 0; k < c.n_hidden; ++k) {
          if (given[row][k]) sum += m.q[static_cast<size_t>(u) * c.n_hidden + k];
        }
        uint32_t words[4] = {static_cast<uint32_t>(u / 4),
                             chain_offset + static_cast<uint32_t>(row), key.step, key.stream};
        philox4x32(words, key.key0, key.key1);
        float z[2];
        normal_pair<float>(static_cast<int32_t>(words[u % 4 & 2]),
                           static_cast<int32_t>(words[(u % 4 & 2) + 1]), z[0], z[1]);
        const float mean = rbm::fma(static_cast<float>(sum), m.scale, m.visible_bias[u]);
        const float sigma = div(exp_neg(mul(-0.5f, log_var[u])), rbm::sqrt(betas[row]));
        drawn[row][u] = rbm::fma(sigma, z[u % 2], mean);
      }
    }
    return drawn;
  }
};

void run_gaussian(const Case& c) {
  const Model m(c);
  const GaussianUnits units(c);
  const int64_t seed[2] = {0x123456789ABCDEF, 0xFFFFFFF0};
  const uint64_t half_sweep = 14;
  const uint32_t chain_offset = 1000;
  const int64_t stride = c.n_visible + 3;

  Aligned<float> start(c.rows * stride, NAN);
  std::vector<uint8_t> mask(static_cast<size_t>(c.rows) * c.n_visible);
  std::vector<float> betas(c.rows, 0.75f);
  Values values(c.rows, std::vector<float>(c.n_visible));
  for (int row = 0; row < c.rows; ++row) {
    if (c.betas) betas[row] = 0.25f + 0.01f * static_cast<float>(row);
    const float spread = std::exp2(static_cast<float>(below(40) - 20));  // each row its own scale
    for (int i = 0; i < c.n_visible; ++i) {
      mask[static_cast<size_t>(row) * c.n_visible + i] = below(3) == 0;
      values[row][i] = start.data[row * stride + i] = row % 9 == 8 ? 0.0f : spread * normal();
    }
  }
  const Values first = values;
  for (int t = 0; t < c.sweeps; ++t) {
    const uint64_t step = static_cast<uint64_t>(seed[1]) + half_sweep + 2 * t;
    const auto key = [&](uint64_t s) {
      return half_sweep_key(static_cast<uint64_t>(seed[0]), s, 0);
    };
    const States h = units.draw_hidden(c, m, values, key(step), chain_offset, betas);
    values = units.draw_visible(c, m, h, key(step + 1), chain_offset, betas);
    for (int row = 0; row < c.rows && c.masked; ++row) {
      for (int i = 0; i < c.n_visible; ++i) {
        if (mask[static_cast<size_t>(row) * c.n_visible + i]) values[row][i] = first[row][i];
      }
    }
  }

  const float scale = m.scale;
  const int32_t guard_state = 1;
  for (const char* schedule : {"0", "1", "2"}) {
    setenv("RBM_EMULATED_SCHEDULE", schedule, 1);
    // One float off, where the vector stores cannot be used.
    Aligned<float> out(static_cast<size_t>(c.rows) * c.n_visible + 1, NAN);
    float* states = out.data + (c.element == Element::byte);
    Chain a{};
    a.rows = c.rows, a.n_visible = c.n_visible, a.n_hidden = c.n_hidden, a.sweeps = c.sweeps;
    a.guard = {&guard_state, 1};
    a.log_var = units.log_var.data(), a.precision = units.precision.data();
    a.start_values = {start.data, Element::float32, c.rows, c.n_visible, stride, 1, false};
    a.to_hidden = m.to_hidden, a.to_visible = m.to_visible, a.weight_scale = &scale;
    a.visible_bias = m.visible_bias.data(), a.hidden_bias = m.hidden_bias.data();
    a.beta = 0.75f, a.betas = c.betas ? betas.data() : nullptr;
    a.seed = seed, a.chain_offset = chain_offset, a.half_sweep = half_sweep;
    if (c.masked) {
      a.mask = mask.data(), a.mask_stride = c.n_visible;
      a.held = start.data, a.held_element = Element::float32, a.held_stride = stride;
    }
    a.states = states, a.states_element = Element::float32;

    int wrong = 0;
    std::string said;
    const auto launch_chain = [&] {
      return c.cluster ? chain_sm90a(a, c.digits, c.cluster, nullptr) : chain(a, c.digits, nullptr);
    };
    try {
      a.guard.wanted = 0;  // must not run
      wrong += launch_chain() != 0 || !std::isnan(states[0]);
      a.guard.wanted = 1;
      wrong += launch_chain() != 0;
    } catch (const std::exception& error) {
      said = error.what(), ++wrong;
    }
    for (int row = 0; row < c.rows && said.empty(); ++row) {
      for (int i = 0; i < c.n_visible; ++i) {
        wrong += as_int(states[int64_t{row} * c.n_visible + i]) != as_int(values[row][i]);
      }
    }
    if (c.element == Element::byte) wrong += !std::isnan(out.data[0]);
    if (wrong == 0) continue;
    ++failures;
    std::printf(
        "FAILED: %d x %d units, %d digits, %d Gaussian chains, %d sweeps, cluster %d, "
        "schedule %s: %d wrong %s\n",
        c.n_visible, c.n_hidden, c.digits, c.rows, c.sweeps, c.cluster, schedule, wrong,
        said.c_str());
  }
}

void run(const Case& c) {
  const Model m(c);
  const size_t words = words_of(c.n_visible), terms_words = round_up(c.rows, 128) / 32 + 4;
  const int64_t seed[2] = {0x123456789ABCDEF, 0xFFFFFFF0};  // the step's low word overflows
  const uint64_t half_sweep = 14;
  const uint32_t chain_offset = 1000;

  States states(c.rows, std::vector<bool>(c.n_visible));
  Aligned<uint32_t> start(c.rows * words);
  std::vector<uint8_t> mask(c.n_visible), held(static_cast<size_t>(c.rows) * c.n_visible);
  std::vector<float> betas(c.rows, 0.75f);
  for (int i = 0; i < c.n_visible; ++i) mask[i] = below(3) == 0;
  for (int row = 0; row < c.rows; ++row) {
    if (c.betas) betas[row] = 0.25f + 0.01f * static_cast<float>(row);
    for (int i = 0; i < c.n_visible; ++i) {
      const bool on = below(2) != 0;
      states[row][i] = on;
      held[static_cast<size_t>(row) * c.n_visible + i] = on;
      start.data[row * words + i / 32] |= static_cast<uint32_t>(on) << (i % 32);
    }
  }
  const States first = states;
  for (int t = 0; t < c.sweeps; ++t) {
    const uint64_t step = static_cast<uint64_t>(seed[1]) + half_sweep + 2 * t;
    const States h = draw(c, m, states, false, seed[0], step, chain_offset, betas);
    states = draw(c, m, h, true, seed[0], step + 1, chain_offset, betas);
    for (int row = 0; row < c.rows && c.masked; ++row) {
      for (int i = 0; i < c.n_visible; ++i) {
        if (mask[i]) states[row][i] = first[row][i];
      }
    }
  }

  const float scale = m.scale;
  const int32_t guard_state = 1;
  for (const char* schedule : {"0", "1", "2"}) {
    setenv("RBM_EMULATED_SCHEDULE", schedule, 1);
    Aligned<uint32_t> bits(c.rows * words, 0xCDCDCDCD);
    Aligned<uint32_t> terms(c.n_visible * terms_words, 0xCDCDCDCD);
    Aligned<unsigned long long> sums(c.n_visible, 5);
    Aligned<uint8_t> out(size_t{4} * c.rows * c.n_visible, 0xCD);
    Chain a{};
    a.rows = c.rows, a.n_visible = c.n_visible, a.n_hidden = c.n_hidden, a.sweeps = c.sweeps;
    a.start = start.data;
    a.guard = {&guard_state, 1};
    a.to_hidden = m.to_hidden, a.to_visible = m.to_visible, a.weight_scale = &scale;
    a.visible_bias = m.visible_bias.data(), a.hidden_bias = m.hidden_bias.data();
    a.beta = 0.75f, a.betas = c.betas ? betas.data() : nullptr;
    a.seed = seed, a.chain_offset = chain_offset, a.half_sweep = half_sweep;
    if (c.masked) {
      a.mask = mask.data(), a.mask_stride = 0;
      a.held = held.data(), a.held_element = Element::byte, a.held_stride = c.n_visible;
    }
    a.visible_bits = bits.data, a.visible_terms = terms.data, a.visible_sums = sums.data;
    a.terms_words = static_cast<int64_t>(terms_words), a.term_word = 4;
    a.states = out.data, a.states_element = c.element;

    int wrong = 0;
    std::string said;
    try {
      a.guard.wanted = 0;  // must not run
      const int idle =
          c.cluster ? chain_sm90a(a, c.digits, c.cluster, nullptr) : chain(a, c.digits, nullptr);
      wrong += idle != 0 || bits.data[0] != 0xCDCDCDCD;
      a.guard.wanted = 1;
      wrong += 0 != (c.cluster ? chain_sm90a(a, c.digits, c.cluster, nullptr)
                               : chain(a, c.digits, nullptr));
    } catch (const std::exception& error) {
      said = error.what(), ++wrong;
    }
    for (int i = 0; i < c.n_visible && !wrong; ++i) {
      unsigned long long on = 5;
      for (int row = 0; row < c.rows; ++row) {
        const bool wanted = states[row][i];
        on += wanted;
        wrong += (bits.data[row * words + i / 32] >> (i % 32) & 1u) != wanted;
        wrong += (terms.data[i * terms_words + 4 + row / 32] >> (row % 32) & 1u) != wanted;
        const int64_t at = int64_t{row} * c.n_visible + i;
        wrong += load_element(out.data, c.element, at) != (wanted ? 1.0f : 0.0f);
      }
      wrong += sums.data[i] != on;
      wrong += terms.data[i * terms_words + 3] != 0xCDCDCDCD;  // of other rows
    }
    if (wrong == 0) continue;
    ++failures;
    std::printf(
        "FAILED: %d x %d units, %d digits, %d chains, %d sweeps, cluster %d, schedule %s: "
        "%d wrong %s\n",
        c.n_visible, c.n_hidden, c.digits, c.rows, c.sweeps, c.cluster, schedule, wrong,
        said.c_str());
  }
}

void expect(bool passed, const char* what) {
  if (passed) return;
  ++failures;
  std::printf("FAILED: %s\n", what);
}

}  // namespace

int main(int count, char** arguments) {
  const std::string which = count > 1 ? arguments[1] : "all";
  if (which != "cluster") {
    run({37, 21, 2, 50, 3, 0});
    run({5, 3, 3, 1, 1, 0, true});
    run({130, 70, 3, 33, 2, 0, false, true, Element::byte});
    run({200, 64, 2, 70, 1, 0, true, true, Element::float16});      // teams of sixteen warps
    run({20, 12, 2, 1100, 1, 0, false, false, Element::bfloat16});  // of one, and two rounds

    run_gaussian({37, 21, 2, 50, 3, 0});
    run_gaussian({5, 3, 3, 1, 1, 0, true});
    run_gaussian({132, 70, 3, 33, 2, 0, false, true, Element::byte});
    run_gaussian({200, 64, 2, 70, 3, 0, true, true});   // teams of eight warps
    run_gaussian({20, 12, 3, 1100, 2, 0, true});        // of one, two rounds
    run_gaussian({72, 40, 2, 420, 2, 0, false, true});  // of two
    run_gaussian({224, 200, 2, 70, 2, 0});              // of sixteen, two rounds: nearly all memory
  }
  if (which != "block") {
    run({37, 21, 2, 50, 3, 1});
    run({40, 30, 3, 420, 2, 2, true, true, Element::byte});  // more than one round
    run({40, 30, 2, 420, 1, 2});
    run({98, 70, 2, 70, 2, 4, false, false, Element::bfloat16});  // blocks without hidden units
    run({300, 40, 2, 300, 2, 2, true});                           // in pieces: two buffers
    run({230, 260, 3, 64, 1, 2});
    run({784, 500, 2, 10, 1, 8});
    run({300, 100, 3, 70, 1, 16});

    run_gaussian({37, 21, 2, 50, 3, 1});
    run_gaussian({40, 30, 3, 420, 2, 2, true, true, Element::byte});
    run_gaussian({98, 70, 2, 150, 3, 4, true});  // blocks without hidden units
    run_gaussian({300, 40, 2, 300, 2, 4, false, true});
    run_gaussian({230, 260, 3, 64, 2, 4});
    run_gaussian({784, 500, 2, 10, 2, 16});
    run_gaussian({20, 12, 3, 130, 5, 16, true});  // blocks without any units
    run_gaussian({100, 40, 2, 300, 4, 16});
  }
  // Shared memory of an RTX 30, an A100 and an H100.
  expect(chain_fits(128, 128, 2, 99 * 1024, false) && !chain_fits(256, 200, 2, 99 * 1024, false),
         "sm_86");
  expect(chain_fits(256, 128, 2, 163 * 1024, false) && !chain_fits(784, 500, 3, 163 * 1024, false),
         "sm_80");
  expect(
      chain_fits(256, 200, 2, 227 * 1024, false) && !chain_fits(70000, 70000, 2, 227 * 1024, false),
      "sm_90");
  expect(chain_fits(128, 128, 2, 99 * 1024, true) && !chain_fits(192, 128, 2, 99 * 1024, true),
         "sm_86, Gaussian units");
  expect(chain_fits(224, 200, 2, 227 * 1024, true) && !chain_fits(256, 200, 2, 227 * 1024, true),
         "sm_90, Gaussian units");
  expect(smallest_cluster(784, 500, 2, 227 * 1024, false) == 8, "784 x 500, two digits: 8 blocks");
  expect(smallest_cluster(784, 500, 3, 227 * 1024, false) == 16,
         "784 x 500, three digits: 16 blocks");
  expect(smallest_cluster(4096, 4096, 2, 227 * 1024, false) == 0, "4096 x 4096 does not fit");
  expect(smallest_cluster(784, 500, 2, 227 * 1024, true) == 16, "784 x 500 Gaussian units");
  expect(smallest_cluster(512, 512, 3, 227 * 1024, true) == 16, "512 x 512 Gaussian units");
  expect(smallest_cluster(784, 128, 3, 227 * 1024, true) == 0, "784 x 128, three digits");
  return failures != 0;
}
