#include <algorithm>

#include "cuda/operands/element.h"
#include "cuda/operands/operands.h"
#include "include/rbm/fixed_point.h"

namespace rbm::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int32_t kOneBits = 0x3F800000, kInfinityBits = 0x7F800000;

RBM_DEVICE bool guarded_out(const Guard& guard) {
  return guard.state != nullptr && *guard.state != guard.wanted;
}

RBM_DEVICE int32_t warp_max(int32_t x) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    const int32_t other = shuffle_xor(x, mask);
    x = x > other ? x : other;
  }
  return x;
}
RBM_DEVICE double warp_sum(double x) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}

// Whether this block is the last of `blocks` to come here. What the others wrote before is visible
// then, so it can add up their parts in an order that does not depend on who came when.
RBM_DEVICE bool last_of(int32_t blocks, int32_t* done, int32_t* shared_flag) {
  thread_fence();
  __syncthreads();
  if (threadIdx.x == 0) *shared_flag = atomic_add(done, 1) == blocks - 1;
  __syncthreads();
  thread_fence();
  return *shared_flag != 0;
}

unsigned blocks_of(int64_t n, int64_t each) { return static_cast<unsigned>((n + each - 1) / each); }

struct Lines {
  const void* data;
  Element element;
  int64_t lines, length, stride;
};

constexpr int kSegment = 4 * kThreads;

__global__ void __launch_bounds__(kThreads)
    largest_kernel(const Lines a, const Vectors vectors, int32_t* largest) {
  int32_t most = 0;
  for (int v = 0; v < 3; ++v) {
    if (vectors.data[v] == nullptr) continue;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
         i < vectors.lengths[v]; i += static_cast<int64_t>(gridDim.x) * kThreads) {
      if (magnitude_bits(vectors.data[v][i]) >= kInfinityBits) most = kInfinityBits;
    }
  }
  with_element(a.element, [&](auto typed) {
    const int64_t segments = (a.length + kSegment - 1) / kSegment;
    for (int64_t i = blockIdx.x; i < a.lines * segments; i += gridDim.x) {
      const int64_t line = i / segments * a.stride, first = i % segments * kSegment + threadIdx.x;
      float x[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int64_t at = first + j * kThreads;
        x[j] = at < a.length ? load_element(a.data, decltype(typed)::value, line + at) : 0.0f;
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) most = most > magnitude_bits(x[j]) ? most : magnitude_bits(x[j]);
    }
  });
  most = warp_max(most);
  if (threadIdx.x % 32 == 0 && most != 0) atomic_max(largest, most);
}

// A tile of 64 x 64 numbers as packed digits in shared memory, a line longer by one word than it is
// so that both its lines and its columns are read without bank conflicts.
constexpr int kTile = 64, kPitch = kTile + 1, kTileBytes = kTile * (kPitch + 1) * 4;

constexpr int kTileShare = kTile * kTile / kThreads;  // numbers of a tile that a thread loads

// Where a thread's number j lies in a tile: neighbouring threads read neighbouring numbers.
struct TilePlace {
  int row, col;
};
RBM_DEVICE TilePlace tile_place(int j, bool by_rows) {
  const int i = j * kThreads + static_cast<int>(threadIdx.x);
  return by_rows ? TilePlace{i / kTile, i % kTile} : TilePlace{i % kTile, i / kTile};
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
  const int row = static_cast<int>(threadIdx.x) % kTile, chunk = threadIdx.x / kTile;
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

__global__ void __launch_bounds__(kThreads, 2) weights_kernel(const WeightPlanes a, int digits) {
  auto* words = reinterpret_cast<uint32_t*>(shared_memory());  // [visible][hidden]
  const float scale = scale_of(*a.largest, digits), inverse = inverse_of(scale);
  const int64_t visible0 = static_cast<int64_t>(blockIdx.x) * kTile;
  const int64_t hidden0 = static_cast<int64_t>(blockIdx.y) * kTile;
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
    words[at.row * kPitch + at.col] = signed_digits(quantise(x[j], inverse));
  }
  __syncthreads();
  if (a.to_hidden.data) write_tile(a.to_hidden, digits, visible0, hidden0, words, kPitch, 1, true);
  if (a.to_visible.data)
    write_tile(a.to_visible, digits, hidden0, visible0, words, 1, kPitch, true);
}

