// Which instruction set runs.
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace rbm {
namespace {

bool runs(const char* name) {
  if (std::strcmp(name, "plain") == 0) return true;
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  if (std::strcmp(name, "avx2") == 0) return avx2;
  if (std::strcmp(name, "avx512") == 0) {
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
#endif
  return false;
}

const Kernels* const kBuilt[] = {
#ifdef RBM_HAVE_AVX512
    &kAvx512Kernels,
#endif
#ifdef RBM_HAVE_AVX2
    &kAvx2Kernels,
#endif
    &kPlainKernels,
};

}  // namespace

const Kernels* kernels_named(const char* name) {
  for (const Kernels* candidate : kBuilt) {
    if (std::strcmp(candidate->name, name) == 0) return runs(name) ? candidate : nullptr;
  }
  return nullptr;
}

const Kernels* widest_kernels() {
  for (const Kernels* candidate : kBuilt) {
    if (runs(candidate->name)) return candidate;
  }
  return nullptr;
}

}  // namespace rbm
