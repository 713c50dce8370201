// The tiled half-sweep for any GPU from sm_80: a product of 128 rows x 64 units, and its epilogue.
#include "cuda/tiled/epilogue.h"
#include "cuda/tiled/half_sweep.h"
#include "cuda/tiled/product.h"

namespace rbm::cuda {
namespace {

// The sums are rounded all at once: 32 floats leave the epilogue more registers than up to 160
// integers would.
template <int digits, bool real, int weights>
RBM_DEVICE void finish(const HalfSweep& a, int64_t row0, int64_t unit0, const Sums<weights>& sums) {
  float x[2][4][4];
#pragma unroll
  for (int j = 0; j < 32; ++j) {
    int32_t parts[weights];
    read(parts, sums, j / 16, j / 4 % 4, j % 4);
    if constexpr (real) {
      x[j / 16][j / 4 % 4][j % 4] = real_sum(whole_sum(parts));
    } else {
      x[j / 16][j / 4 % 4][j % 4] = binary_sum(parts);
    }
  }
  const Warp warp = this_warp();
  finish_half_sweep<digits, real>(a, row0 + warp.row, unit0 + warp.unit,
                                  [&](int g, int s, int i) { return x[g][s][i]; });
}

template <int digits> __global__ void __launch_bounds__(kTileThreads, 1)
    half_sweep_of_bits(const HalfSweep a) {
  if (guarded_out(a.guard)) return;
  const int64_t row0 = static_cast<int64_t>(blockIdx.x) * kTileRows;
  const int64_t unit0 = static_cast<int64_t>(blockIdx.y) * kTileUnits;
  Sums<digits> sums;
  clear(sums);
  multiply_bits<digits, true>(sums, a.bits, words_of(a.given), a.rows, row0, a.weights, unit0,
                              {0, (a.given + kStep - 1) / kStep});
  finish<digits, false>(a, row0, unit0, sums);
}

template <int digits> __global__ void __launch_bounds__(kTileThreads, 1)
    half_sweep_of_values(const HalfSweep a) {
  if (guarded_out(a.guard)) return;
  const int64_t row0 = static_cast<int64_t>(blockIdx.x) * kTileRows;
  const int64_t unit0 = static_cast<int64_t>(blockIdx.y) * kTileUnits;
  Sums<2 * digits - 1> sums;
  clear(sums);
  multiply_values<digits, true, 2>(sums, a.values, row0, a.weights, unit0,
                                   {0, (a.given + kStep - 1) / kStep});
  finish<digits, true>(a, row0, unit0, sums);
}

}  // namespace

int half_sweep(const HalfSweep& a, int digits, bool real, cudaStream_t stream) {
  if (a.rows == 0 || a.units == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>((a.rows + kTileRows - 1) / kTileRows),
                  static_cast<unsigned>((a.units + kTileUnits - 1) / kTileUnits));
  const unsigned bytes =
      real ? (digits == 2 ? values_shared_bytes<2, 2>() : values_shared_bytes<3, 2>())
           : (digits == 2 ? bits_shared_bytes<2>() : bits_shared_bytes<3>());
  const auto kernel = real ? (digits == 2 ? half_sweep_of_values<2> : half_sweep_of_values<3>)
                           : (digits == 2 ? half_sweep_of_bits<2> : half_sweep_of_bits<3>);
  return launch(kernel, {grid, dim3(kTileThreads), bytes, 1, stream}, a);
}

}  // namespace rbm::cuda
