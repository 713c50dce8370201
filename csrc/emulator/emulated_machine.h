// The machine behind emulated.h: a fiber for each thread of a block, and the scheduler that knows
// what each of them waits for.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "emulator/emulated.h"

#if defined(__x86_64__) && defined(__linux__) && !defined(RBM_EMULATED_UCONTEXT)
#define RBM_SWITCH_IN_ASSEMBLER
#else
#include <ucontext.h>
#endif

namespace rbm::cuda::emulated {

#ifdef RBM_SWITCH_IN_ASSEMBLER
struct Context {
  void* stack_pointer = nullptr;
};
#else
using Context = ucontext_t;
#endif

constexpr unsigned char kPoison = 0xCD;
constexpr size_t kSharedLimit = 227 * 1024;  // of an H100's block

using Error = std::runtime_error;

// printf with up to three integers, as %lld.
std::string text(const char* format, long long a = 0, long long b = 0, long long c = 0);

// Asynchronous operations of a thread in the groups that it committed.
template <class T> struct Groups {
  std::vector<T> open;
  std::deque<std::vector<T>> committed;

  void commit() {
    committed.push_back(std::move(open));
    open.clear();
  }
  std::vector<T> complete_all_but(size_t groups) {
    std::vector<T> completed;
    while (committed.size() > groups) {
      completed.insert(completed.end(), committed.front().begin(), committed.front().end());
      committed.pop_front();
    }
    return completed;
  }
  void clear() { open.clear(), committed.clear(); }
};

// A store to another block, which may see it late.
struct RemoteStore {
  unsigned char* to;
  uint32_t value;
};

struct AsyncCopy {
  unsigned char* to;
  const unsigned char* from;  // null: zeros
};

struct Wgmma {
  int32_t* d;
  const uint32_t* a;
  uint64_t b;
  int columns;
  bool a_signed, b_signed;
};

// The true values of a thread's registers that hold poison while wgmma works on them.
struct Accumulators {
  int32_t* d;
  std::vector<int32_t> values;
  int in_flight;
};

struct Block;
struct Warp;

// Where a thread waits: a format of up to two numbers, in words for the report of a deadlock.
struct Place {
  const char* format = nullptr;
  long long a = 0, b = 0;
};

struct Fiber {
  Context context;
  dim3 thread;
  Block* block;
  Warp* warp;
  int lane;
  Place waits;
  bool ended;
  std::vector<RemoteStore> remote_stores;  // since the last cluster_sync
  Groups<AsyncCopy> copies;
  Groups<Wgmma> multiplications;
  std::vector<Accumulators> accumulators;
  bool fenced;  // a wgmma_fence since the last wgmma_wait
};

using WarpFunction = void (*)(void* const* operands);  // operands of the 32 lanes

struct Warp {
  Fiber* lanes;  // consecutive
  uint32_t ready;
  uint32_t arrived;  // lanes that wait for the others at an instruction of the whole warp
  const char* instruction;
  WarpFunction function;
  void* operands[32];
  int wgmmas;
};

struct Barrier {
  std::vector<Fiber*> waiting;
  int expected = 0;
};

struct Block {
  dim3 index;
  uint32_t rank;
  int live;  // threads that have not ended
  Barrier barriers[16];
  std::unique_ptr<unsigned char[]> memory;
  unsigned char* shared;
};

struct BulkCopy {
  Block* block;
  unsigned char* to;
  const unsigned char* from;
  uint32_t bytes;
  uint64_t* barrier;
  unsigned char value[16] = {};  // what store_async16 sends; `from` is null then
};

struct Machine {
  Launch launch;
  void (*kernel)(void*);
  void* arguments;
  size_t threads;  // of a block
  Context host;
  Fiber* current;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<Block> blocks;
  Barrier cluster_barrier;
  bool cluster_met;  // at a cluster_sync, before which no block may touch another
  std::deque<BulkCopy> bulk_copies;
  std::vector<std::pair<uint64_t*, Fiber*>> mbarrier_waiters;
  std::deque<Warp*> ready;  // warps with a lane that can run
  uint64_t seed, random_state;
  Warp* favorite;  // which a random schedule lets run ahead for `turns` turns
  uint64_t turns;
  std::string error;
};

extern Machine machine;

void make_ready(Fiber& fiber);

// Lets others run until someone makes this thread ready.
void wait_at(const Place& place);

void arrive_and_wait(Barrier& barrier, int expected, const Place& place);

// Waits for the other lanes of the warp; the last one computes for all.
void meet(const char* instruction, WarpFunction function, void* operands);

int live_threads_of_cluster();

// Defined with the instructions: moves the bytes of machine.bulk_copies[i] and tells its barrier.
void complete_bulk_copy(size_t i);

}  // namespace rbm::cuda::emulated