constexpr int kLoads = 8;  // of a thread before it uses the first
constexpr int kPackThreads = 512, kPackBytes = 2 * kBlock * 16;

// 128 rows x 128 units a block, 32 x 32 a warp: bit `lane` of the word that the lanes vote is the
// unit's, bit r of the word that a lane collects is the row's.
__global__ void __launch_bounds__(kPackThreads, 2) pack_kernel(const Pack a) {
  auto* row_words = reinterpret_cast<uint32_t*>(shared_memory());  // [row][4]
  uint32_t* unit_words = row_words + 4 * kBlock;                   // [unit][4]
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int unit_word = warp % 4, row_word = warp / 4;
  const int64_t rows = a.states.rows, units = a.states.cols, words = words_of(units);
  const int64_t first_unit = static_cast<int64_t>(blockIdx.x) * kBlock;
  const int64_t unit = first_unit + 32 * unit_word + lane;
  bool real = false;
  unsigned long long on = 0;
  for (int64_t block = blockIdx.y; block * kBlock < rows; block += gridDim.y) {
    const int64_t row0 = block * kBlock + 32 * row_word;
    uint32_t mine = 0, column = 0;
    with_element(a.states.element, [&](auto typed) {
      for (int first = 0; first < 32; first += kLoads) {
        float x[kLoads];
#pragma unroll
        for (int r = 0; r < kLoads; ++r) {
          const int64_t row = row0 + first + r;
          x[r] = row < rows && unit < units ? load_element(a.states.data, decltype(typed)::value,
                                                           row * a.states.row_stride + unit)
                                            : 0.0f;
        }
#pragma unroll
        for (int r = 0; r < kLoads; ++r) {
          real |= x[r] != 0.0f && x[r] != 1.0f;
          const uint32_t word = ballot(x[r] != 0.0f);
          if (lane == first + r) mine = word;
          column |= (word >> lane & 1u) << (first + r);
        }
      }
    });
    row_words[(32 * row_word + lane) * 4 + unit_word] = mine;
    unit_words[(32 * unit_word + lane) * 4 + row_word] = column;
    __syncthreads();
    if (thread < kBlock) {
      const int64_t row = block * kBlock + thread;
      const uint4 four = reinterpret_cast<const uint4*>(row_words)[thread];
      if (row < rows) *reinterpret_cast<uint4*>(a.bits + row * words + first_unit / 32) = four;
    } else if (thread < 2 * kBlock && a.terms != nullptr && first_unit + thread - kBlock < units) {
      const int64_t at = first_unit + thread - kBlock;
      const uint4 four = reinterpret_cast<const uint4*>(unit_words)[thread - kBlock];
      *reinterpret_cast<uint4*>(a.terms + at * a.terms_words + a.term_word + 4 * block) = four;
      on += popcount(four.x) + popcount(four.y) + popcount(four.z) + popcount(four.w);
    }
    __syncthreads();
  }
  if (on != 0) atomic_add(a.sums + first_unit + thread - kBlock, on);
  if (a.is_real != nullptr && ballot(real) != 0 && lane == 0) atomic_or(a.is_real, 1);
}

__global__ void __launch_bounds__(kThreads)
    precisions_kernel(const float* log_var, int units, float* out) {
  const int i = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
  if (i < units) out[i] = exp_neg(log_var[i]);
}

RBM_DEVICE float factor_of(const float* factor, int64_t unit) {
  return factor == nullptr ? 1.0f : factor[unit];
}

