// The main loop of the tiled kernels with Hopper's instructions: exact products of bits and planes
// by wgmma, for models too large to stay on chip.
//
// A block works through tiles of 256 rows, a warpgroup of 128 threads on each 128 of them, while
// a third warpgroup's first warp copies B's planes into a ring of stages. A's bits go from global
// memory straight to the registers that wgmma takes. wgmma leaves free which rows of A it is given:
// here warp w's two operands are rows 32 w + 16 t + 8 s + r (t the operand, s and r its rows), so
// that a warp has 32 consecutive rows and a thread those that epilogue.h expects.
//
// A thread has 128 registers for sums: 128 units of one int32, 64 of two or 32 of four. Two digits
// share one, the upper one's sums times 256 before the lower one's are added; that holds for up to
// 65,535 terms.
#pragma once

#include "cuda/arch/device.h"
#include "cuda/arch/hopper.h"
#include "include/rbm/operand_layout.h"

namespace rbm::cuda::sm90a {

constexpr int kWarpgroups = 2;  // that multiply
constexpr int kThreads = 128 * (kWarpgroups + 1);
constexpr int kTileRows = 128 * kWarpgroups;
constexpr int kRingBytes = 14 * 16 * 1024;
constexpr int kChunks = kBlock / kChunk;
constexpr int kMostTerms = 65535;

// How a tile's sums are made: in passes over the terms of a phase, one digit of B at a time. A
// gradient has two phases, data and chains, and wants their difference, or the sums of each apart.
template <int digits, int phases, bool apart> struct Plan {
  static constexpr int kGroups = digits - 1;  // of digits that share an int32: 0 and 1, or 0 | 1, 2
  static constexpr int kSets = kGroups * (apart ? phases : 1);
  static constexpr int kUnits = 128 / kSets;
  static constexpr int kStageBytes = kBlock * kUnits;
  static constexpr int kStages = kRingBytes / kStageBytes;
  // The second warpgroup starts that many stages late and stays behind, so that one finishes its
  // tile while the other multiplies. The rest of the ring is for copies ahead of the first.
  static constexpr int kLag = kStages - kStages / 3;

  int blocks[phases];  // of 128 terms; a phase starts where the one before ends
};

struct Pass {
  int digit;
  int first_block, last_block;
  uint32_t factor;  // of the sums so far, modulo 2^32
};

template <int digits, int phases, bool apart>
RBM_DEVICE int passes_of(const Plan<digits, phases, apart>&, int set) {
  const int shared_digits = digits == 2 || set % (digits - 1) == 1 ? 2 : 1;
  return apart ? shared_digits : shared_digits * phases;
}

template <int digits, int phases, bool apart>
RBM_DEVICE Pass pass_of(const Plan<digits, phases, apart>& plan, int set, int index) {
  const int phase = apart ? set / (digits - 1) : index % phases;
  const int top = digits == 2 ? 1 : 2 * (set % (digits - 1));
  const int first = phase == 0 ? 0 : plan.blocks[0];
  const int last = phase == 0 ? plan.blocks[0] : first + plan.blocks[phases - 1];
  if (apart || phases == 1) return {top - index, first, last, 256u};
  // Of two phases the first is subtracted: it is added to the negative of what the sums should be.
  return {top - index / phases, first, last, phase == 0 ? 0u - 256u : 0u - 1u};
}

// A thread's sums: [set][operand t][4 * (tile of 8 units) + 2 * s + e].
template <class P> struct TileSums {
  int32_t of[P::kSets][2][P::kUnits / 2];
};

// Where those of group g, slot s and unit i (see epilogue.h) lie in of[set][s / 2].
RBM_DEVICE constexpr int index_of(int g, int s, int i) {
  return 8 * g + i / 2 * 4 + s % 2 * 2 + i % 2;
}

// Brings what belongs to the units after the first `units` to the front. Registers cannot be
// indexed at run time, and a copy of the epilogue for each part would not stay in the instruction
// cache.
template <int units, class T, int n> RBM_DEVICE void next_units(T (&values)[2][n]) {
#pragma unroll
  for (int i = 0; i < n; ++i) {
#pragma unroll
    for (int t = 0; t < 2; ++t) values[t][i] = i + units / 2 < n ? values[t][i + units / 2] : T(0);
  }
}

// Stages of 128 terms of B, as [8 chunks][units][16]. `full` awaits the copies, `empty` the warps
// of each warpgroup that multiplies: [warpgroup][stage].
struct Ring {
  unsigned char* stages;
  uint64_t *full, *empty;
};
template <class P> constexpr unsigned shared_bytes() {
  return kRingBytes + 8 * (1 + kWarpgroups) * P::kStages;
}

template <class P> RBM_DEVICE Ring make_ring() {
  unsigned char* shared = shared_memory();
  uint64_t* barriers = reinterpret_cast<uint64_t*>(shared + kRingBytes);
  const Ring ring{shared, barriers, barriers + P::kStages};
  const int i = static_cast<int>(threadIdx.x);
  if (i < (1 + kWarpgroups) * P::kStages) {
    barrier_init(&barriers[i], i < P::kStages ? 1 : 4);
    barrier_fence_init();
  }
  __syncthreads();
  return ring;
}

// Where the `count`-th stage that is filled lies, and which of its barriers' phases that is.
template <class P> RBM_DEVICE uint32_t stage_of(uint32_t count) { return count % P::kStages; }
template <class P> RBM_DEVICE uint32_t parity_of(uint32_t count) { return count / P::kStages % 2; }

// One warp: the planes of a tile in the order of its passes. `count` counts the stages.
template <class P> RBM_DEVICE void copy_tile(const P& plan, const Ring& ring, uint32_t& count,
                                             const Planes& b, int unit0) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int64_t rows = b.rows - unit0 < P::kUnits ? b.rows - unit0 : P::kUnits;
  const uint32_t bytes = static_cast<uint32_t>(rows) * kChunk;  // of a chunk
#pragma unroll 1
  for (int set = 0; set < P::kSets; ++set) {
#pragma unroll 1
    for (int index = 0; index < passes_of(plan, set); ++index) {
      const Pass pass = pass_of(plan, set, index);
#pragma unroll 1
      for (int block = pass.first_block; block < pass.last_block; ++block, ++count) {
        const uint32_t stage = stage_of<P>(count), parity = parity_of<P>(count);
        uint64_t* full = &ring.full[stage];
        for (int warpgroup = 0; warpgroup < kWarpgroups; ++warpgroup) {
          barrier_wait(&ring.empty[warpgroup * P::kStages + stage], parity ^ 1u);
        }
        if (lane == 0) barrier_arrive_expect(full, kChunks * bytes);
        warp_sync();
        if (lane < kChunks) {
          bulk_copy(ring.stages + stage * P::kStageBytes + lane * P::kUnits * kChunk,
                    b.data + chunk_offset(b, pass.digit, block * kChunks + lane, unit0), bytes,
                    full);
        }
      }
    }
  }
}

