// Runs the threads of the emulated GPU. See emulated.h.
#include "emulator/emulated_machine.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>

dim3 threadIdx, blockIdx, blockDim, gridDim;

#ifdef RBM_SWITCH_IN_ASSEMBLER
// Saves the registers that a call preserves on the stack, and takes another stack.
extern "C" void rbm_switch_stack(void** save_stack_pointer, void* stack_pointer);
asm(R"(
.text
.hidden rbm_switch_stack
.globl rbm_switch_stack
.type rbm_switch_stack, @function
rbm_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size rbm_switch_stack, .-rbm_switch_stack
)");
#endif

namespace rbm::cuda::emulated {

Machine machine;

std::string text(const char* format, long long a, long long b, long long c) {
  char buffer[256];
  std::snprintf(buffer, sizeof buffer, format, a, b, c);
  return buffer;
}

namespace {

constexpr size_t kCanary = 1024;  // bytes beyond a block's shared memory that must stay poisoned

#ifdef RBM_SWITCH_IN_ASSEMBLER
void prepare(Context& context, unsigned char*, unsigned char* top, void (*entry)()) {
  auto** words = reinterpret_cast<void**>(top) - 8;
  std::fill(words, words + 8, nullptr);
  words[6] = reinterpret_cast<void*>(entry);  // below it the six registers, above it no caller
  context.stack_pointer = words;
}
void switch_context(Context& from, Context& to) {
  rbm_switch_stack(&from.stack_pointer, to.stack_pointer);
}
#else
void prepare(Context& context, unsigned char* bottom, unsigned char* top, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = bottom;
  context.uc_stack.ss_size = static_cast<size_t>(top - bottom);
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}
void switch_context(Context& from, Context& to) { swapcontext(&from, &to); }
#endif

// Stacks with an inaccessible page below each; kept from launch to launch.
class Stacks {
 public:
  void reserve(size_t count) {
    while (stacks_.size() < count) {
      void* memory = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (memory == MAP_FAILED || mprotect(memory, kPage, PROT_NONE) != 0) {
        throw Error("no memory for the stacks of the emulated threads");
      }
      stacks_.push_back(static_cast<unsigned char*>(memory));
    }
  }
  unsigned char* bottom(size_t i) const { return stacks_[i] + kPage; }
  // Not all at the end of a page, or the fibers' frames would compete for the same cache lines.
  unsigned char* top(size_t i) const { return stacks_[i] + kBytes - i % 64 * 704; }

