// The instructions of the emulated GPU. See emulated.h.
#include <algorithm>

#include "emulator/emulated_machine.h"

namespace rbm::cuda {
namespace emulated {
namespace {

constexpr int32_t kPoisonedInt = static_cast<int32_t>(0xCDCDCDCDu);
// A GPU keeps the first kilobyte for itself, so no valid shared address is 0.
constexpr uint32_t kSharedStart = 1024;
constexpr uint32_t kRemote = 0x80000000u;  // marks an address of remote_address

void check_shared(const void* pointer, size_t bytes, size_t alignment, const char* who) {
  const auto* p = static_cast<const unsigned char*>(pointer);
  const unsigned char* shared = machine.current->block->shared;
  if (p < shared || p + bytes > shared + machine.launch.shared_bytes) {
    throw Error(std::string(who) + ": the address is not in the block's shared memory (" +
                text("offset %lld of %lld bytes)", p - shared, machine.launch.shared_bytes));
  }
  if ((p - shared) % alignment) {
    throw Error(std::string(who) + ": " +
                text("offset %lld in shared memory is no multiple of %lld", p - shared,
                     static_cast<long long>(alignment)));
  }
}

void check_global(const void* pointer, const char* who) {
  if (reinterpret_cast<uintptr_t>(pointer) % 16) {
    throw Error(std::string(who) + ": the global address is no multiple of 16");
  }
}

// The bytes that an address of shared_address or remote_address names.
unsigned char* resolve(uint32_t address, size_t bytes, const char* who) {
  Block* block = machine.current->block;
  if (address & kRemote) {
    block = &machine.blocks[(address & ~kRemote) >> 24];
    if (!machine.cluster_met) {
      throw Error(std::string(who) + ": before cluster_sync, the other block may not have started");
    }
    if (block->live == 0) throw Error(std::string(who) + ": all threads of that block have ended");
  }
  const uint32_t offset = (address & 0xFFFFFFu) - kSharedStart;
  if (offset % bytes || offset + bytes > machine.launch.shared_bytes) {
    throw Error(std::string(who) + ": " +
                text("bad offset %lld of %lld bytes of shared memory", static_cast<int32_t>(offset),
                     machine.launch.shared_bytes));
  }
  return block->shared + offset;
}

struct Mbarrier {
  int64_t bytes : 23;      // announced and not come yet
  uint64_t expected : 16;  // arrivals of a phase
  uint64_t pending : 16;   // arrivals that this phase still waits for
  uint64_t parity : 1;
  uint64_t tag : 8;  // tells a barrier from memory that was not initialized
};
static_assert(sizeof(Mbarrier) == 8);
constexpr uint64_t kBarrierTag = 0xB7;

Mbarrier load(const uint64_t* at) {
  Mbarrier barrier;
  std::memcpy(&barrier, at, 8);
  if (barrier.tag != kBarrierTag) throw Error("an mbarrier that was not initialized");
  return barrier;
}

void update(uint64_t* at, int arrivals, int64_t bytes) {
  Mbarrier barrier = load(at);
  if (static_cast<int>(barrier.pending) < arrivals) {
    throw Error("more arrivals at an mbarrier than its phase expects");
  }
  barrier.pending -= arrivals;
  barrier.bytes += bytes;
  const bool complete = barrier.pending == 0 && barrier.bytes == 0;
  if (complete) {
    barrier.parity ^= 1;
    barrier.pending = barrier.expected;
  }
  std::memcpy(at, &barrier, 8);
  if (!complete) return;
  auto& waiters = machine.mbarrier_waiters;
  const auto woken = std::partition(waiters.begin(), waiters.end(),
                                    [=](const auto& waiter) { return waiter.first != at; });
  for (auto i = woken; i != waiters.end(); ++i) make_ready(*i->second);
  waiters.erase(woken, waiters.end());
}

struct Exchange {
  uint64_t value, result;
  int source;
};

struct Ballot {
  bool predicate;
  uint32_t result;
};

struct LoadMatrices {
  const unsigned char* row;
  uint32_t* r;
};

struct MmaOperands {
  int32_t* d;
  const uint32_t* a;
  const uint32_t* b;
};

// Where the registers of a lane lie in the fragments of m16n8k32 and of a warp's 16 rows of wgmma.
int row_of(int lane) { return lane / 4; }
int column_of(int lane) { return lane % 4; }

template <class A> void gather_rows(A (&a)[16][32], int lane, const uint32_t* registers) {
  for (int i = 0; i < 4; ++i) {
    std::memcpy(&a[row_of(lane) + 8 * (i % 2)][4 * column_of(lane) + 16 * (i / 2)], registers + i,
                4);
  }
}

template <class A, class B> int32_t dot(const A* a, const B* b) {
  int32_t sum = 0;
  for (int k = 0; k < 32; ++k) sum += static_cast<int32_t>(a[k]) * static_cast<int32_t>(b[k]);
  return sum;
}

// d[i] of a lane: its row + 8 for i % 4 >= 2, column 8 * (i / 4) + 2 * (lane % 4) + i % 2.
template <class A, class B>
void add_products(int32_t* d, int count, int lane, const A (&a)[16][32], const B (*b)[32]) {
  for (int i = 0; i < count; ++i) {
    const int32_t product =
        dot(a[row_of(lane) + 8 * (i / 2 % 2)], b[8 * (i / 4) + 2 * column_of(lane) + i % 2]);
    d[i] = static_cast<int32_t>(static_cast<uint32_t>(d[i]) + static_cast<uint32_t>(product));
  }
}

template <class A, class B> void multiply_fragments(void* const* operands) {
  A a[16][32];
  B b[8][32];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& o = *static_cast<const MmaOperands*>(operands[lane]);
    gather_rows(a, lane, o.a);
    std::memcpy(&b[row_of(lane)][4 * column_of(lane)], o.b, 4);
    std::memcpy(&b[row_of(lane)][4 * column_of(lane) + 16], o.b + 1, 4);
  }
  for (int lane = 0; lane < 32; ++lane) {
    add_products(static_cast<const MmaOperands*>(operands[lane])->d, 4, lane, a, b);
  }
}

struct WgmmaWait {
  Fiber* fiber;
  std::vector<Wgmma> completed;
};

// B as [columns, 32] from matrices of 8 rows x 16 bytes in shared memory.
template <class B> void gather_columns(B (*b)[32], const Wgmma& operation) {
  const uint64_t descriptor = operation.b;
  const auto field = [&](int shift) {
    return static_cast<uint32_t>((descriptor >> shift) & 0x3FFF) << 4;
  };
  const uint32_t start = field(0), leading = field(16), stride = field(32);
  for (int n = 0; n < operation.columns; ++n) {
    for (uint32_t half = 0; half < 2; ++half) {
      const uint32_t address = start + n / 8 * stride + half * leading + n % 8 * 16;
      std::memcpy(&b[n][16 * half], resolve(address, 16, "wgmma"), 16);
    }
  }
}

template <class A, class B> void perform(void* const* operands, size_t i) {
  A a[16][32];
  B b[256][32];
  const auto wait_of = [&](int lane) -> WgmmaWait& {
    return *static_cast<WgmmaWait*>(operands[lane]);
  };
  const Wgmma first = wait_of(0).completed[i];
  for (int lane = 0; lane < 32; ++lane) gather_rows(a, lane, wait_of(lane).completed[i].a);
  gather_columns(b, first);
  for (int lane = 0; lane < 32; ++lane) {
    auto& all = wait_of(lane).fiber->accumulators;
    int32_t* d = wait_of(lane).completed[i].d;
    const auto of_d =
        std::find_if(all.begin(), all.end(), [=](const Accumulators& x) { return x.d == d; });
    add_products(of_d->values.data(), first.columns / 2, lane, a, b);
    if (--of_d->in_flight == 0) {
      std::copy(of_d->values.begin(), of_d->values.end(), d);
      all.erase(of_d);
    }
  }
}

void perform_wgmmas(void* const* operands) {
  const auto& first = static_cast<const WgmmaWait*>(operands[0])->completed;
  for (int lane = 1; lane < 32; ++lane) {
    const auto& other = static_cast<const WgmmaWait*>(operands[lane])->completed;
    const bool same = std::equal(first.begin(), first.end(), other.begin(), other.end(),
                                 [](const Wgmma& x, const Wgmma& y) {
                                   return x.b == y.b && x.columns == y.columns &&
                                          x.a_signed == y.a_signed && x.b_signed == y.b_signed;
                                 });
    if (!same) throw Error("lanes of one warp issued different wgmma");
  }
  for (size_t i = 0; i < first.size(); ++i) {
    const auto of_types = first[i].a_signed   ? perform<int8_t, int8_t>
                          : first[i].b_signed ? perform<uint8_t, int8_t>
                                              : perform<uint8_t, uint8_t>;
    of_types(operands, i);
  }
}

}  // namespace

void complete_bulk_copy(size_t i) {
  const BulkCopy copy = machine.bulk_copies[i];
  machine.bulk_copies.erase(machine.bulk_copies.begin() + static_cast<std::ptrdiff_t>(i));
  if (copy.block->live == 0) throw Error("bulk_copy: its block has ended before it arrived");
  std::memcpy(copy.to, copy.from ? copy.from : copy.value, copy.bytes);
  update(copy.barrier, 0, -static_cast<int64_t>(copy.bytes));
}

int lane() { return machine.current->lane; }

uint64_t exchange(uint64_t value, int source_lane) {
  Exchange operands{value, 0, source_lane};
  meet(
      "shuffle",
      [](void* const* lanes) {
        for (int i = 0; i < 32; ++i) {
          auto& own = *static_cast<Exchange*>(lanes[i]);
          own.result = static_cast<const Exchange*>(lanes[own.source])->value;
        }
      },
      &operands);
  return operands.result;
}

void multiply(int32_t* d, const uint32_t* a, const uint32_t* b, bool a_signed, bool b_signed) {
  MmaOperands operands{d, a, b};
  if (a_signed && b_signed) return meet("mma_s8s8", multiply_fragments<int8_t, int8_t>, &operands);
  if (a_signed) return meet("mma_s8u8", multiply_fragments<int8_t, uint8_t>, &operands);
  if (b_signed) return meet("mma_u8s8", multiply_fragments<uint8_t, int8_t>, &operands);
  meet("mma_u8u8", multiply_fragments<uint8_t, uint8_t>, &operands);
}

void copy_async_wait(size_t groups_left) {
  for (const AsyncCopy& copy : machine.current->copies.complete_all_but(groups_left)) {
    if (copy.from) {
      std::memcpy(copy.to, copy.from, 16);
    } else {
      std::memset(copy.to, 0, 16);
    }
  }
}

void wgmma(int32_t* d, const uint32_t* a, uint64_t b, int columns, bool a_signed, bool b_signed) {
  Fiber& self = *machine.current;
  if (!self.fenced) throw Error("wgmma_registers without a wgmma_fence since the last wgmma_wait");
  if (machine.threads % 128) throw Error("wgmma_registers in a block without whole warpgroups");
  auto& all = self.accumulators;
  auto of_d = std::find_if(all.begin(), all.end(), [=](const Accumulators& x) { return x.d == d; });
  if (of_d == all.end()) {
    all.push_back({d, std::vector<int32_t>(d, d + columns / 2), 0});
    of_d = all.end() - 1;
    std::fill(d, d + columns / 2, kPoisonedInt);
  }
  if (of_d->values.size() != static_cast<size_t>(columns / 2)) {
    throw Error("wgmma_registers of another size is in flight on the same registers");
  }
  ++of_d->in_flight;
  self.multiplications.open.push_back({d, a, b, columns, a_signed, b_signed});
  if (self.lane == 0) ++self.warp->wgmmas;
}

void wgmma_wait(size_t groups_left) {
  Fiber& self = *machine.current;
  WgmmaWait operands{&self, self.multiplications.complete_all_but(groups_left)};
  meet("wgmma_wait", perform_wgmmas, &operands);
  self.fenced = false;
}

}  // namespace emulated

