// The main loop of the tiled kernels: exact integer products by mma.sync, on any GPU from sm_80.
//
// A block of 256 threads makes 128 rows x 64 units, each of its eight warps 32 x 32; warps 0 to 3
// share the first 32 units. The digits of B stream through shared memory. A's bits go straight to
// registers, as a step of 32 terms is one word of a row; fixed-point values stream like B.
#pragma once

#include "cuda/arch/device.h"
#include "include/rbm/operand_layout.h"

namespace rbm::cuda {

constexpr int kTileThreads = 256;
constexpr int kTileRows = 128, kTileUnits = 64;

struct Warp {
  int lane, r, q;  // lane = 4 r + q
  int row, unit;   // where its 32 x 32 lie in the tile
};
RBM_DEVICE Warp this_warp() {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  return {lane, lane / 4, lane % 4, 32 * (warp % 4), 32 * (warp / 4)};
}

// A warp's sums, one set for each weight of the digits: [groups of 16 units][16 rows][8 units][4].
template <int weights, int groups = 2> struct Sums {
  static constexpr int kWeights = weights, kGroups = groups;
  int32_t of[weights][groups][2][2][4];
};

template <int weights, int groups> RBM_DEVICE void clear(Sums<weights, groups>& sums) {
#pragma unroll
  for (int w = 0; w < weights; ++w)
#pragma unroll
    for (int j = 0; j < 16 * groups; ++j) sums.of[w][j / 16][j / 8 % 2][j / 4 % 2][j % 4] = 0;
}

// The sums of group g, slot s and unit i (see epilogue.h) of all weights.
template <int weights, int groups> RBM_DEVICE void read(int32_t (&out)[weights],
                                                        const Sums<weights, groups>& sums, int g,
                                                        int s, int i) {
#pragma unroll
  for (int w = 0; w < weights; ++w) out[w] = sums.of[w][g][s / 2][i / 2][s % 2 * 2 + i % 2];
}

// The steps of 32 terms that a product sums: from first_step (a multiple of 4) up to last_step.
struct Terms {
  int64_t first_step, last_step;
};

// A tile of planes for one stage: `rows` rows of `chunks` chunks of every digit.
template <int digits, int chunks, int rows>
RBM_DEVICE void copy_planes(unsigned char* shared, const Planes& planes, int64_t row0,
                            int64_t first_chunk) {
  constexpr int pieces = digits * chunks * rows;
#pragma unroll 1  // unrolled, the addresses of all pieces would stay in registers
  for (int first = 0; first < pieces; first += kTileThreads) {
    const int piece = first + static_cast<int>(threadIdx.x);
    if (pieces % kTileThreads != 0 && piece >= pieces) break;
    const int row = piece % rows, chunk = piece / rows % chunks, digit = piece / rows / chunks;
    copy_async16(shared + piece * kChunk,
                 planes.data + chunk_offset(planes, digit, first_chunk + chunk, row0 + row), true);
  }
}

// Where lane's row of the four matrices of 8 rows lies: two of rows by two of chunks. B's fragments
// run along the chunks first, A's along the rows.
template <int rows>
RBM_DEVICE const unsigned char* b_matrix(const unsigned char* tile, int row, int chunk, int lane) {
  return tile + ((chunk + lane / 8 % 2) * rows + row + 8 * (lane / 16) + lane % 8) * kChunk;
}
template <int rows>
RBM_DEVICE const unsigned char* a_matrix(const unsigned char* tile, int row, int chunk, int lane) {
  return tile + ((chunk + lane / 16) * rows + row + 8 * (lane / 8 % 2) + lane % 8) * kChunk;
}

constexpr int kBitStages = 3;
template <int digits> constexpr unsigned bits_shared_bytes() {
  return kBitStages * digits * kBlock * kTileUnits;
}

// sums[digit] += A's bits times that digit of B, signed or not.
template <int digits, bool b_signed>
RBM_DEVICE void multiply_bits(Sums<digits>& sums, const uint32_t* bits, int64_t words, int64_t rows,
                              int64_t row0, const Planes& b, int64_t unit0, const Terms& terms) {
  constexpr int kChunks = kBlock / kChunk, kStage = digits * kBlock * kTileUnits;
  unsigned char* shared = shared_memory();
  const Warp warp = this_warp();
  const int64_t first = terms.first_step / 4, last = (terms.last_step + 3) / 4;
  if (first >= last) return;  // a layer without units

  // Rows past the last read the last one: what they make is not used.
  const uint32_t* row_bits[4];
#pragma unroll
  for (int s = 0; s < 4; ++s) {
    const int64_t row = row0 + warp.row + warp.r + 8 * s;
    row_bits[s] = bits + (row < rows ? row : rows - 1) * words;
  }
  const auto fetch_bits = [&](uint4(&four)[4], int64_t block) {
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      four[s] = *reinterpret_cast<const uint4*>(row_bits[s] + 4 * (block < last ? block : first));
    }
  };
  const auto fetch_planes = [&](int64_t block) {
    if (block < last) {
      unsigned char* stage = shared + (block - first) % kBitStages * kStage;
      copy_planes<digits, kChunks, kTileUnits>(stage, b, unit0, block * kChunks);
    }
    copy_async_commit();  // an empty group keeps the count of groups
  };

