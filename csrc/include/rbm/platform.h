// What host and device code share: integer types and the qualifier of shared functions.
#pragma once

#include <cstdint>

// Internal linkage everywhere: the CPU kernels are compiled once per instruction set, and a linker
// that merged two copies of an inline function could hand AVX-512 code to an older processor.
#if defined(__CUDACC__)
#define RBM_HD static __host__ __device__ __forceinline__
#else
#define RBM_HD static inline
#endif
