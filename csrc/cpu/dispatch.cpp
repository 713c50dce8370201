// Chooses the instruction set: the widest that was built and that this processor runs.
#include <cstring>
#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "cpu/kernels.h"

namespace rbm::cpu {
namespace {

#if defined(__x86_64__) && defined(__linux__)
// AMX with int8 tiles, and the kernel's leave to use their registers.
bool has_amx() {
  unsigned a, b, c, d;
  const unsigned tile_and_int8 = 3u << 24;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & tile_and_int8) != tile_and_int8)
    return false;
  constexpr long kRequestPermission = 0x1023,
                 kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#else
bool has_amx() { return false; }
#endif

bool runs(const char* name) {
  if (std::strcmp(name, "plain") == 0) return true;
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi2");
  if (std::strcmp(name, "avx2") == 0) return avx2;
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (std::strcmp(name, "avx512") == 0 || std::strcmp(name, "amx_emulated") == 0) return avx512;
  if (std::strcmp(name, "amx") == 0) return avx512 && has_amx();
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
// Behind the plain ones, so that they run only when they are named: the first has not been measured
// on a processor with AMX yet, the second is for tests.
#ifdef RBM_HAVE_AMX
    &kAmxKernels,
#endif
#ifdef RBM_HAVE_AMX_EMULATED
    &kAmxEmulatedKernels,
#endif
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

}  // namespace rbm::cpu
