#include "cpu/states.h"

#include <algorithm>
#include <cstring>

namespace rbm::cpu {
namespace {

constexpr uint32_t kInfinity = 0x7f800000u, kMost = 0x3f804000u, kLeast = 0xbb000000u;

// 1 if some value is below -kSlack, else 0; bits are compared, which the compiler vectorizes. kMost
// and kLeast are the bits of 1 + kSlack and of -kSlack.
uint32_t any_below(const float* values, int64_t n) {
  uint32_t found = 0;
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, values + i, 4);
    found |= bits > kLeast;
  }
  return found;
}

// Transposes an 8x8 bit matrix held one row a byte (Warren, Hacker's Delight, section 7-3).
uint64_t transpose8(uint64_t x) {
  uint64_t t = (x ^ (x >> 7)) & 0x00AA00AA00AA00AAull;
  x ^= t ^ (t << 7);
  t = (x ^ (x >> 14)) & 0x0000CCCC0000CCCCull;
  x ^= t ^ (t << 14);
  t = (x ^ (x >> 28)) & 0x00000000F0F0F0F0ull;
  return x ^ t ^ (t << 28);
}

}  // namespace

States States::packed(int64_t rows, int64_t units) {
  States s;
  s.rows = rows;
  s.units = units;
  s.stride = (units + 63) / 64 * 8;
  s.bits = Buffer<uint8_t>(rows * s.stride + 8);
  // The kernels write two bytes a tile; clear what lies beyond the last one.
  const int64_t written = (units + 15) / 16 * 2;
  if (written < s.stride) {
    for (int64_t m = 0; m < rows; ++m)
      std::memset(s.bits.get() + m * s.stride + written, 0,
                  static_cast<size_t>(s.stride - written));
  }
  return s;
}

Values read_states(const Input& input, const Call& call, bool bernoulli, States& out) {
  out = States::packed(input.rows, input.units);
  const int threads = call.threads_for(input.rows * input.units / 4);
  bool binary = true;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1) \
    reduction(&& : binary)
  for (int64_t m = 0; m < input.rows; ++m) {
    uint8_t* bits = out.bits.get() + m * out.stride;
    const int64_t at = m * input.row_stride;
    binary = (input.floats ? call.kernels->pack_floats(input.floats + at, input.units, bits)
                           : call.kernels->pack_bytes(input.bytes + at, input.units, bits)) &&
             binary;
  }
  if (binary) return Values::usable;
  out.bits = Buffer<uint8_t>();
  out.real = Buffer<float>(input.rows * input.units);
  uint32_t most = 0, below = 0;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1) \
    reduction(max : most) reduction(| : below)
  for (int64_t m = 0; m < input.rows; ++m) {
    float* row = out.real.get() + m * input.units;
    if (input.floats) {
      std::memcpy(row, input.floats + m * input.row_stride, static_cast<size_t>(input.units) * 4);
    } else {
      for (int64_t i = 0; i < input.units; ++i) row[i] = input.bytes[m * input.row_stride + i];
    }
    most = std::max(most, call.kernels->largest(row, input.units));
    if (bernoulli) below |= any_below(row, input.units);
  }
  if (most >= kInfinity) return Values::not_finite;
  return bernoulli && (most > kMost || below) ? Values::outside : Values::usable;
}

uint32_t largest_of(const Matrix& matrix, const Call& call) {
  const bool by_rows = matrix.col_stride == 1;
  const int64_t lines = by_rows ? matrix.rows : matrix.cols,
                n = by_rows ? matrix.cols : matrix.rows;
  const int64_t stride = by_rows ? matrix.row_stride : matrix.col_stride;
  const int threads = call.threads_for(lines * n / 4);
  uint32_t most = 0;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1) \
    reduction(max : most)
  for (int64_t i = 0; i < lines; ++i)
    most = std::max(most, call.kernels->largest(matrix.data + i * stride, n));
  return most;
}

bool all_finite(const float* values, int64_t n, const Call& call) {
  return !values || call.kernels->largest(values, n) < kInfinity;
}