  uint4 now[4], next[4];
  for (int s = 0; s < kBitStages - 1; ++s) fetch_planes(first + s);
  fetch_bits(next, first);
  for (int64_t block = first; block < last; ++block) {
#pragma unroll
    for (int s = 0; s < 4; ++s) now[s] = next[s];
    copy_async_wait<kBitStages - 2>();
    __syncthreads();  // this stage has arrived, and all have read the one that is filled next
    fetch_planes(block + kBitStages - 1);
    fetch_bits(next, block + 1);
    const unsigned char* stage = shared + (block - first) % kBitStages * kStage;
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      if (4 * block + step >= terms.last_step) break;
      uint32_t a[2][4];
#pragma unroll
      for (int s = 0; s < 4; ++s) {
        const uint32_t word = step == 0   ? now[s].x
                              : step == 1 ? now[s].y
                              : step == 2 ? now[s].z
                                          : now[s].w;
        a[s / 2][s % 2] = word >> warp.q & 0x01010101u;
        a[s / 2][s % 2 + 2] = word >> (warp.q + 4) & 0x01010101u;
      }
#pragma unroll
      for (int d = 0; d < digits; ++d) {
#pragma unroll
        for (int g = 0; g < 2; ++g) {
          uint32_t f[4];
          load_matrices(f, b_matrix<kTileUnits>(stage + d * kBlock * kTileUnits, warp.unit + 16 * g,
                                                2 * step, warp.lane));
          const uint32_t tiles[2][2] = {{f[0], f[1]}, {f[2], f[3]}};
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            if constexpr (b_signed) {
              mma_u8s8(sums.of[d][g][j / 2][j % 2], a[j / 2], tiles[j % 2]);
            } else {
              mma_u8u8(sums.of[d][g][j / 2][j % 2], a[j / 2], tiles[j % 2]);
            }
          }
        }
      }
    }
  }
  copy_async_wait<0>();
  __syncthreads();  // the stages may be filled again
}

constexpr int kValueStages = 2, kValueTerms = 64;
template <int digits, int groups> constexpr unsigned values_shared_bytes() {
  return kValueStages * digits * kValueTerms * (kTileRows + 32 * groups);
}

// sums[w] += the products of A's digit d and B's digit w - d, A signed, B signed or not. A block
// has 32 * groups units, each of its warps half of them.
template <int digits, bool b_signed, int groups>
RBM_DEVICE void multiply_values(Sums<2 * digits - 1, groups>& sums, const Planes& a, int64_t row0,
                                const Planes& b, int64_t unit0, const Terms& terms) {
  constexpr int kUnits = 32 * groups, kChunks = kValueTerms / kChunk;
  constexpr int kPlaneA = kValueTerms * kTileRows, kPlaneB = kValueTerms * kUnits;
  constexpr int kStage = digits * (kPlaneA + kPlaneB);
  unsigned char* shared = shared_memory();
  const Warp warp = this_warp();
  const int first_unit = warp.unit / 2 * groups;
  const int64_t first = terms.first_step / 2, last = (terms.last_step + 1) / 2;
  if (first >= last) return;

  const auto fetch = [&](int64_t block) {
    if (block < last) {
      unsigned char* stage = shared + (block - first) % kValueStages * kStage;
      copy_planes<digits, kChunks, kTileRows>(stage, a, row0, block * kChunks);
      copy_planes<digits, kChunks, kUnits>(stage + digits * kPlaneA, b, unit0, block * kChunks);
    }
    copy_async_commit();
  };

  fetch(first);
  for (int64_t block = first; block < last; ++block) {
    copy_async_wait<0>();
    __syncthreads();
    fetch(block + 1);
    const unsigned char* stage = shared + (block - first) % kValueStages * kStage;
    const unsigned char* stage_b = stage + digits * kPlaneA;
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      if (2 * block + step >= terms.last_step) break;
#pragma unroll
      for (int g = 0; g < groups; ++g) {
        uint32_t f[digits][4];
#pragma unroll
        for (int d = 0; d < digits; ++d) {
          load_matrices(f[d], b_matrix<kUnits>(stage_b + d * kPlaneB, first_unit + 16 * g, 2 * step,
                                               warp.lane));
        }
#pragma unroll
        for (int da = 0; da < digits; ++da) {
#pragma unroll
          for (int t = 0; t < 2; ++t) {
            uint32_t rows[4];
            load_matrices(rows, a_matrix<kTileRows>(stage + da * kPlaneA, warp.row + 16 * t,
                                                    2 * step, warp.lane));
#pragma unroll
            for (int db = 0; db < digits; ++db) {
              const uint32_t tiles[2][2] = {{f[db][0], f[db][1]}, {f[db][2], f[db][3]}};
#pragma unroll
              for (int n = 0; n < 2; ++n) {
                if constexpr (b_signed) {
                  mma_s8s8(sums.of[da + db][g][t][n], rows, tiles[n]);
                } else {
                  mma_s8u8(sums.of[da + db][g][t][n], rows, tiles[n]);
                }
              }
            }
          }
        }
      }
    }
  }
  copy_async_wait<0>();
  __syncthreads();
}

}  // namespace rbm::cuda
