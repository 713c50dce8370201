// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), and the
// counter that every backend of this package gives it.
#pragma once

#include "include/rbm/platform.h"

namespace rbm {

constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;

// The draws of one half-sweep: the key and the two counter words that all units and chains share.
struct HalfSweepKey {
  uint32_t key0, key1;  // the seed, low and high
  uint32_t step;        // low word of offset + half-sweep index
  uint32_t stream;      // its high 24 bits above, the stream's number in the low 8
};

RBM_HD HalfSweepKey half_sweep_key(uint64_t seed, uint64_t step, uint32_t stream) {
  return {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32),
          static_cast<uint32_t>(step), (static_cast<uint32_t>(step >> 32) << 8) | (stream & 0xFFu)};
}

// All 64 bits. nvcc would multiply zero-extended operands, with an addition more each time.
RBM_HD uint64_t multiply_wide(uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH__
  uint64_t product;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
  return product;
#else
  return static_cast<uint64_t>(a) * b;
#endif
}

// Ten rounds over the counter c, in place. Unit u of a chain uses word u % 4 of the counter
// (u / 4, chain, step, stream).
RBM_HD void philox4x32(uint32_t c[4], uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = multiply_wide(kPhiloxM0, c[0]);
    const uint64_t p1 = multiply_wide(kPhiloxM1, c[2]);
    const uint32_t c0 = static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ key0;
    const uint32_t c2 = static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ key1;
    c[0] = c0;
    c[1] = static_cast<uint32_t>(p1);
    c[2] = c2;
    c[3] = static_cast<uint32_t>(p0);
    key0 += kPhiloxW0;
    key1 += kPhiloxW1;
  }
}

}  // namespace rbm