// A warp for each row.
__global__ void __launch_bounds__(kThreads) row_scales_kernel(const ValuePlanes a, int digits) {
  if (guarded_out(a.guard)) return;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
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

__global__ void __launch_bounds__(kThreads) values_kernel(const ValuePlanes a, int digits) {
  if (guarded_out(a.guard)) return;
  auto* words = reinterpret_cast<uint32_t*>(shared_memory());  // [row][unit]
  const int64_t row0 = static_cast<int64_t>(blockIdx.x) * kTile;
  const int64_t unit0 = static_cast<int64_t>(blockIdx.y) * kTile;
  auto* inverses = reinterpret_cast<float*>(words + kTile * kPitch);  // [row]
  if (threadIdx.x < kTile) {
    const int64_t row = row0 + threadIdx.x;
    inverses[threadIdx.x] = row < a.states.rows ? inverse_of(a.scales[row]) : 1.0f;
  }
  float x[kTileShare];
  load_tile(x, a.states, row0, unit0, true);
  const int64_t unit = unit0 + threadIdx.x % kTile;  // of all that the thread loaded
  const float factor = unit < a.states.cols ? factor_of(a.factor, unit) : 1.0f;
  __syncthreads();
#pragma unroll
  for (int j = 0; j < kTileShare; ++j) {
    const TilePlace at = tile_place(j, true);
    words[at.row * kPitch + at.col] = signed_digits(quantise(mul(x[j], factor), inverses[at.row]));
  }
  __syncthreads();
  write_tile(a.planes, digits, unit0, row0, words, 1, kPitch, false);
}

// A phase's rows are summed in so many parts, whoever runs them.
RBM_HD int64_t slabs_of(int64_t rows) {
  const int64_t slabs = (rows + 255) / 256;
  return slabs < 1 ? 1 : slabs > 64 ? 64 : slabs;
}

// Blocks of 32 units x 8 lines of rows.
constexpr int kMeasureBytes = 2 * kThreads * 8 + 16;

__global__ void __launch_bounds__(kThreads) measure_kernel(const PhaseValues a) {
  const int phase = static_cast<int>(blockIdx.z), lane = static_cast<int>(threadIdx.x) % 32,
            line = static_cast<int>(threadIdx.x) / 32;
  const Matrix& states = a.states[phase];
  const int64_t slabs = slabs_of(states.rows), slab = blockIdx.y;
  if (guarded_out(a.guard) || slab >= slabs) return;
  auto* sums = reinterpret_cast<double*>(shared_memory());  // [2][8][32]
  auto* flag = reinterpret_cast<int32_t*>(sums + 2 * kThreads);
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
      for (int64_t row = each * slab + line; row < end; row += kWarps) {
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
  sums[kThreads + threadIdx.x] = spread;
  __syncthreads();
  double* partial = a.partial + (phase == 0 ? 0 : 2 * slabs_of(a.states[0].rows) * units);
  if (line < 2 && unit < units) {
    double sum = 0.0;
    for (int i = 0; i < kWarps; ++i) sum += sums[line * kThreads + 32 * i + lane];
    partial[(2 * slab + line) * units + unit] = sum;
  }
  int32_t* done = a.columns_done + phase * gridDim.x + blockIdx.x;
  if (!last_of(static_cast<int32_t>(slabs), done, flag) || line >= 2 || unit >= units) return;
  double sum = 0.0;
  for (int64_t i = 0; i < slabs; ++i) sum += partial[(2 * i + line) * units + unit];
  double* out = line == 0 ? a.totals[phase] : a.spreads[phase];
  if (out != nullptr) out[unit] = sum;
}

__global__ void __launch_bounds__(kThreads) term_values_kernel(const PhaseValues a, int digits) {
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
  const int64_t term0 = static_cast<int64_t>(blockIdx.x) * kTile;
  const int64_t unit0 = static_cast<int64_t>(blockIdx.y) * kTile;
  const int64_t data_terms = round_up(a.states[0].rows, kBlock);
  const Matrix& states = a.states[term0 < data_terms ? 0 : 1];
  const int64_t row0 = term0 < data_terms ? term0 : term0 - data_terms;
  float x[kTileShare];
  load_tile(x, states, row0, unit0, true);
#pragma unroll
  for (int j = 0; j < kTileShare; ++j) {
    const TilePlace at = tile_place(j, true);
    words[at.row * kPitch + at.col] = signed_digits(quantise(x[j], inverse));
  }
  __syncthreads();
  write_tile(a.planes, digits, term0, unit0, words, kPitch, 1, false);
}

// A warp for each row.
__global__ void __launch_bounds__(kThreads) row_energies_kernel(const RowEnergies a) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if (row >= a.states.rows) return;
  double visible = 0.0, hidden = 0.0;
  with_element(a.states.element, [&](auto typed) {
#pragma unroll 4
    for (int64_t i = lane; i < a.states.cols; i += 32) {
      const double x =
          load_element(a.states.data, decltype(typed)::value, row * a.states.row_stride + i);
      const double bias = a.bias[i];
      if (a.precision == nullptr) {
        visible -= x * bias;
      } else {
        visible += (x - bias) * (x - bias) * static_cast<double>(a.precision[i]) / 2;
      }
    }
  });
  for (int64_t i = lane; i < a.slices; i += 32) hidden += a.softplus[i * a.states.rows + row];
  visible = warp_sum(visible);
  hidden = warp_sum(hidden);
  const double beta = a.betas == nullptr ? a.beta : a.betas[row];
  if (lane == 0) a.energies[row] = static_cast<float>((beta * visible - hidden) * *a.one);
}

RBM_HD int energy_blocks(int64_t terms) {
  const int64_t blocks = (terms + 8 * kThreads - 1) / (8 * kThreads);
  return static_cast<int>(blocks < 1 ? 1 : blocks > kEnergyBlocks ? kEnergyBlocks : blocks);
}

__global__ void __launch_bounds__(kThreads) mean_energies_kernel(const MeanEnergies a) {
  const int phase = static_cast<int>(blockIdx.y), lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t terms = a.slices * a.rows[phase];
  const int blocks = energy_blocks(terms);
  if (static_cast<int>(blockIdx.x) >= blocks) return;
  auto* sums = reinterpret_cast<double*>(shared_memory());  // [warps]
  auto* flag = reinterpret_cast<int32_t*>(sums + kWarps);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t step = static_cast<int64_t>(blocks) * kThreads;
  const bool real = a.is_real != nullptr && *a.is_real != 0;
  double sum = 0.0;
  for (int64_t i = first; i < a.n_visible; i += step) {
    const double bias = a.bias[i];
    if (a.precision != nullptr) {
      sum += a.spreads[phase][i] * static_cast<double>(a.precision[i]) / 2;
    } else {
      sum -= bias * (real ? a.totals[phase][i] : static_cast<double>(a.counts[phase][i]));
    }
  }
#pragma unroll 8
  for (int64_t i = first; i < terms; i += step) sum -= a.softplus[phase][i];
  sum = warp_sum(sum);
  if (lane == 0) sums[threadIdx.x / 32] = sum;
  __syncthreads();
  double* partial = a.partial + phase * kEnergyBlocks;
  if (threadIdx.x == 0) {
    double total = 0.0;
    for (int i = 0; i < kWarps; ++i) total += sums[i];
    partial[blockIdx.x] = total;
  }
  if (!last_of(blocks, a.blocks_done + phase, flag) || threadIdx.x >= 32) return;
  double total = 0.0;
  for (int i = lane; i < blocks; i += 32) total += partial[i];
  total = warp_sum(total) / static_cast<double>(a.rows[phase]);
  if (lane == 0) a.energies[phase] = static_cast<float>(total * *a.one);
}

__global__ void __launch_bounds__(kThreads) place_kernel(const Place a) {
  const int64_t n = a.states.rows * a.states.cols;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < n;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int64_t row = i / a.states.cols, unit = i % a.states.cols;
    const Matrix& from = a.mask[row * a.mask_stride + unit] ? a.values : a.states;
    a.out[i] = load_element(from.data, from.element, row * from.row_stride + unit);
  }
}