int choose_group(int64_t rows) {
  // A chain pays 0.55 units of time for a look-up, a table one for each entry; per state looked up.
  int best = 1;
  double least = 1e300;
  for (int group = 1; group <= kMaxGroup; ++group) {
    const double cost = (0.55 * static_cast<double>(rows) + (1 << group)) / group;
    if (cost < least) {
      least = cost;
      best = group;
    }
  }
  return best;
}

namespace {

void allocate_bytes(OwnedOperand& out) {
  Operand& a = out.operand;
  a.bytes_stride = (a.K + 63) / 64 * 64;
  if (!out.bytes) out.bytes = Buffer<uint8_t>((a.rows + 32) * a.bytes_stride);
  a.bytes = out.bytes.get();
}

void expand_row(const uint8_t* bits, int64_t row, const Call& call, OwnedOperand& out) {
  const int64_t stride = out.operand.bytes_stride,
                written = (out.operand.K + kTile - 1) / kTile * kTile;
  uint8_t* bytes = out.bytes.get() + row * stride;
  call.kernels->expand_bits(bits, out.operand.K, bytes);
  std::memset(bytes + written, 0, static_cast<size_t>(stride - written));
}

}  // namespace

bool make_operand(const States& states, const float* factor, const Call& call, OwnedOperand& out) {
  out.operand = Operand{};
  out.operand.rows = states.rows;
  out.operand.K = states.units;
  const int64_t rows = states.rows, K = states.units;
  const int threads = call.threads_for(rows * K / 4);
  out.operand.digits = call.digits;
  const bool exact_bits = states.binary() && !factor;
  if (exact_bits && call.kernels->binary_as_bytes) {
    allocate_bytes(out);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t m = 0; m < rows; ++m)
      expand_row(states.bits.get() + m * states.stride, m, call, out);
    return true;
  }
  if (exact_bits) {
    const int group = choose_group(rows);
    const int64_t n_groups = (K + group - 1) / group;
    if (!out.groups) out.groups = Buffer<uint16_t>(rows * std::max<int64_t>(n_groups, 1));
    out.operand.groups = out.groups.get();
    out.operand.n_groups = n_groups;
    out.operand.group = group;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t m = 0; m < rows; ++m)
      call.kernels->group_offsets(states.bits.get() + m * states.stride, n_groups, group,
                                  out.groups.get() + m * n_groups);
    return true;
  }
  if (!out.fixed) out.fixed = Buffer<float>(rows * K);
  if (!out.row_scale) out.row_scale = Buffer<float>(rows);
  out.operand.fixed = out.fixed.get();
  out.operand.row_scale = out.row_scale.get();
  bool finite = true;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1) \
    reduction(&& : finite)
  for (int64_t m = 0; m < rows; ++m) {
    float* row = out.fixed.get() + m * K;
    for (int64_t i = 0; i < K; ++i) {
      const float x = states.at(m, i);
      row[i] = factor ? x * factor[i] : x;
    }
    const uint32_t most = call.kernels->largest(row, K);
    finite = most < kInfinity && finite;
    const float scale = most < kInfinity ? scale_of(most, call.digits) : 1.0f;
    out.row_scale.get()[m] = scale;
    call.kernels->fix(row, K, 1.0f / scale, row);
  }
  return finite;
}

