// How a call of an operation is put together: its workspace, its parameters and states as operands
// of the kernels, and the launches of half-sweeps and chains.
#pragma once

#include "cuda/operands/operands.h"
#include "cuda/ops/choose.h"
#include "cuda/ops/operations.h"
#include "cuda/resident/chain.h"
#include "cuda/tiled/half_sweep.h"

namespace rbm::cuda {

// Lays arrays out in a workspace, or, without one, only counts their bytes.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<uint8_t*>(base)) {}
  template <class T> T* take(int64_t n) {
    T* place = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + used_);
    used_ += round_up(n * static_cast<int64_t>(sizeof(T)), 256);
    return place;
  }
  Planes planes(int64_t rows, int64_t terms, int digits) {
    Planes p{nullptr, round_up(rows, kBlock), round_up(terms, kBlock)};
    p.data = take<uint8_t>(digits * plane_bytes(p));
    return p;
  }
  uint8_t* base() const { return base_; }
  int64_t used() const { return used_; }

 private:
  uint8_t* base_;
  int64_t used_ = 0;
};

// The first error of several launches.
class Status {
 public:
  void operator+=(int status) {
    if (first_ == 0) first_ = status;
  }
  operator int() const { return first_; }

 private:
  int first_ = 0;
};

// One call of an operation: where its arrays lie in the workspace, and whether its launches
// succeeded. An operation takes first the arrays that must be zero when it starts (`count` below),
// then calls end_of_counters(), then takes the rest, and launches only if ready().
struct CallContext {
  Call& call;
  cudaStream_t stream;
  Arena arena;
  CurrentDevice current;
  Device device{};
  Status status;
  int64_t counters = 0;

  explicit CallContext(Call& c);
  void end_of_counters() { counters = arena.used(); }
  bool ready();
};

// W [visible, hidden], as operands of half-sweeps in one direction or both.
struct Weights {
  int n_visible, n_hidden;
  WeightPlanes planes;

  void count(CallContext& context, const Matrix& W);
  void lay_out(CallContext& context, bool to_visible);
};

// The states of a layer that a half-sweep starts from.
struct LayerInput {
  enum class Kind { bits, real, either };  // either: known on the device only
  Kind kind;
  Pack packed;
  ValuePlanes values;

  // gaussian: whether they are Gaussian units, which a product takes divided by their variance.
  void count(CallContext& context, const Matrix& states, bool gaussian);
  // space: planes of another array that lend their memory to the real states until those have been
  // used; null: the states get memory of their own.
  void lay_out(CallContext& context, const Planes* space = nullptr);
  // Guards of the kernels for the one case and for the other.
  Guard if_bits() const { return kind == Kind::either ? Guard{packed.is_real, 0} : Guard{}; }
  Guard if_real() const { return kind == Kind::either ? Guard{packed.is_real, 1} : Guard{}; }
  const Matrix& states() const { return packed.states; }
};
// factor: 1 / s^2 of Gaussian units, or null.
void prepare(CallContext& context, LayerInput& given, const float* factor);

// A half-sweep in one direction. The caller adds the states that it starts from and the results
// that it wants.
HalfSweep half_sweep_of(const CallContext& context, const Weights& weights, bool to_hidden,
                        int64_t rows, const float* bias, Temperature temperature);
void from_bits(CallContext& context, HalfSweep h, const uint32_t* bits, Guard guard, bool hopper);
void from_values(CallContext& context, HalfSweep h, const ValuePlanes& values, Guard guard);
// From either: two launches where only the device knows which it is.
void from_given(CallContext& context, const HalfSweep& h, const LayerInput& given, bool hopper);

// What the chains of one call have in common; see Chain for the results.
struct Sweeps {
  const Weights& weights;
  const float* visible_bias;
  const float* hidden_bias;
  const float* log_var;  // of Gaussian units, or null
  Temperature temperature;
  int64_t rows, sweeps;
  const uint8_t* mask;
  int64_t mask_stride;
  Matrix held;
  uint32_t* hidden;  // [rows][words_of(n_hidden)]
};

// A Bernoulli chain from given states, whose bits it overwrites. `drawn`: the first hidden states
// are in `hidden` already.
void bit_chain(CallContext& context, const Sweeps& a, Chain results, const LayerInput& given,
               bool drawn, const Choice& choice);
// The same where the given states turn out to be bits, and nothing otherwise.
void bit_chain_if_bits(CallContext& context, const Sweeps& a, Chain results,
                       const LayerInput& given, const Choice& choice);
// A chain of Gaussian units from given states to the last ones, `states`, float32 [rows, visible].
// On the chip it needs neither given states that are prepared nor first hidden states that are
// `drawn` already; elsewhere it starts from them.
void gaussian_chain(CallContext& context, const Sweeps& a, float* states, const LayerInput& given,
                    bool drawn, const float* precision, const Choice& choice);
// A chain whose visible states are real between half-sweeps: Gaussian units, or Bernoulli units
// among which some keep real values. They live in `states`, float32 [rows, visible]; `values` hold
// the first ones, and then those in between.
void real_chain(CallContext& context, const Sweeps& a, float* states, ValuePlanes values,
                bool drawn, Guard guard);

}  // namespace rbm::cuda