using namespace emulated;

unsigned char* shared_memory() { return machine.current->block->shared; }

void warp_sync() {
  meet("warp_sync", [](void* const*) {}, nullptr);
}

uint32_t ballot(bool predicate) {
  Ballot operands{predicate, 0};
  meet(
      "ballot",
      [](void* const* lanes) {
        uint32_t result = 0;
        for (int i = 0; i < 32; ++i) {
          result |= static_cast<uint32_t>(static_cast<const Ballot*>(lanes[i])->predicate) << i;
        }
        for (int i = 0; i < 32; ++i) static_cast<Ballot*>(lanes[i])->result = result;
      },
      &operands);
  return operands.result;
}

void load_matrices(uint32_t (&r)[4], const void* row) {
  check_shared(row, 16, 16, "load_matrices");
  LoadMatrices operands{static_cast<const unsigned char*>(row), r};
  meet(
      "load_matrices",
      [](void* const* lanes) {
        const auto of = [&](int i) { return static_cast<const LoadMatrices*>(lanes[i]); };
        for (int lane = 0; lane < 32; ++lane) {
          for (int i = 0; i < 4; ++i) {
            std::memcpy(of(lane)->r + i, of(8 * i + lane / 4)->row + 4 * (lane % 4), 4);
          }
        }
      },
      &operands);
}