dim3 tiles(int64_t x, int64_t y) { return dim3(blocks_of(x, kTile), blocks_of(y, kTile)); }

}  // namespace

int quantise_weights(const WeightPlanes& a, const Vectors& vectors, int digits,
                     cudaStream_t stream) {
  const Matrix& W = a.W;
  const bool by_rows = W.col_stride == 1;
  Lines lines{W.data, W.element, by_rows ? W.rows : W.cols, by_rows ? W.cols : W.rows,
              by_rows ? W.row_stride : W.col_stride};
  if (lines.stride == lines.length) lines = {W.data, W.element, 1, W.rows * W.cols, 0};
  const int64_t segments = lines.lines * ((lines.length + kSegment - 1) / kSegment);
  const dim3 grid(static_cast<unsigned>(std::min<int64_t>(segments, 2048)));
  const int status =
      launch(largest_kernel, {grid, dim3(kThreads), 0, 1, stream}, lines, vectors, a.largest);
  if (status) return status;
  return launch(weights_kernel,
                {tiles(round_up(W.rows, kBlock), round_up(W.cols, kBlock)), dim3(kThreads),
                 kTileBytes, 1, stream},
                a, digits);
}

int pack(const Pack& a, cudaStream_t stream) {
  const unsigned across = blocks_of(a.states.cols, kBlock);
  // Some thousand blocks fill any GPU; more would only mean more additions to the same sums.
  const unsigned down = std::min(blocks_of(a.states.rows, kBlock), 2048 / across + 1);
  return launch(pack_kernel, {dim3(across, down), dim3(kPackThreads), kPackBytes, 1, stream}, a);
}

