// The gradient of both phases for any GPU from sm_80: visible units x hidden units, summed over the
// data and then over the chains.
#include "cuda/tiled/gradient.h"
#include "cuda/tiled/gradient_epilogue.h"
#include "cuda/tiled/product.h"

namespace rbm::cuda {
namespace {

// A sum of fixed-point products (128 * 255, three pairs of digits at most) stays in an int32 over
// this many steps of 32 terms; one of bits (255 each) over 8 million terms, which the caller keeps.
constexpr int64_t kStepsOfValues = 512;

// Groups of 16 hidden units of a warp. Fixed-point values need more sums for each unit.
template <bool real> constexpr int kGroups = real ? 1 : 2;

template <int digits, bool real> __global__ void __launch_bounds__(kTileThreads, 1)
    gradient_kernel(const Gradient a) {
  if (guarded_out(a.guard)) return;
  constexpr int groups = kGroups<real>, units = 32 * groups, n = 16 * groups;
  const int64_t row0 = static_cast<int64_t>(blockIdx.x) * kTileRows;
  const int64_t unit0 = static_cast<int64_t>(blockIdx.y) * units;

  // The weighted sums of the data, and then those of the chains minus them.
  double difference[n] = {};
#pragma unroll 1
  for (int phase = 0; phase < 2; ++phase) {
    const int64_t first = phase == 0 ? 0 : round_up(a.data_rows, kBlock) / kStep;
    const int64_t rows = phase == 0 ? a.data_rows : a.chain_rows;
    const int64_t last = first + (rows + kStep - 1) / kStep;
    const double weight = phase == 0 ? a.data_weight : a.chain_weight;
    if constexpr (real) {
      int64_t total[n] = {};
#pragma unroll 1
      for (int64_t step = first; step < last; step += kStepsOfValues) {
        Sums<2 * digits - 1, groups> sums;
        clear(sums);
        const int64_t end = step + kStepsOfValues < last ? step + kStepsOfValues : last;
        multiply_values<digits, false, groups>(sums, a.values, row0, a.statistics, unit0,
                                               {step, end});
#pragma unroll
        for (int j = 0; j < n; ++j) {
          int32_t parts[2 * digits - 1];
          read(parts, sums, j / 16, j / 4 % 4, j % 4);
          total[j] += whole_sum(parts);
        }
      }
#pragma unroll
      for (int j = 0; j < n; ++j) {
        difference[j] = weight * static_cast<double>(total[j]) - difference[j];
      }
    } else {
      Sums<digits> sums;
      clear(sums);
      multiply_bits<digits, false>(sums, a.bits, a.statistics.terms / kStep, a.n_visible, row0,
                                   a.statistics, unit0, {first, last});
#pragma unroll
      for (int j = 0; j < n; ++j) {
        int32_t parts[digits];
        read(parts, sums, j / 16, j / 4 % 4, j % 4);
        difference[j] = weight * static_cast<double>(whole_sum(parts)) - difference[j];
      }
    }
  }

  const Warp warp = this_warp();
#pragma unroll
  for (int j = 0; j < n; j += 4) {
    const double four[4] = {difference[j], difference[j + 1], difference[j + 2], difference[j + 3]};
    finish_gradient<real>(a, row0 + warp.row + warp.r + 8 * (j / 4 % 4),
                          unit0 + warp.unit * groups / 2 + 16 * (j / 16) + 4 * warp.q, four);
  }
  finish_bias_gradients<real>(a, row0, kTileRows, unit0, units, kTileThreads);
}

}  // namespace

int gradient(const Gradient& a, int digits, bool real, cudaStream_t stream) {
  const int units = 32 * (real ? kGroups<true> : kGroups<false>);
  const dim3 grid(static_cast<unsigned>((a.n_visible + kTileRows - 1) / kTileRows),
                  static_cast<unsigned>((a.n_hidden + units - 1) / units));
  const unsigned bytes =
      real ? (digits == 2 ? values_shared_bytes<2, 1>() : values_shared_bytes<3, 1>())
           : (digits == 2 ? bits_shared_bytes<2>() : bits_shared_bytes<3>());
  const auto kernel = real ? (digits == 2 ? gradient_kernel<2, true> : gradient_kernel<3, true>)
                           : (digits == 2 ? gradient_kernel<2, false> : gradient_kernel<3, false>);
  return launch(kernel, {grid, dim3(kTileThreads), bytes, 1, stream}, a);
}

}  // namespace rbm::cuda
