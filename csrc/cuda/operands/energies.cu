// Free energies from sums over the units: of each row, and the means of both phases.
#include <algorithm>

#include "cuda/operands/element.h"
#include "cuda/operands/operands.h"
#include "cuda/operands/reduce.h"

namespace rbm::cuda {
namespace {

// A warp for each row.
__global__ void __launch_bounds__(kOperandThreads) row_energies_kernel(const RowEnergies a) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kOperandWarps + threadIdx.x / 32;
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
  const int64_t blocks = (terms + 8 * kOperandThreads - 1) / (8 * kOperandThreads);
  return static_cast<int>(blocks < 1 ? 1 : blocks > kEnergyBlocks ? kEnergyBlocks : blocks);
}

__global__ void __launch_bounds__(kOperandThreads) mean_energies_kernel(const MeanEnergies a) {
  const int phase = static_cast<int>(blockIdx.y), lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t terms = a.slices * a.rows[phase];
  const int blocks = energy_blocks(terms);
  if (static_cast<int>(blockIdx.x) >= blocks) return;
  auto* sums = reinterpret_cast<double*>(shared_memory());  // [warps]
  auto* flag = reinterpret_cast<int32_t*>(sums + kOperandWarps);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kOperandThreads + threadIdx.x;
  const int64_t step = static_cast<int64_t>(blocks) * kOperandThreads;
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
    for (int i = 0; i < kOperandWarps; ++i) total += sums[i];
    partial[blockIdx.x] = total;
  }
  if (!last_of(blocks, a.blocks_done + phase, flag) || threadIdx.x >= 32) return;
  double total = 0.0;
  for (int i = lane; i < blocks; i += 32) total += partial[i];
  total = warp_sum(total) / static_cast<double>(a.rows[phase]);
  if (lane == 0) a.energies[phase] = static_cast<float>(total * *a.one);
}

}  // namespace

int row_energies(const RowEnergies& a, cudaStream_t stream) {
  const dim3 grid(blocks_of(a.states.rows, kOperandWarps));
  return launch(row_energies_kernel, {grid, dim3(kOperandThreads), 0, 1, stream}, a);
}

int mean_energies(const MeanEnergies& a, cudaStream_t stream) {
  const int blocks = energy_blocks(a.slices * std::max(a.rows[0], a.rows[1]));
  const dim3 grid(static_cast<unsigned>(blocks), 2);
  return launch(mean_energies_kernel,
                {grid, dim3(kOperandThreads), kOperandWarps * 8 + 16, 1, stream}, a);
}

}  // namespace rbm::cuda
