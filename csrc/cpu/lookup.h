// Products with a binary left operand by table look-up.
//
// A product with a binary operand is a sum of chosen rows. The rows are taken in groups of six: a
// table holds the 64 sums that a group can give, and each chain adds the entry that its six states
// select ("four Russians"; Arlazarov et al. 1970). One addition of 16 int32 thereby does the work
// of 96 multiply-adds, whatever the number of digits of the weights.
#pragma once

#include "cpu/rows.h"

namespace rbm::cpu {
namespace {

constexpr int kTables = 12;  // tables looked up per pass over the chains: 48 KB at group 6

constexpr bool kBinaryAsBytes = false;

struct BinaryScratch {
  alignas(64) char tables[kTables << (kMaxGroup + 6)];
};

// table[e] = sum of the rows whose bit is set in e. The sums of the first three rows stay in
// registers, so that the table is only written.
template <int group, class Reader>
void build_table(Reader& rows, int64_t k, int64_t K, char* table) {
  I16 row[group];
  for (int bit = 0; bit < group; ++bit) row[bit] = k + bit < K ? rows[k + bit] : I16(0);
  constexpr int kLow = group < 3 ? group : 3;
  I16 low[1 << kLow], high[1 << (group - kLow)];
  low[0] = high[0] = I16(0);
  for (int bit = 0; bit < kLow; ++bit) {
    for (int e = 0; e < 1 << bit; ++e) low[(1 << bit) + e] = add(low[e], row[bit]);
  }
  for (int bit = 0; bit < group - kLow; ++bit) {
    for (int e = 0; e < 1 << bit; ++e) high[(1 << bit) + e] = add(high[e], row[kLow + bit]);
  }
  int32_t* entry = reinterpret_cast<int32_t*>(table);
  for (const I16& h : high) {
    for (const I16& l : low) {
      store(entry, add(h, l));
      entry += kTile;
    }
  }
}

template <int group, int count> void add_entries(const uint16_t* groups, int64_t stride,
                                                 int64_t rows, const char* tables, int32_t* sums) {
  for (int64_t m = 0; m < rows; ++m, groups += stride, sums += kTile) {
    I16 sum = load(sums);
#pragma GCC unroll 16
    for (int g = 0; g < count; ++g) {
      sum =
          add(sum, load(reinterpret_cast<const int32_t*>(tables + (g << (group + 6)) + groups[g])));
    }
    store(sums, sum);
  }
}

// totals += weight * sums; sums = 0.
void fold(int32_t* sums, int64_t rows, double weight, double* totals) {
  const D8 w = splat(weight);
  for (int64_t m = 0; m < rows; ++m, sums += kTile, totals += kTile) {
    D8 low, high;
    widen(load(sums), low, high);
    store(totals, fma(w, low, load(totals)));
    store(totals + 8, fma(w, high, load(totals + 8)));
    store(sums, I16(0));
  }
}

template <int group, class Rows> void binary_product(const Operand& a, const Rows& rows,
                                                     int64_t begin, int64_t end, BinaryScratch& s,
                                                     int32_t* sums, double* totals, double weight) {
  RowReader<Rows> reader(rows, a.K);
  const int64_t count = end - begin;
  const uint16_t* groups = a.groups + begin * a.n_groups;
  int64_t pending = 0;
  for (int64_t g = 0; g < a.n_groups; g += kTables) {
    const int n = static_cast<int>(a.n_groups - g < kTables ? a.n_groups - g : kTables);
    if (totals && pending + n * group > kSafeRows) {
      fold(sums, count, weight, totals);
      pending = 0;
    }
    pending += n * group;
    for (int i = 0; i < n; ++i)
      build_table<group>(reader, (g + i) * group, a.K, s.tables + (i << (group + 6)));
    int i = 0;
    if (n == kTables) {
      add_entries<group, kTables>(groups + g, a.n_groups, count, s.tables, sums);
      i = kTables;
    }
    for (; i + 4 <= n; i += 4)
      add_entries<group, 4>(groups + g + i, a.n_groups, count, s.tables + (i << (group + 6)), sums);
    for (; i < n; ++i)
      add_entries<group, 1>(groups + g + i, a.n_groups, count, s.tables + (i << (group + 6)), sums);
  }
  if (totals) fold(sums, count, weight, totals);
}

// sums += binary operand @ rows, folded into totals (if there are any) before int32 can overflow.
template <class Rows> void binary_product(const Operand& a, const Rows& rows, int64_t begin,
                                          int64_t end, BinaryScratch& s, int32_t* sums,
                                          double* totals, double weight) {
  clear(sums, end - begin);
  switch (a.group) {
    case 1:
      return binary_product<1>(a, rows, begin, end, s, sums, totals, weight);
    case 2:
      return binary_product<2>(a, rows, begin, end, s, sums, totals, weight);
    case 3:
      return binary_product<3>(a, rows, begin, end, s, sums, totals, weight);
    case 4:
      return binary_product<4>(a, rows, begin, end, s, sums, totals, weight);
    case 5:
      return binary_product<5>(a, rows, begin, end, s, sums, totals, weight);
    default:
      return binary_product<6>(a, rows, begin, end, s, sums, totals, weight);
  }
}

}  // namespace
}  // namespace rbm::cpu
