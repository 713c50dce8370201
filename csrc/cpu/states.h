// States of a layer on their way into a product: packed bits where they are binary, fixed point
// where they are not.
#pragma once

#include <atomic>
#include <cstdlib>
#include <functional>
#include <new>
#include <utility>

#include "cpu/kernels.h"
#include "include/rbm/fixed_point.h"

namespace rbm::cpu {

// Uninitialized memory on a cache line's boundary.
template <class T> class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t n) {
    const size_t bytes =
        (static_cast<size_t>(n) * sizeof(T) + 64 + 63) / 64 * 64;  // readable past its end
    data_ = static_cast<T*>(std::aligned_alloc(64, bytes));
    if (!data_) throw std::bad_alloc();
  }
  Buffer(Buffer&& other) noexcept : data_(std::exchange(other.data_, nullptr)) {}
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    return *this;
  }
  ~Buffer() { std::free(data_); }
  T* get() const { return data_; }
  explicit operator bool() const { return data_ != nullptr; }

 private:
  T* data_ = nullptr;
};

// A caller's matrix of states, float32 or bytes, rows contiguous.
struct Input {
  const float* floats;
  const uint8_t* bytes;
  int64_t rows, units, row_stride;

  float at(int64_t row, int64_t unit) const {
    return floats ? floats[row * row_stride + unit]
                  : static_cast<float>(bytes[row * row_stride + unit]);
  }
};

// Whether this process has had a team of threads. One that is forked from it lacks them, and OpenMP
// would wait for them for ever.
inline std::atomic<bool> threads_started{false};

// What one call of an operation is told beside its arrays.
struct Call {
  const Kernels* kernels;
  const int64_t* seed;  // seed and offset
  uint32_t chain_offset;
  int digits;
  int threads;

  HalfSweepKey key(int64_t half_sweep) const {
    return half_sweep_key(static_cast<uint64_t>(seed[0]),
                          static_cast<uint64_t>(seed[1] + half_sweep), 0);
  }
  // Threads for this many elementary steps: starting a team costs about 5 microseconds.
  int threads_for(int64_t work) const {
    if (work < 200000 || threads == 1) return 1;
    threads_started.store(true, std::memory_order_relaxed);
    return threads;
  }
};

struct States {
  int64_t rows = 0, units = 0;
  int64_t stride = 0;    // bytes between rows of bits
  Buffer<uint8_t> bits;  // [rows, stride], zero beyond the units; empty if the states are real
  Buffer<float> real;    // [rows, units] if they are real

  bool binary() const { return static_cast<bool>(bits); }
  float at(int64_t row, int64_t unit) const {
    return binary() ? static_cast<float>(bits.get()[row * stride + unit / 8] >> (unit % 8) & 1)
                    : real.get()[row * units + unit];
  }
  static States packed(int64_t rows, int64_t units);
};

// What is found in states that are read. Those of Bernoulli units lie in [0, 1], give or take what
// rounding and finite differences may add.
constexpr float kSlack = 0x1p-9f;
enum class Values { usable, not_finite, outside };

// Reads the caller's states, of Bernoulli units or of units that take every number.
Values read_states(const Input& input, const Call& call, bool bernoulli, States& out);

// Largest magnitude of a matrix as float bits; 0x7f800000 or more if it is not finite.
uint32_t largest_of(const Matrix& matrix, const Call& call);
bool all_finite(const float* values, int64_t n, const Call& call);  // null is finite

// How many states to look up at a time when tables serve this many chains.
int choose_group(int64_t rows);

// Left operands that own their memory.
struct OwnedOperand {
  Operand operand{};
  Buffer<uint16_t> groups;
  Buffer<uint8_t> bytes;
  Buffer<float> fixed, row_scale;
};
// states (times factor [units], if given) for a half-sweep. False if some product is not finite.
bool make_operand(const States& states, const float* factor, const Call& call, OwnedOperand& out);
// The transposed states [units + 1, rows] for a gradient, the last row all ones; `counts` [units]
// receives each unit's sum. Real states are divided by `scale` (binary ones too where real is set).
OwnedOperand make_transposed(const States& states, bool real, float scale, const Call& call,
                             double* counts);

// Calls work(tile, row begin, row end) until every row of every tile is done, on `threads` threads.
void for_each_part(int64_t tiles, int64_t rows, int threads,
                   const std::function<void(int64_t, int64_t, int64_t)>& work);
// Runs one half-sweep over all tiles on the call's threads.
void run(const HalfSweep& sweep, const Call& call);

}  // namespace rbm::cpu
