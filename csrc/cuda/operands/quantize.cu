// Weights and real states as the digits of fixed-point numbers.
#include <algorithm>

#include "cuda/operands/element.h"
#include "cuda/operands/operands.h"
#include "cuda/operands/reduce.h"
#include "include/rbm/fixed_point.h"

namespace rbm::cuda {
namespace {

constexpr int32_t kOneBits = 0x3F800000, kInfinityBits = 0x7F800000;  // of 1.0f and infinity

// A matrix as rows whose elements lie side by side: its own rows, its columns, or all in one.
struct Rows {
  const void* data;
  Element element;
  int64_t rows, length, stride;
};

constexpr int kSegment = 4 * kOperandThreads;

__global__ void __launch_bounds__(kOperandThreads)
    largest_kernel(const Rows a, const Vectors vectors, int32_t* largest) {
  int32_t most = 0;
  for (int v = 0; v < 3; ++v) {
    if (vectors.data[v] == nullptr) continue;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * kOperandThreads + threadIdx.x;
         i < vectors.lengths[v]; i += static_cast<int64_t>(gridDim.x) * kOperandThreads) {
      if (magnitude_bits(vectors.data[v][i]) >= kInfinityBits) most = kInfinityBits;
    }
  }
  with_element(a.element, [&](auto typed) {
    const int64_t segments = (a.length + kSegment - 1) / kSegment;
    for (int64_t i = blockIdx.x; i < a.rows * segments; i += gridDim.x) {
      const int64_t row = i / segments * a.stride, first = i % segments * kSegment + threadIdx.x;
      float x[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int64_t at = first + j * kOperandThreads;
        x[j] = at < a.length ? load_element(a.data, decltype(typed)::value, row + at) : 0.0f;
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) most = most > magnitude_bits(x[j]) ? most : magnitude_bits(x[j]);
    }
  });
  most = warp_max(most);
  if (threadIdx.x % 32 == 0 && most != 0) atomic_max(largest, most);
}

// A tile of 64 x 64 numbers as packed digits in shared memory. Each row is padded by one word, so
// that rows and columns are both read without bank conflicts.
constexpr int kSide = 64, kPitch = kSide + 1, kTileBytes = kSide * (kPitch + 1) * 4;

constexpr int kTileShare =
    kSide * kSide / kOperandThreads;  // numbers of a tile that a thread loads

// Where a thread's number j lies in a tile: neighboring threads read neighboring numbers.
struct TilePlace {
  int row, col;
};
RBM_DEVICE TilePlace tile_place(int j, bool by_rows) {
  const int i = j * kOperandThreads + static_cast<int>(threadIdx.x);
  return by_rows ? TilePlace{i / kSide, i % kSide} : TilePlace{i % kSide, i / kSide};
}

// Zero outside the matrix.
RBM_DEVICE void load_tile(float (&x)[kTileShare], const Matrix& m, int64_t row0, int64_t col0,
                          bool by_rows) {
  with_element(m.element, [&](auto typed) {
#pragma unroll
    for (int j = 0; j < kTileShare; ++j) {
      const TilePlace at = tile_place(j, by_rows);
      const int64_t row = row0 + at.row, col = col0 + at.col;
      x[j] = row < m.rows && col < m.cols ? load_element(m.data, decltype(typed)::value,
                                                         row * m.row_stride + col * m.col_stride)
                                          : 0.0f;
    }
  });
}

// Writes terms term0 .. term0 + 63 of rows row0 .. row0 + 63; term t of row r is
// words[t * term_pitch + r * row_pitch]. `permuted`: rows are units as row_of_unit.
RBM_DEVICE void write_tile(const Planes& planes, int digits, int64_t term0, int64_t row0,
                           const uint32_t* words, int term_pitch, int row_pitch, bool permuted) {
  const int row = static_cast<int>(threadIdx.x) % kSide, chunk = threadIdx.x / kSide;
  words += (permuted ? static_cast<int>(unit_of_row(row)) : row) * row_pitch;
  uint32_t packed[kChunk];
#pragma unroll
  for (int byte = 0; byte < kChunk; ++byte) {
    const int term = chunk / 2 * kStep + term_of_byte(chunk % 2 * kChunk + byte);
    packed[byte] = words[term * term_pitch];
  }
#pragma unroll
  for (int d = 0; d < 3; ++d) {
    if (d >= digits) break;
    uint32_t out[4] = {};
#pragma unroll
    for (int byte = 0; byte < kChunk; ++byte) {
      out[byte / 4] |= (packed[byte] >> (8 * d) & 0xFFu) << (byte % 4 * 8);
    }
    uint8_t* place = planes.data + chunk_offset(planes, d, term0 / kChunk + chunk, row0 + row);
    *reinterpret_cast<uint4*>(place) = make_uint4(out[0], out[1], out[2], out[3]);
  }
}

__global__ void __launch_bounds__(kOperandThreads, 2)
    weights_kernel(const WeightPlanes a, int digits) {
  auto* words = reinterpret_cast<uint32_t*>(shared_memory());  // [visible][hidden]
  const float scale = scale_of(*a.largest, digits), inverse = inverse_of(scale);
  const int64_t visible0 = static_cast<int64_t>(blockIdx.x) * kSide;
  const int64_t hidden0 = static_cast<int64_t>(blockIdx.y) * kSide;
  if (blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0) {
    *a.scale = scale;
    *a.one = mul(scale, inverse);
  }
  const bool by_rows = a.W.col_stride == 1;
  float x[kTileShare];
  load_tile(x, a.W, visible0, hidden0, by_rows);
#pragma unroll
  for (int j = 0; j < kTileShare; ++j) {
    const TilePlace at = tile_place(j, by_rows);
    words[at.row * kPitch + at.col] = signed_digits(quantize(x[j], inverse));
  }
  __syncthreads();
  if (a.to_hidden.data) write_tile(a.to_hidden, digits, visible0, hidden0, words, kPitch, 1, true);
  if (a.to_visible.data)
    write_tile(a.to_visible, digits, hidden0, visible0, words, 1, kPitch, true);
}

__global__ void __launch_bounds__(kOperandThreads)
    precisions_kernel(const float* log_var, int units, float* out) {
  const int i = static_cast<int>(blockIdx.x * kOperandThreads + threadIdx.x);
  if (i < units) out[i] = exp_neg(log_var[i]);
}

RBM_DEVICE float factor_of(const float* factor, int64_t unit) {
  return factor == nullptr ? 1.0f : factor[unit];
}

// A warp for each row.
__global__ void __launch_bounds__(kOperandThreads)
    row_scales_kernel(const ValuePlanes a, int digits) {
  if (guarded_out(a.guard)) return;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kOperandWarps + threadIdx.x / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if (row >= a.states.rows) return;
  int32_t most = 0;
  with_element(a.states.element, [&](auto typed) {
#pragma unroll 8
    for (int64_t i = lane; i < a.states.cols; i += 32) {
      const float x =
          load_element(a.states.data, decltype(typed)::value, row * a.states.row_stride + i);
      const int32_t bits = magnitude_bits(mul(x, factor_of(a.factor, i)));
      most = most > bits ? most : bits;
    }
  });
  most = warp_max(most);
  if (lane == 0) a.scales[row] = scale_of(most, digits);
}

__global__ void __launch_bounds__(kOperandThreads) values_kernel(const ValuePlanes a, int digits) {
  if (guarded_out(a.guard)) return;
  auto* words = reinterpret_cast<uint32_t*>(shared_memory());  // [row][unit]
  const int64_t row0 = static_cast<int64_t>(blockIdx.x) * kSide;
  const int64_t unit0 = static_cast<int64_t>(blockIdx.y) * kSide;
  auto* inverses = reinterpret_cast<float*>(words + kSide * kPitch);  // [row]
  if (threadIdx.x < kSide) {
    const int64_t row = row0 + threadIdx.x;
    inverses[threadIdx.x] = row < a.states.rows ? inverse_of(a.scales[row]) : 1.0f;
  }
  float x[kTileShare];
  load_tile(x, a.states, row0, unit0, true);
  const int64_t unit = unit0 + threadIdx.x % kSide;  // of all that the thread loaded
  const float factor = unit < a.states.cols ? factor_of(a.factor, unit) : 1.0f;
  __syncthreads();
#pragma unroll
  for (int j = 0; j < kTileShare; ++j) {
    const TilePlace at = tile_place(j, true);
    words[at.row * kPitch + at.col] = signed_digits(quantize(mul(x[j], factor), inverses[at.row]));
  }
  __syncthreads();
  write_tile(a.planes, digits, unit0, row0, words, 1, kPitch, false);
}

// A phase's rows are summed in that many parts on every device, so that the order of the additions
// is always the same.
RBM_HD int64_t slabs_of(int64_t rows) {
  const int64_t slabs = (rows + 255) / 256;
  return slabs < 1 ? 1 : slabs > 64 ? 64 : slabs;
}

// Blocks of 32 units x 8 lines of rows.
constexpr int kMeasureBytes = 2 * kOperandThreads * 8 + 16;

__global__ void __launch_bounds__(kOperandThreads) measure_kernel(const PhaseValues a) {
  const int phase = static_cast<int>(blockIdx.z), lane = static_cast<int>(threadIdx.x) % 32,
            line = static_cast<int>(threadIdx.x) / 32;
  const Matrix& states = a.states[phase];
  const int64_t slabs = slabs_of(states.rows), slab = blockIdx.y;
  if (guarded_out(a.guard) || slab >= slabs) return;
  auto* sums = reinterpret_cast<double*>(shared_memory());  // [2][8][32]
  auto* flag = reinterpret_cast<int32_t*>(sums + 2 * kOperandThreads);
  const int64_t units = states.cols, unit = static_cast<int64_t>(blockIdx.x) * 32 + lane;
  const int64_t each = (states.rows + slabs - 1) / slabs;
  const int64_t end = each * (slab + 1) < states.rows ? each * (slab + 1) : states.rows;
  double total = 0.0, spread = 0.0;
  int32_t most = 0;
  bool real = false;
  if (unit < units) {
    const float center = a.center == nullptr ? 0.0f : a.center[unit];
    with_element(states.element, [&](auto typed) {
#pragma unroll 8
      for (int64_t row = each * slab + line; row < end; row += kOperandWarps) {
        const float x =
            load_element(states.data, decltype(typed)::value, row * states.row_stride + unit);
        real |= x != 0.0f && x != 1.0f;
        most = most > magnitude_bits(x) ? most : magnitude_bits(x);
        total += static_cast<double>(x);
        const double distance = static_cast<double>(x) - static_cast<double>(center);
        spread += distance * distance;
      }
    });
  }
  most = warp_max(most);
  if (ballot(real) != 0 && lane == 0) atomic_or(a.is_real[phase], 1);
  if (lane == 0) atomic_max(a.largest[phase], most);

  sums[threadIdx.x] = total;
  sums[kOperandThreads + threadIdx.x] = spread;
  __syncthreads();
  double* partial = a.partial + (phase == 0 ? 0 : 2 * slabs_of(a.states[0].rows) * units);
  if (line < 2 && unit < units) {
    double sum = 0.0;
    for (int i = 0; i < kOperandWarps; ++i) sum += sums[line * kOperandThreads + 32 * i + lane];
    partial[(2 * slab + line) * units + unit] = sum;
  }
  int32_t* done = a.columns_done + phase * gridDim.x + blockIdx.x;
  if (!last_of(static_cast<int32_t>(slabs), done, flag) || line >= 2 || unit >= units) return;
  double sum = 0.0;
  for (int64_t i = 0; i < slabs; ++i) sum += partial[(2 * i + line) * units + unit];
  double* out = line == 0 ? a.totals[phase] : a.spreads[phase];
  if (out != nullptr) out[unit] = sum;
}

__global__ void __launch_bounds__(kOperandThreads)
    term_values_kernel(const PhaseValues a, int digits) {
  if (guarded_out(a.guard)) return;
  int32_t most = 0;
  bool real = false;
#pragma unroll
  for (int phase = 0; phase < 2; ++phase) {
    const int32_t bits = *a.is_real[phase] ? *a.largest[phase] : kOneBits;
    most = most > bits ? most : bits;
    real |= *a.is_real[phase] != 0;
  }
  const float scale = real ? scale_of(most, digits) : 1.0f, inverse = inverse_of(scale);
  if (blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0) *a.scale = scale;

  auto* words = reinterpret_cast<uint32_t*>(shared_memory());  // [row][unit]
  const int64_t term0 = static_cast<int64_t>(blockIdx.x) * kSide;
  const int64_t unit0 = static_cast<int64_t>(blockIdx.y) * kSide;
  const int64_t data_terms = round_up(a.states[0].rows, kBlock);
  const Matrix& states = a.states[term0 < data_terms ? 0 : 1];
  const int64_t row0 = term0 < data_terms ? term0 : term0 - data_terms;
  float x[kTileShare];
  load_tile(x, states, row0, unit0, true);
#pragma unroll
  for (int j = 0; j < kTileShare; ++j) {
    const TilePlace at = tile_place(j, true);
    words[at.row * kPitch + at.col] = signed_digits(quantize(x[j], inverse));
  }
  __syncthreads();
  write_tile(a.planes, digits, term0, unit0, words, kPitch, 1, false);
}

dim3 tiles(int64_t x, int64_t y) { return dim3(blocks_of(x, kSide), blocks_of(y, kSide)); }

}  // namespace

