// The tiled half-sweep with Hopper's instructions.
#include "cuda/tiled/epilogue.h"
#include "cuda/tiled/half_sweep.h"
#include "cuda/tiled/product_sm90a.h"

namespace rbm::cuda {
namespace {

template <int digits> using Plan = sm90a::Plan<digits, 1, false>;

template <int digits> __global__ void __launch_bounds__(sm90a::kThreads, 1)
    half_sweep_kernel(const HalfSweep a) {
  if (guarded_out(a.guard)) return;
  using P = Plan<digits>;
  const int blocks = (a.given + kBlock - 1) / kBlock, rows = static_cast<int>(a.rows);
  const P plan{{blocks}};
  const auto finish = [&](int tile_row0, int unit0, sm90a::TileSums<P>& sums) {
    const int row0 = tile_row0 + static_cast<int>(threadIdx.x / 32) * 32;
    // Transposed results are padded to 128 rows, not to a tile's 256.
    if (row0 / kBlock > (rows - 1) / kBlock) return;
    constexpr int n = P::kUnits / 2;
    float x[2][n];
#pragma unroll
    for (int i = 0; i < 2 * n; ++i) {
      const int32_t low = sums.of[0][i / n][i % n], high = sums.of[P::kSets - 1][i / n][i % n];
      x[i / n][i % n] = digits == 2 ? static_cast<float>(low) : rounded(high, low);
    }
    const int end = unit0 + P::kUnits < a.units ? unit0 + P::kUnits : a.units;
#pragma unroll 1
    for (int unit = unit0; unit < end; unit += 32) {
      finish_half_sweep<digits, false>(
          a, row0, unit, [&](int g, int s, int i) { return x[s / 2][sm90a::index_of(g, s, i)]; });
      sm90a::next_units<32>(x);
    }
  };
  sm90a::multiply_tiles<true>(plan, {a.bits, 4 * blocks, rows}, a.weights, a.units, finish);
}

template <int digits> int launch_half_sweep(const HalfSweep& a, cudaStream_t stream) {
  unsigned blocks = 0;
  const int status = sm90a::blocks_for<Plan<digits>>(a.rows, a.units, &blocks);
  if (status != cudaSuccess) return status;
  return launch(
      half_sweep_kernel<digits>,
      {dim3(blocks), dim3(sm90a::kThreads), sm90a::shared_bytes<Plan<digits>>(), 1, stream}, a);
}

}  // namespace

int half_sweep_sm90a(const HalfSweep& a, int digits, cudaStream_t stream) {
  if (a.rows == 0 || a.units == 0) return cudaSuccess;
  if (a.given > sm90a::kMostTerms) return half_sweep(a, digits, false, stream);
  return digits == 2 ? launch_half_sweep<2>(a, stream) : launch_half_sweep<3>(a, stream);
}

}  // namespace rbm::cuda