 private:
  static constexpr size_t kBytes = 256 * 1024, kPage = 16 * 1024;
  std::vector<unsigned char*> stacks_;
};

Stacks stacks;

uint64_t random_below(uint64_t n) {
  // SplitMix64 (Steele, Lea and Flood 2014).
  uint64_t z = machine.random_state += 0x9E3779B97F4A7C15u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return (z ^ (z >> 31)) % n;
}

void make_ready(Warp& warp, uint32_t lanes) {
  if (warp.ready == 0 && lanes) machine.ready.push_back(&warp);
  warp.ready |= lanes;
}

// The thread that runs next, or null where all wait or have ended.
Fiber* next_fiber() {
  Machine& m = machine;
  while (m.ready.empty()) {
    if (m.bulk_copies.empty()) return nullptr;
    complete_bulk_copy(m.seed ? random_below(m.bulk_copies.size()) : 0);
  }
  Warp* warp = m.ready.front();
  int skipped = 0;
  if (m.seed) {
    if (!m.bulk_copies.empty() && random_below(16) == 0) {
      complete_bulk_copy(random_below(m.bulk_copies.size()));
    }
    if (m.turns == 0 || m.favorite->ready == 0) {
      m.favorite = m.ready[random_below(m.ready.size())];
      m.turns = uint64_t{1} << random_below(12);
    }
    --m.turns;
    warp = m.favorite;
    skipped = static_cast<int>(random_below(__builtin_popcount(warp->ready)));
  }
  uint32_t lanes = warp->ready;
  for (; skipped; --skipped) lanes &= lanes - 1;
  const int lane = __builtin_ctz(lanes);
  warp->ready &= ~(1u << lane);
  if (warp->ready == 0) m.ready.erase(std::find(m.ready.begin(), m.ready.end(), warp));
  return warp->lanes + lane;
}

// Leaves `from` for the next thread, or for the host where there is none.
void leave(Context& from) {
  Fiber* next = next_fiber();
  machine.current = next;
  if (!next) {
    if (&from != &machine.host) switch_context(from, machine.host);
    return;
  }
  threadIdx = next->thread;
  blockIdx = next->block->index;
  if (&from != &next->context) switch_context(from, next->context);
}

void release(Barrier& barrier, Fiber* except) {
  for (Fiber* fiber : barrier.waiting) {
    if (fiber != except) make_ready(*fiber);
  }
  barrier.waiting.clear();
}

std::string name(const Fiber& fiber) {
  const dim3 &b = fiber.block->index, &t = fiber.thread;
  return text("block (%lld, %lld, %lld)", b.x, b.y, b.z) +
         text(" thread (%lld, %lld, %lld)", t.x, t.y, t.z);
}

// A barrier that waits for all threads which have not ended may be complete without this one.
void end_thread(Fiber& self) {
  if (!self.remote_stores.empty()) {
    throw Error("the thread ended with no cluster_sync after its store_remote");
  }
  if (!self.accumulators.empty()) throw Error("the thread ended with wgmma in flight");
  self.ended = true;
  --self.block->live;
  Barrier& barrier = self.block->barriers[0];
  if (!barrier.waiting.empty() && --barrier.expected == static_cast<int>(barrier.waiting.size())) {
    release(barrier, nullptr);
  }
  Barrier& all = machine.cluster_barrier;
  if (!all.waiting.empty() && --all.expected == static_cast<int>(all.waiting.size())) {
    release(all, nullptr);
  }
}

void run_thread() {
  Fiber& self = *machine.current;
  try {
    machine.kernel(machine.arguments);
    end_thread(self);
    leave(self.context);
  } catch (const std::exception& error) {
    machine.error = name(self) + ": " + error.what();
  }
  switch_context(self.context, machine.host);
}

std::string describe_deadlock() {
  std::map<std::pair<const Block*, std::string>, std::pair<int, std::string>> places;
  for (const Fiber& fiber : machine.fibers) {
    const Place& at = fiber.waits;
    const std::string where = fiber.ended ? "have ended" : "wait at " + text(at.format, at.a, at.b);
    auto& [count, first] = places[{fiber.block, where}];
    if (count++ == 0) first = name(fiber);
  }
  std::string report = "deadlock:";
  for (const auto& [place, threads] : places) {
    report += text("\n  %lld threads ", threads.first) + place.second + ", the first of them " +
              threads.second;
  }
  return report;
}

void reset(unsigned cluster_x, unsigned y, unsigned z) {
  Machine& m = machine;
  m.ready.clear();
  m.bulk_copies.clear();
  m.mbarrier_waiters.clear();
  m.cluster_barrier.waiting.clear();
  m.cluster_met = false;
  m.error.clear();
  m.turns = 0;
  const size_t warps_of_block = m.warps.size() / m.blocks.size();
  for (size_t i = 0; i < m.fibers.size(); ++i) {
    const size_t rank = i / m.threads, thread = i % m.threads;
    const dim3& size = m.launch.block;
    Fiber& fiber = m.fibers[i];
    fiber.thread = {static_cast<unsigned>(thread % size.x),
                    static_cast<unsigned>(thread / size.x % size.y),
                    static_cast<unsigned>(thread / size.x / size.y)};
    fiber.block = &m.blocks[rank];
    fiber.warp = &m.warps[rank * warps_of_block + thread / 32];
    fiber.lane = thread % 32;
    fiber.waits = {};
    fiber.ended = fiber.fenced = false;
    fiber.remote_stores.clear();
    fiber.copies.clear();
    fiber.multiplications.clear();
    fiber.accumulators.clear();
    prepare(fiber.context, stacks.bottom(i), stacks.top(i), run_thread);
    if (fiber.lane == 0) {
      *fiber.warp = {};
      fiber.warp->lanes = &fiber;
    }
  }
  for (size_t rank = 0; rank < m.blocks.size(); ++rank) {
    Block& block = m.blocks[rank];
    block.index = {cluster_x * m.launch.cluster + static_cast<unsigned>(rank), y, z};
    block.live = static_cast<int>(m.threads);
    for (Barrier& barrier : block.barriers) barrier.waiting.clear();
    std::fill_n(block.shared, m.launch.shared_bytes + kCanary, kPoison);
  }
  for (Fiber& fiber : m.fibers) make_ready(fiber);
}

void check_end_of_cluster() {
  Machine& m = machine;
  if (!m.error.empty()) throw Error(m.error);
  if (live_threads_of_cluster()) throw Error(describe_deadlock());
  const size_t warps_of_block = m.warps.size() / m.blocks.size();
  for (const Block& block : m.blocks) {
    const unsigned char* end = block.shared + m.launch.shared_bytes;
    const dim3& b = block.index;
    const std::string block_name = text("block (%lld, %lld, %lld)", b.x, b.y, b.z);
    if (std::any_of(end, end + kCanary, [](unsigned char c) { return c != kPoison; })) {
      throw Error(block_name + " wrote beyond its shared memory");
    }
    const Warp* warps = &m.warps[block.rank * warps_of_block];
    for (size_t w = 0; w < warps_of_block; ++w) {
      if (warps[w].wgmmas != warps[w / 4 * 4].wgmmas) {
        throw Error(block_name + ": not all warps of a warpgroup issued the same wgmma");
      }
    }
  }
}

}  // namespace

void make_ready(Fiber& fiber) { make_ready(*fiber.warp, 1u << fiber.lane); }

void wait_at(const Place& place) {
  Fiber& self = *machine.current;
  self.waits = place;
  leave(self.context);
  self.waits = {};
}

void arrive_and_wait(Barrier& barrier, int expected, const Place& place) {
  if (!barrier.waiting.empty() && barrier.expected != expected) {
    throw Error(
        text("barrier of %lld threads, where others expect %lld", expected, barrier.expected));
  }
  barrier.expected = expected;
  barrier.waiting.push_back(machine.current);
  if (barrier.waiting.size() == static_cast<size_t>(expected)) {
    release(barrier, machine.current);
  } else {
    wait_at(place);
  }
}

void meet(const char* instruction, WarpFunction function, void* operands) {
  Fiber& self = *machine.current;
  Warp& warp = *self.warp;
  if (warp.arrived && warp.function != function) {
    throw Error(std::string("lanes of one warp are at different instructions: ") + instruction +
                " and " + warp.instruction);
  }
  warp.instruction = instruction;
  warp.function = function;
  warp.operands[self.lane] = operands;
  warp.arrived |= 1u << self.lane;
  if (warp.arrived != ~0u) return wait_at({instruction});
  function(warp.operands);
  warp.arrived = 0;
  make_ready(warp, ~(1u << self.lane));
}

int live_threads_of_cluster() {
  int live = 0;
  for (const Block& block : machine.blocks) live += block.live;
  return live;
}

int run(const Launch& launch, void (*kernel)(void*), void* arguments) {
  static std::mutex one_launch_at_a_time;
  const std::lock_guard<std::mutex> lock(one_launch_at_a_time);
  const size_t threads = size_t{launch.block.x} * launch.block.y * launch.block.z;
  const uint64_t blocks = uint64_t{launch.grid.x} * launch.grid.y * launch.grid.z;
  if (threads == 0 || threads > 1024 || blocks == 0 || launch.grid.y > 65535 ||
      launch.grid.z > 65535 || launch.cluster == 0 || launch.cluster > 16 ||
      launch.grid.x % launch.cluster) {
    return cudaErrorInvalidConfiguration;
  }
  if (launch.shared_bytes > kSharedLimit) return cudaErrorInvalidValue;

  Machine& m = machine;
  m.launch = launch;
  m.kernel = kernel;
  m.arguments = arguments;
  m.threads = threads;
  stacks.reserve(threads * launch.cluster);
  m.fibers.resize(threads * launch.cluster);
  m.warps.resize((threads + 31) / 32 * launch.cluster);
  m.blocks.clear();
  m.blocks.resize(launch.cluster);
  for (uint32_t rank = 0; rank < launch.cluster; ++rank) {
    Block& block = m.blocks[rank];
    block.rank = rank;
    block.memory.reset(new unsigned char[launch.shared_bytes + kCanary + 1024]);
    const auto start = reinterpret_cast<uintptr_t>(block.memory.get());
    block.shared = block.memory.get() + (1024 - start % 1024) % 1024;
  }
  const char* schedule = std::getenv("RBM_EMULATED_SCHEDULE");
  m.seed = m.random_state = schedule ? std::strtoull(schedule, nullptr, 10) : 0;
  gridDim = launch.grid;
  blockDim = launch.block;

  std::vector<uint64_t> order(blocks / launch.cluster);
  for (uint64_t i = 0; i < order.size(); ++i) order[i] = i;
  if (m.seed) {
    for (uint64_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random_below(i)]);
  }
  const uint64_t clusters_x = launch.grid.x / launch.cluster;
  for (const uint64_t i : order) {
    reset(static_cast<unsigned>(i % clusters_x),
          static_cast<unsigned>(i / clusters_x % launch.grid.y),
          static_cast<unsigned>(i / clusters_x / launch.grid.y));
    leave(m.host);
    check_end_of_cluster();
  }
  return cudaSuccess;
}

}  // namespace rbm::cuda::emulated