void copy_async16(void* shared, const void* global, bool valid) {
  check_shared(shared, 16, 16, "copy_async16");
  check_global(global, "copy_async16");
  std::memset(shared, kPoison, 16);
  const auto* from = valid ? static_cast<const unsigned char*>(global) : nullptr;
  machine.current->copies.open.push_back({static_cast<unsigned char*>(shared), from});
}
void copy_async_commit() { machine.current->copies.commit(); }

void named_barrier(int id, int threads) {
  if (id < 1 || id > 15) throw Error(text("named_barrier: id %lld is not 1 to 15", id));
  if (threads <= 0 || threads % 32) {
    throw Error(text("named_barrier: %lld threads are not whole warps", threads));
  }
  arrive_and_wait(machine.current->block->barriers[id], threads,
                  {"named_barrier(%lld, %lld)", id, threads});
}

uint32_t cluster_rank() { return machine.current->block->rank; }
uint32_t cluster_size() { return machine.launch.cluster; }
void cluster_sync() {
  auto& stores = machine.current->remote_stores;
  for (const RemoteStore& store : stores) std::memcpy(store.to, &store.value, 4);
  stores.clear();
  arrive_and_wait(machine.cluster_barrier, live_threads_of_cluster(), {"cluster_sync()"});
  machine.cluster_met = true;
}