int precisions(const float* log_var, int units, float* out, cudaStream_t stream) {
  const dim3 grid(blocks_of(units, kThreads));
  return launch(precisions_kernel, {grid, dim3(kThreads), 0, 1, stream}, log_var, units, out);
}

int quantise_values(const ValuePlanes& a, int digits, cudaStream_t stream) {
  const dim3 rows(blocks_of(a.states.rows, kWarps));
  const int status = launch(row_scales_kernel, {rows, dim3(kThreads), 0, 1, stream}, a, digits);
  if (status) return status;
  return launch(values_kernel,
                {tiles(a.planes.rows, a.planes.terms), dim3(kThreads), kTileBytes, 1, stream}, a,
                digits);
}

int64_t phase_partials(int64_t data_rows, int64_t chain_rows, int units) {
  return 2 * units * (slabs_of(data_rows) + slabs_of(chain_rows));
}

int phase_values(const PhaseValues& a, int digits, cudaStream_t stream) {
  const int64_t slabs = std::max(slabs_of(a.states[0].rows), slabs_of(a.states[1].rows));
  const dim3 grid(blocks_of(a.states[0].cols, 32), static_cast<unsigned>(slabs), 2);
  const int status = launch(measure_kernel, {grid, dim3(kThreads), kMeasureBytes, 1, stream}, a);
  if (status) return status;
  return launch(term_values_kernel,
                {tiles(a.planes.terms, a.planes.rows), dim3(kThreads), kTileBytes, 1, stream}, a,
                digits);
}

int row_energies(const RowEnergies& a, cudaStream_t stream) {
  const dim3 grid(blocks_of(a.states.rows, kWarps));
  return launch(row_energies_kernel, {grid, dim3(kThreads), 0, 1, stream}, a);
}

int mean_energies(const MeanEnergies& a, cudaStream_t stream) {
  const int blocks = energy_blocks(a.slices * std::max(a.rows[0], a.rows[1]));
  const dim3 grid(static_cast<unsigned>(blocks), 2);
  return launch(mean_energies_kernel, {grid, dim3(kThreads), kWarps * 8 + 16, 1, stream}, a);
}

int place(const Place& a, cudaStream_t stream) {
  const int64_t blocks = (a.states.rows * a.states.cols + kThreads - 1) / kThreads;
  const dim3 grid(static_cast<unsigned>(std::min<int64_t>(blocks, 4096)));
  return launch(place_kernel, {grid, dim3(kThreads), 0, 1, stream}, a);
}

}  // namespace rbm::cuda