OwnedOperand make_transposed(const States& states, bool real, float scale, const Call& call,
                             double* counts) {
  OwnedOperand out;
  const int64_t units = states.units, rows = states.rows;
  out.operand.rows = units + 1;
  out.operand.K = rows;
  out.operand.digits = call.digits;
  const int threads = call.threads_for(rows * units / 4);
  if (real) {
    out.fixed = Buffer<float>((units + 1) * rows);
    out.operand.fixed = out.fixed.get();
    const float inverse = 1.0f / scale;
    // Sixteen units at a time: a row of the states is read once, in order.
    const int64_t blocks = (units + kTile - 1) / kTile;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t first = block * kTile, count = std::min<int64_t>(kTile, units - first);
      float* lines = out.fixed.get() + first * rows;
      double sums[kTile] = {};
      for (int64_t m = 0; m < rows; ++m) {
        for (int64_t i = 0; i < count; ++i) {
          const float state = states.at(m, first + i);
          lines[i * rows + m] = state;
          sums[i] += state;
        }
      }
      for (int64_t i = 0; i < count; ++i) {
        counts[first + i] = sums[i];
        call.kernels->fix(lines + i * rows, rows, inverse, lines + i * rows);
      }
    }
    std::fill_n(out.fixed.get() + units * rows, rows, 1.0f);
    return out;
  }
  const int group = choose_group(units + 1);
  const int64_t n_groups = (rows + group - 1) / group;
  if (call.kernels->binary_as_bytes) {
    allocate_bytes(out);
  } else {
    out.operand.n_groups = n_groups;
    out.operand.group = group;
    out.groups = Buffer<uint16_t>((units + 1) * n_groups);
    out.operand.groups = out.groups.get();
  }
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    // Eight units at a time: their states over the whole batch as eight packed lines.
    const int64_t line_bytes = (rows + 7) / 8;
    Buffer<uint8_t> lines(8 * (line_bytes + 8));
#pragma omp for schedule(static)
    for (int64_t block = 0; block < (units + 8) / 8; ++block) {
      const int64_t first = 8 * block, count = std::min<int64_t>(8, units + 1 - first);
      for (int64_t m = 0; m < rows; m += 8) {
        uint64_t word = 0;
        const int64_t n = std::min<int64_t>(8, rows - m);
        for (int64_t r = 0; r < n; ++r) {
          uint64_t byte = first < units ? states.bits.get()[(m + r) * states.stride + block] : 0;
          if (units - first < 8) byte |= uint64_t{1} << (units - first);  // the row of ones
          word |= byte << (8 * r);
        }
        word = transpose8(word);
        for (int64_t i = 0; i < 8; ++i)
          lines.get()[i * (line_bytes + 8) + m / 8] = static_cast<uint8_t>(word >> (8 * i));
      }
      for (int64_t i = 0; i < count; ++i) {
        uint8_t* line = lines.get() + i * (line_bytes + 8);
        std::memset(line + line_bytes, 0, 8);
        if (call.kernels->binary_as_bytes) {
          expand_row(line, first + i, call, out);
        } else {
          call.kernels->group_offsets(line, n_groups, group,
                                      out.groups.get() + (first + i) * n_groups);
        }
        if (first + i == units) continue;
        int64_t ones = 0;
        for (int64_t w = 0; w < line_bytes; w += 8) {
          uint64_t word;
          std::memcpy(&word, line + w, 8);
          ones += __builtin_popcountll(word);
        }
        counts[first + i] = static_cast<double>(ones);
      }
    }
  }
  return out;
}

void for_each_part(int64_t tiles, int64_t rows, int threads,
                   const std::function<void(int64_t, int64_t, int64_t)>& work) {
  // With few tiles the rows are divided too; each part builds its own tables.
  int64_t parts = 1;
  if (tiles > 0 && tiles < 3 * threads)
    parts = std::max<int64_t>(1, std::min<int64_t>((3 * threads + tiles - 1) / tiles, rows / 64));
  const int64_t part_rows = (rows + parts - 1) / parts;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
  for (int64_t task = 0; task < tiles * parts; ++task) {
    const int64_t begin = task / tiles * part_rows, end = std::min(begin + part_rows, rows);
    if (begin < end) work(task % tiles, begin, end);
  }
}

void run(const HalfSweep& sweep, const Call& call) {
  const int64_t rows = sweep.given.rows, N = sweep.weight.cols;
  const int threads = call.threads_for(rows * N * (sweep.given.K / 32 + 8) / 8);
  for_each_part((N + kTile - 1) / kTile, rows, threads,
                [&](int64_t tile, int64_t begin, int64_t end) {
                  call.kernels->half_sweep(sweep, tile, begin, end);
                });
}

}  // namespace rbm::cpu