uint32_t shared_address(const void* shared) {
  check_shared(shared, 0, 1, "shared_address");
  return kSharedStart + static_cast<uint32_t>(static_cast<const unsigned char*>(shared) -
                                              machine.current->block->shared);
}
uint32_t remote_address(uint32_t address, uint32_t rank) {
  if (rank >= machine.launch.cluster) {
    throw Error(
        text("remote_address: rank %lld in a cluster of %lld", rank, machine.launch.cluster));
  }
  return (address & 0xFFFFFFu) | rank << 24 | kRemote;
}
void store_remote(uint32_t remote, uint32_t value) {
  unsigned char* to = resolve(remote, 4, "store_remote");
  std::memset(to, kPoison, 4);
  machine.current->remote_stores.push_back({to, value});
}

void store_async16(uint32_t remote, uint4 value, uint32_t remote_barrier) {
  BulkCopy store{&machine.blocks[(remote & ~kRemote) >> 24], resolve(remote, 16, "store_async16"),
                 nullptr, 16,
                 reinterpret_cast<uint64_t*>(resolve(remote_barrier, 8, "store_async16"))};
  if (!(remote & kRemote) || remote >> 24 != remote_barrier >> 24) {
    throw Error("store_async16: the data and its barrier are not in one remote block");
  }
  std::memcpy(store.value, &value, 16);
  std::memset(store.to, kPoison, 16);
  machine.bulk_copies.push_back(store);
}