int quantize_weights(const WeightPlanes& a, const Vectors& vectors, int digits,
                     cudaStream_t stream) {
  const Matrix& W = a.W;
  const bool by_rows = W.col_stride == 1;
  Rows rows{W.data, W.element, by_rows ? W.rows : W.cols, by_rows ? W.cols : W.rows,
            by_rows ? W.row_stride : W.col_stride};
  if (rows.stride == rows.length) rows = {W.data, W.element, 1, W.rows * W.cols, 0};
  const int64_t segments = rows.rows * ((rows.length + kSegment - 1) / kSegment);
  const dim3 grid(static_cast<unsigned>(std::min<int64_t>(segments, 2048)));
  const int status =
      launch(largest_kernel, {grid, dim3(kOperandThreads), 0, 1, stream}, rows, vectors, a.largest);
  if (status) return status;
  return launch(weights_kernel,
                {tiles(round_up(W.rows, kBlock), round_up(W.cols, kBlock)), dim3(kOperandThreads),
                 kTileBytes, 1, stream},
                a, digits);
}

int precisions(const float* log_var, int units, float* out, cudaStream_t stream) {
  const dim3 grid(blocks_of(units, kOperandThreads));
  return launch(precisions_kernel, {grid, dim3(kOperandThreads), 0, 1, stream}, log_var, units,
                out);
}

