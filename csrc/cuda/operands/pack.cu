// States as bits, and clamped values put over states.
#include <algorithm>

#include "cuda/operands/element.h"
#include "cuda/operands/operands.h"
#include "cuda/operands/reduce.h"

namespace rbm::cuda {
namespace {

constexpr int kLoads = 8;  // that a thread has in flight before it uses the first
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

__global__ void __launch_bounds__(kOperandThreads)
    overwrite_clamped_kernel(const OverwriteClamped a) {
  const int64_t n = a.states.rows * a.states.cols;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kOperandThreads + threadIdx.x; i < n;
       i += static_cast<int64_t>(gridDim.x) * kOperandThreads) {
    const int64_t row = i / a.states.cols, unit = i % a.states.cols;
    const Matrix& from = a.mask[row * a.mask_stride + unit] ? a.values : a.states;
    a.out[i] = load_element(from.data, from.element, row * from.row_stride + unit);
  }
}

}  // namespace

int pack(const Pack& a, cudaStream_t stream) {
  const unsigned across = blocks_of(a.states.cols, kBlock);
  // Some thousand blocks fill any GPU; more would only mean more additions to the same sums.
  const unsigned down = std::min(blocks_of(a.states.rows, kBlock), 2048 / across + 1);
  return launch(pack_kernel, {dim3(across, down), dim3(kPackThreads), kPackBytes, 1, stream}, a);
}

int overwrite_clamped(const OverwriteClamped& a, cudaStream_t stream) {
  const int64_t blocks = (a.states.rows * a.states.cols + kOperandThreads - 1) / kOperandThreads;
  const dim3 grid(static_cast<unsigned>(std::min<int64_t>(blocks, 4096)));
  return launch(overwrite_clamped_kernel, {grid, dim3(kOperandThreads), 0, 1, stream}, a);
}

}  // namespace rbm::cuda