void barrier_init(uint64_t* barrier, uint32_t arrivals) {
  check_shared(barrier, 8, 8, "barrier_init");
  if (arrivals == 0 || arrivals > 0xFFFF) {
    throw Error(text("barrier_init: %lld arrivals are not 1 to 65535", arrivals));
  }
  const Mbarrier fresh{0, arrivals, arrivals, 0, kBarrierTag};
  std::memcpy(barrier, &fresh, 8);
}
void barrier_arrive(uint64_t* barrier) {
  check_shared(barrier, 8, 8, "barrier_arrive");
  update(barrier, 1, 0);
}
void barrier_arrive_expect(uint64_t* barrier, uint32_t bytes) {
  check_shared(barrier, 8, 8, "barrier_arrive_expect");
  update(barrier, 1, bytes);
}
void barrier_arrive_remote(uint32_t remote_barrier) {
  update(reinterpret_cast<uint64_t*>(resolve(remote_barrier, 8, "barrier_arrive_remote")), 1, 0);
}
void barrier_wait(uint64_t* barrier, uint32_t parity) {
  check_shared(barrier, 8, 8, "barrier_wait");
  // Asked again after each phase: a thread that comes late to a phase waits for the next but one.
  while (load(barrier).parity == (parity & 1)) {
    machine.mbarrier_waiters.push_back({barrier, machine.current});
    wait_at({"barrier_wait(shared memory + %lld, parity %lld)",
             reinterpret_cast<unsigned char*>(barrier) - shared_memory(), parity});
  }
}
void bulk_copy(void* shared, const void* global, uint32_t bytes, uint64_t* barrier) {
  check_shared(shared, bytes, 16, "bulk_copy");
  check_shared(barrier, 8, 8, "bulk_copy");
  check_global(global, "bulk_copy");
  if (bytes % 16) throw Error(text("bulk_copy: %lld bytes are no multiple of 16", bytes));
  std::memset(shared, kPoison, bytes);
  machine.bulk_copies.push_back({machine.current->block, static_cast<unsigned char*>(shared),
                                 static_cast<const unsigned char*>(global), bytes, barrier});
}

void wgmma_fence() { machine.current->fenced = true; }
void wgmma_commit() { machine.current->multiplications.commit(); }
uint64_t matrix_descriptor(const void* shared, uint32_t leading, uint32_t stride) {
  check_shared(shared, 128, 16, "matrix_descriptor");
  return static_cast<uint64_t>(shared_address(shared) >> 4) |
         static_cast<uint64_t>(leading >> 4) << 16 | static_cast<uint64_t>(stride >> 4) << 32;
}

}  // namespace rbm::cuda

void __syncthreads() {
  using namespace rbm::cuda::emulated;
  Block& block = *machine.current->block;
  arrive_and_wait(block.barriers[0], block.live, {"__syncthreads()"});
}

const char* cudaGetErrorString(cudaError_t status) {
  switch (status) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    default:
      return "emulated CUDA error";
  }
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = 4;  // few, so that persistent kernels walk over several tiles
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = 9;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 0;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = static_cast<int>(rbm::cuda::emulated::kSharedLimit);
      break;
  }
  return cudaSuccess;
}