int quantize_values(const ValuePlanes& a, int digits, cudaStream_t stream) {
  const dim3 rows(blocks_of(a.states.rows, kOperandWarps));
  const int status =
      launch(row_scales_kernel, {rows, dim3(kOperandThreads), 0, 1, stream}, a, digits);
  if (status) return status;
  return launch(
      values_kernel,
      {tiles(a.planes.rows, a.planes.terms), dim3(kOperandThreads), kTileBytes, 1, stream}, a,
      digits);
}

int64_t phase_partials(int64_t data_rows, int64_t chain_rows, int units) {
  return 2 * units * (slabs_of(data_rows) + slabs_of(chain_rows));
}

int phase_values(const PhaseValues& a, int digits, cudaStream_t stream) {
  const int64_t slabs = std::max(slabs_of(a.states[0].rows), slabs_of(a.states[1].rows));
  const dim3 grid(blocks_of(a.states[0].cols, 32), static_cast<unsigned>(slabs), 2);
  const int status =
      launch(measure_kernel, {grid, dim3(kOperandThreads), kMeasureBytes, 1, stream}, a);
  if (status) return status;
  return launch(
      term_values_kernel,
      {tiles(a.planes.terms, a.planes.rows), dim3(kOperandThreads), kTileBytes, 1, stream}, a,
      digits);
}

}  // namespace rbm::cuda
