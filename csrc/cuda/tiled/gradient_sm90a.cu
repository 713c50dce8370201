// The gradient of both phases with Hopper's instructions, from bits.
#include "cuda/tiled/gradient.h"
#include "cuda/tiled/gradient_epilogue.h"
#include "cuda/tiled/product_sm90a.h"

namespace rbm::cuda {
namespace {

// With equal counts the sums are those of the difference. Else both phases' are kept apart, since
// they are weighted by more than an int32 holds.
template <int digits, bool equal> using Plan = sm90a::Plan<digits, 2, !equal>;

template <int digits, bool equal>
RBM_DEVICE double difference(const Gradient& a, const int32_t (&sums)[Plan<digits, equal>::kSets]) {
  constexpr int kGroups = Plan<digits, equal>::kGroups;
  int32_t first[kGroups], second[kGroups];
#pragma unroll
  for (int i = 0; i < kGroups; ++i) {
    first[i] = sums[i];
    second[i] = sums[equal ? i : kGroups + i];
  }
  if (equal) return a.chain_weight * static_cast<double>(whole_sum(first));
  return a.chain_weight * static_cast<double>(whole_sum(second)) -
         a.data_weight * static_cast<double>(whole_sum(first));
}

template <int digits, bool equal> __global__ void __launch_bounds__(sm90a::kThreads, 1)
    gradient_kernel(const Gradient a) {
  if (guarded_out(a.guard)) return;
  using P = Plan<digits, equal>;
  const int data_blocks = static_cast<int>((a.data_rows + kBlock - 1) / kBlock);
  const int chain_blocks = static_cast<int>((a.chain_rows + kBlock - 1) / kBlock);
  const P plan{{data_blocks, chain_blocks}};
  const int words = static_cast<int>(a.statistics.terms / 32);
  const auto finish = [&](int row0, int unit0, sm90a::TileSums<P>& sums) {
    const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
    const int end = unit0 + P::kUnits < a.n_hidden ? unit0 + P::kUnits : a.n_hidden;
#pragma unroll 2
    for (int unit = unit0; unit < end; unit += 16) {
#pragma unroll
      for (int slot = 0; slot < 4; ++slot) {
        double four[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          int32_t of[P::kSets];
#pragma unroll
          for (int set = 0; set < P::kSets; ++set) {
            of[set] = sums.of[set][slot / 2][sm90a::index_of(0, slot, i)];
          }
          four[i] = difference<digits, equal>(a, of);
        }
        finish_gradient<false>(a, row0 + 32 * warp + lane / 4 + 8 * slot, unit + 4 * (lane % 4),
                               four);
      }
#pragma unroll
      for (auto& of_set : sums.of) sm90a::next_units<16>(of_set);
    }
    finish_bias_gradients<false>(a, row0, sm90a::kTileRows, unit0, P::kUnits, sm90a::kTileRows);
  };
  sm90a::multiply_tiles<false>(plan, {a.bits, words, a.n_visible}, a.statistics, a.n_hidden,
                               finish);
}

template <int digits, bool equal> int launch_gradient(const Gradient& a, cudaStream_t stream) {
  using P = Plan<digits, equal>;
  unsigned blocks = 0;
  const int status = sm90a::blocks_for<P>(a.n_visible, a.n_hidden, &blocks);
  if (status != cudaSuccess) return status;
  return launch(gradient_kernel<digits, equal>,
                {dim3(blocks), dim3(sm90a::kThreads), sm90a::shared_bytes<P>(), 1, stream}, a);
}

}  // namespace

int gradient_sm90a(const Gradient& a, int digits, cudaStream_t stream) {
  if (a.data_rows > sm90a::kMostTerms || a.chain_rows > sm90a::kMostTerms) {
    return gradient(a, digits, false, stream);
  }
  const bool equal = a.data_rows == a.chain_rows;
  if (digits == 2) return (equal ? launch_gradient<2, true> : launch_gradient<2, false>)(a, stream);
  return (equal ? launch_gradient<3, true> : launch_gradient<3, false>)(a, stream);
}

}  // namespace rbm::cuda