// The bits of A, whose rows are those of the product.
struct BitRows {
  const uint32_t* bits;
  int words, rows;
};

// What a thread that multiplies needs of a tile.
struct Multiplier {
  int lane;
  uint64_t* empty;  // of its warpgroup
  const uint4* rows[4];
};

RBM_DEVICE void fetch_bits(uint4 (&bits)[4], const Multiplier& self, int block) {
#pragma unroll
  for (int s = 0; s < 4; ++s) bits[s] = self.rows[s][block];
}

RBM_DEVICE uint32_t word_of(const uint4& four, int step) {
  return step == 0 ? four.x : step == 1 ? four.y : step == 2 ? four.z : four.w;
}

// sums += the bits of one block times a stage of B. The next block's bits are fetched meanwhile.
template <class P, bool b_signed>
RBM_DEVICE void multiply_block(int32_t (&sums)[2][P::kUnits / 2], uint32_t (&a)[2][2][4],
                               const uint4 (&bits)[4], uint4 (&next)[4], int block,
                               const Pass& pass, const Multiplier& self, const Ring& ring,
                               uint32_t& count) {
  constexpr uint32_t leading = P::kUnits * kChunk, stride = 8 * kChunk;
  const uint32_t stage = stage_of<P>(count);
  fetch_bits(next, self, block + 1 < pass.last_block ? block + 1 : block);
  barrier_wait(&ring.full[stage], parity_of<P>(count));
  const uint64_t b = matrix_descriptor(ring.stages + stage * P::kStageBytes, leading, stride);
#pragma unroll
  for (int step = 0; step < 4; ++step) {
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      const uint32_t word = word_of(bits[s], step) >> self.lane % 4;
      a[step % 2][s / 2][s % 2] = word & 0x01010101u;
      a[step % 2][s / 2][s % 2 + 2] = word >> 4 & 0x01010101u;
    }
    wgmma_fence();
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      wgmma_registers<P::kUnits, b_signed>(sums[t], a[step % 2][t], b + 2 * step * (leading >> 4));
    }
    wgmma_commit();
    wgmma_wait<1>();  // all but the step just begun: what it read may be overwritten
    // A longer branch here makes ptxas serialize the wgmma.
    if (step == 0 && block > pass.first_block && self.lane == 0) {
      barrier_arrive(&self.empty[stage_of<P>(count - 1)]);
    }
  }
  ++count;
}

