// Products with a binary left operand on AMX tiles: u8 states by the bytes of the weights, each
// byte position summed in int32 and the positions put together exactly.
//
// Compiled with RBM_ISA_AMX_EMULATED, the six tile instructions are plain loops, so that a
// processor without AMX runs and tests everything else here.
#pragma once

#include "cpu/rows.h"

namespace rbm::cpu {
namespace {

constexpr bool kBinaryAsBytes = true;
constexpr int64_t kPanelRows = 1024;  // rows of the right operand packed at a time

struct BinaryScratch {
  alignas(64)
      uint8_t panel[3][kPanelRows / 4][64];    // byte position, group of four rows, column and row
  alignas(64) int32_t sums[3][2][16 * kTile];  // byte position, block of sixteen chains
};

#ifdef RBM_ISA_AMX_EMULATED
struct Tile {
  alignas(64) uint8_t row[16][64];
};
thread_local Tile tiles[8];
void configure_tiles() {}
void release_tiles() {}
template <int t> void tile_zero() { std::memset(&tiles[t], 0, sizeof(Tile)); }
template <int t> void tile_load(const void* p, int64_t stride) {
  for (int i = 0; i < 16; ++i)
    std::memcpy(tiles[t].row[i], static_cast<const char*>(p) + i * stride, 64);
}
template <int t> void tile_store(void* p) { std::memcpy(p, &tiles[t], sizeof(Tile)); }
template <int c, int a, int b, bool signed_bytes> void tile_multiply() {
  for (int i = 0; i < 16; ++i) {
    int32_t sum[16];
    std::memcpy(sum, tiles[c].row[i], 64);
    for (int k = 0; k < 64; ++k) {
      const int32_t state = tiles[a].row[i][k];
      for (int j = 0; j < 16; ++j) {
        const uint8_t byte = tiles[b].row[k / 4][4 * j + k % 4];
        sum[j] += state * (signed_bytes ? static_cast<int8_t>(byte) : byte);
      }
    }
    std::memcpy(tiles[c].row[i], sum, 64);
  }
}
#else
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
// Written as assembly because gcc 12's intrinsics take literal tile numbers only.
void configure_tiles() {
  const TileConfig config;
  asm volatile("ldtilecfg %0" ::"m"(config));
}
void release_tiles() { asm volatile("tilerelease"); }
template <int t> void tile_zero() { asm volatile("tilezero %%tmm%c0" ::"i"(t)); }
template <int t> void tile_load(const void* p, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(t) : "memory");
}
template <int t> void tile_store(void* p) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(int64_t{64}), "i"(t) : "memory");
}
template <int c, int a, int b, bool signed_bytes> void tile_multiply() {
  if constexpr (signed_bytes) {
    asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
  } else {
    asm volatile("tdpbuud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
  }
}
#endif

// Weights are signed in their top byte; hidden probabilities, at most 2^15 or 2^23, are not.
template <class Rows> struct Signed {
  static constexpr bool value = true;
};
template <> struct Signed<HiddenRows> {
  static constexpr bool value = false;
};

// Sixteen chains by one panel: tiles `first`, first + 1 and first + 2 hold the byte positions.
template <int first, int bytes, bool top_signed>
void multiply_block(const uint8_t* states, int64_t stride, int64_t depth, const BinaryScratch& s) {
  tile_zero<first>();
  tile_zero<first + 1>();
  if constexpr (bytes == 3) tile_zero<first + 2>();
  for (int64_t k = 0; k < depth; k += 64) {
    tile_load<6>(states + k, stride);
    tile_load<7>(s.panel[0][k / 4], 64);
    tile_multiply<first, 6, 7, false>();
    tile_load<7>(s.panel[1][k / 4], 64);
    tile_multiply<first + 1, 6, 7, bytes == 2 && top_signed>();
    if constexpr (bytes == 3) {
      tile_load<7>(s.panel[2][k / 4], 64);
      tile_multiply<first + 2, 6, 7, top_signed>();
    }
  }
}

template <int bytes, class Rows> void binary_product(const Operand& a, const Rows& rows,
                                                     int64_t begin, int64_t end, BinaryScratch& s,
                                                     int32_t* sums, double* totals, double weight) {
  RowReader<Rows> reader(rows, a.K);
  const int64_t count = end - begin;
  const D8 w = splat(weight), w1 = splat(256.0 * weight), w2 = splat(65536.0 * weight);
  configure_tiles();
  for (int64_t start = 0; start < a.K; start += kPanelRows) {
    const int64_t left = a.K - start < kPanelRows ? a.K - start : kPanelRows;
    const int64_t depth = (left + 63) / 64 * 64;
    for (int64_t k = 0; k < depth; k += 4) {
      I16 row[4];
      for (int r = 0; r < 4; ++r) row[r] = start + k + r < a.K ? reader[start + k + r] : I16(0);
      for (int byte = 0; byte < bytes; ++byte) {
        I16 packed(0);
        for (int r = 3; r >= 0; --r) {
          packed = bit_xor(shift_left<8>(packed), bit_and(row[r], I16(255)));
          row[r] = shift_right<8>(row[r]);
        }
        store(reinterpret_cast<int32_t*>(s.panel[byte][k / 4]), packed);
      }
    }
    constexpr bool top_signed = Signed<Rows>::value;
    for (int64_t m = 0; m < count; m += 32) {
      const uint8_t* states = a.bytes + (begin + m) * a.bytes_stride + start;
      multiply_block<0, bytes, top_signed>(states, a.bytes_stride, depth, s);
      multiply_block<3, bytes, top_signed>(states + 16 * a.bytes_stride, a.bytes_stride, depth, s);
      tile_store<0>(s.sums[0][0]);
      tile_store<1>(s.sums[1][0]);
      tile_store<3>(s.sums[0][1]);
      tile_store<4>(s.sums[1][1]);
      if constexpr (bytes == 3) {
        tile_store<2>(s.sums[2][0]);
        tile_store<5>(s.sums[2][1]);
      }
      for (int64_t i = 0; i < 32 && m + i < count; ++i) {
        I16 part[3];
        for (int byte = 0; byte < bytes; ++byte)
          part[byte] = load(s.sums[byte][i / 16] + i % 16 * kTile);
        if (!totals) {
          I16 sum = add(part[0], shift_left<8>(part[1]));
          if constexpr (bytes == 3) sum = add(sum, shift_left<16>(part[2]));
          int32_t* out = sums + (m + i) * kTile;
          store(out, start == 0 ? sum : add(sum, load(out)));
          continue;
        }
        double* out = totals + (m + i) * kTile;
        D8 low = load(out), high = load(out + 8), l, h;
        widen(part[0], l, h);
        low = fma(w, l, low);
        high = fma(w, h, high);
        widen(part[1], l, h);
        low = fma(w1, l, low);
        high = fma(w1, h, high);
        if constexpr (bytes == 3) {
          widen(part[2], l, h);
          low = fma(w2, l, low);
          high = fma(w2, h, high);
        }
        store(out, low);
        store(out + 8, high);
      }
    }
  }
  release_tiles();
}

// sums (or totals, where there are any) += binary operand @ rows. `sums` is overwritten.
template <class Rows> void binary_product(const Operand& a, const Rows& rows, int64_t begin,
                                          int64_t end, BinaryScratch& s, int32_t* sums,
                                          double* totals, double weight) {
  if (a.K == 0) clear(sums, end - begin);
  if (a.digits == 3) {
    binary_product<3>(a, rows, begin, end, s, sums, totals, weight);
  } else {
    binary_product<2>(a, rows, begin, end, s, sums, totals, weight);
  }
}

}  // namespace
}  // namespace rbm::cpu