// sums += the rows' bits times a digit of B.
template <class P, bool b_signed>
RBM_DEVICE void multiply_pass(int32_t (&sums)[2][P::kUnits / 2], const Pass& pass,
                              const Multiplier& self, const Ring& ring, uint32_t& count) {
  if (pass.first_block == pass.last_block) return;
  uint32_t a[2][2][4];  // by turns: wgmma reads one while the other is made
  // Also by turns, in place of copies that would wait for what has just been fetched.
  uint4 even[4], odd[4];
  fetch_bits(even, self, pass.first_block);
#pragma unroll 1
  for (int block = pass.first_block;; block += 2) {
    multiply_block<P, b_signed>(sums, a, even, odd, block, pass, self, ring, count);
    if (block + 1 == pass.last_block) break;
    multiply_block<P, b_signed>(sums, a, odd, even, block + 1, pass, self, ring, count);
    if (block + 2 == pass.last_block) break;
  }
  wgmma_wait<0>();
#pragma unroll
  for (auto& of_rows : sums) wgmma_results(of_rows);
  if (self.lane == 0) barrier_arrive(&self.empty[stage_of<P>(count - 1)]);
}

template <class P, bool b_signed> RBM_DEVICE void multiply_tile(TileSums<P>& sums, const P& plan,
                                                                const Multiplier& self,
                                                                const Ring& ring, uint32_t& count) {
#pragma unroll
  for (int set = 0; set < P::kSets; ++set) {
#pragma unroll
    for (int i = 0; i < P::kUnits; ++i) sums.of[set][i % 2][i / 2] = 0;
#pragma unroll 1
    for (int index = 0; index < passes_of(plan, set); ++index) {
      const Pass pass = pass_of(plan, set, index);
#pragma unroll
      for (int i = 0; i < P::kUnits; ++i) {
        int32_t& sum = sums.of[set][i % 2][i / 2];
        sum = static_cast<int32_t>(static_cast<uint32_t>(sum) * pass.factor);
      }
      multiply_pass<P, b_signed>(sums.of[set], pass, self, ring, count);
    }
  }
}

// The second warpgroup follows when the first is done with the stage kLag - 1, or with its tile.
// The barrier cannot be a phase further, as the ring is not filled again without the second.
template <class P> RBM_DEVICE void wait_for_lead(const P& plan, const Ring& ring) {
  int stages = 0;
  for (int set = 0; set < P::kSets; ++set) {
    for (int index = 0; index < passes_of(plan, set); ++index) {
      const Pass pass = pass_of(plan, set, index);
      stages += pass.last_block - pass.first_block;
    }
  }
  const int lead = stages < P::kLag ? stages : P::kLag;
  if (lead > 0) barrier_wait(&ring.empty[lead - 1], 0);
}

// All tiles of the product of `a` and B, spread over the blocks of the grid. Tiles of one column
// follow each other, so that those in flight share B's planes in the L2 cache. finish(row0, unit0,
// sums) gets the tile's first row and unit; a warp's sums are those of rows row0 + 32 * warp on.
template <bool b_signed, class P, class Finish>
RBM_DEVICE void multiply_tiles(const P& plan, const BitRows& a, const Planes& b, int units,
                               const Finish& finish) {
  const Ring ring = make_ring<P>();
  const int row_tiles = (a.rows + kTileRows - 1) / kTileRows;
  const int tiles = row_tiles * ((units + P::kUnits - 1) / P::kUnits);
  const int grid = static_cast<int>(gridDim.x);
  // Shuffled, so that the compiler knows that it is the same for a warp.
  const int warp = shuffle(static_cast<int>(threadIdx.x / 32), 0), warpgroup = warp / 4;
  const int lane = static_cast<int>(threadIdx.x % 32);
  uint32_t count = 0;
  if (warpgroup == kWarpgroups) {
    registers_decrease<24>();
    if (warp != 4 * kWarpgroups) return;
    for (int tile = static_cast<int>(blockIdx.x); tile < tiles; tile += grid) {
      copy_tile(plan, ring, count, b, tile / row_tiles * P::kUnits);
    }
    return;
  }

  registers_increase<240>();
  if (warpgroup == 1) wait_for_lead(plan, ring);
  Multiplier self{lane, ring.empty + warpgroup * P::kStages, {}};
  for (int tile = static_cast<int>(blockIdx.x); tile < tiles; tile += grid) {
    const int row0 = tile % row_tiles * kTileRows, unit0 = tile / row_tiles * P::kUnits;
    // Rows past the last read the last one: what they make is not used.
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      const int row = row0 + 32 * warp + lane / 4 + 8 * s;
      self.rows[s] = reinterpret_cast<const uint4*>(
          a.bits + int64_t{row < a.rows ? row : a.rows - 1} * a.words);
    }
    TileSums<P> sums;
    multiply_tile<P, b_signed>(sums, plan, self, ring, count);
    finish(row0, unit0, sums);
  }
}

// Blocks of a persistent grid: one for each multiprocessor, or fewer.
template <class P> int blocks_for(int64_t rows, int64_t units, unsigned* blocks) {
  int device = 0, multiprocessors = 0;
  int status = cudaGetDevice(&device);
  if (status == cudaSuccess) {
    status = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  }
  if (status != cudaSuccess) return status;
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows * ((units + P::kUnits - 1) / P::kUnits);
  *blocks = static_cast<unsigned>(tiles < multiprocessors ? tiles : multiprocessors);
  return cudaSuccess;
}

}  // namespace rbm::cuda::sm90a
