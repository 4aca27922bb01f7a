// Runs a launch for simt.h: one thread of the machine, a fiber for each CUDA thread, two blocks
// never at once. A fiber gives way only where CUDA has threads meet; everything else is the
// sanitizer's to judge. This file itself is not instrumented.
//
// ThreadSanitizer sees each fiber as a thread of its own. What meets at a barrier or in a warp is
// ordered, and so are the launch and its end, nothing else: two blocks are not, so that races
// between them in global memory show.
#include <cuda_runtime.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <exception>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(MOEKERNELS_ASAN)
#include <sanitizer/common_interface_defs.h>
#elif defined(MOEKERNELS_TSAN)
#include <sanitizer/tsan_interface.h>
#endif

#include "emulated.h"
#include "simt.h"

#ifndef __x86_64__
#error "the fibers of csrc/simt switch stacks in x86-64 assembly"
#endif

// Saves the caller's registers and stack pointer and goes on with another stack.
extern "C" void simt_switch(void** save, void* load);
asm(R"(
.text
.globl simt_switch
.hidden simt_switch
.type simt_switch,@function
simt_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
.size simt_switch, .-simt_switch
)");

// The kernels' __shared__ variables lie between (shared.ld).
extern "C" __attribute__((visibility("hidden"))) char simt_shared_begin[], simt_shared_end[];

namespace simt {
namespace {

constexpr size_t kStack = 64 << 10, kPage = 4096;
constexpr size_t kMostShared = 48 << 10;  // what a launch gets unasked
constexpr int kJunk = 0xCD;

enum class State : uint8_t { ready, in_warp, at_barrier, done };

struct Fiber {
  char* stack[2];  // for blocks of even and of odd number, as all that ThreadSanitizer takes for a
                   // thread's own
  [[maybe_unused]] void* tsan[2];
  [[maybe_unused]] void* asan_stack;
  void* stack_pointer;
  unsigned thread;
  State state;
  uint32_t generation;  // of what it waits for
};

struct Warp {
  uint64_t values[2][32];
  uint32_t arrived, generation, mask;
  Collective kind;
};

struct Launch {
  const char* name;
  unsigned blocks, threads, block;
  void (*body)(const void*);
  const void* context;
  std::exception_ptr error;
} now;

std::vector<Fiber> fibers;
std::vector<Warp> warps;
Fiber* current = nullptr;
void *main_stack_pointer, *dynamic;
unsigned alive, waiting;
uint32_t barrier_generation;
uint64_t order_seed = 0, launches = 0;

// What fibers and the launching thread synchronise on, in ThreadSanitizer's eyes; two sets, for
// even and odd blocks.
[[maybe_unused]] char launch_begin, launch_end, barrier_clock[2][2], warp_clock[2][32][2];

#if defined(MOEKERNELS_TSAN)
void* main_tsan;
void release(char* clock) { __tsan_release(clock); }
void acquire(char* clock) { __tsan_acquire(clock); }
#else
void release(char*) {}
void acquire(char*) {}
#endif
#if defined(MOEKERNELS_ASAN)
void* main_asan;
const void* main_bottom;
size_t main_size;
#endif

unsigned parity() { return now.block & 1; }

[[noreturn]] void fail(const std::string& what) {
  std::string where = std::string(now.name) + ": block " + std::to_string(now.block);
  if (current != nullptr) where += ", thread " + std::to_string(current->thread);
  throw std::runtime_error(where + ": " + what);
}

void to_main([[maybe_unused]] bool for_good) {
  Fiber* const self = current;
#if defined(MOEKERNELS_ASAN)
  __sanitizer_start_switch_fiber(for_good ? nullptr : &self->asan_stack, main_bottom, main_size);
#elif defined(MOEKERNELS_TSAN)
  __tsan_switch_to_fiber(main_tsan, __tsan_switch_to_fiber_no_sync);
#endif
  simt_switch(&self->stack_pointer, main_stack_pointer);
#if defined(MOEKERNELS_ASAN)
  __sanitizer_finish_switch_fiber(self->asan_stack, nullptr, nullptr);
#endif
}

void to_fiber(Fiber* fiber) {
  current = fiber;
#if defined(MOEKERNELS_ASAN)
  __sanitizer_start_switch_fiber(&main_asan, fiber->stack[parity()], kStack);
#elif defined(MOEKERNELS_TSAN)
  __tsan_switch_to_fiber(fiber->tsan[parity()], __tsan_switch_to_fiber_no_sync);
#endif
  simt_switch(&main_stack_pointer, fiber->stack_pointer);
#if defined(MOEKERNELS_ASAN)
  __sanitizer_finish_switch_fiber(main_asan, nullptr, nullptr);
#endif
  current = nullptr;
}

void fiber_main() {
#if defined(MOEKERNELS_ASAN)
  __sanitizer_finish_switch_fiber(nullptr, &main_bottom, &main_size);
#endif
  acquire(&launch_begin);
  try {
    now.body(now.context);
  } catch (...) {
    now.error = std::current_exception();
  }
  release(&launch_end);
  current->state = State::done;
  to_main(true);
  __builtin_unreachable();
}

void make_fibers(unsigned threads) {
  while (fibers.size() < threads) {
    Fiber fiber{};
    for (int i = 0; i < 2; ++i) {
      void* stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (stack == MAP_FAILED || mprotect(stack, kPage, PROT_NONE) != 0) throw std::bad_alloc();
      fiber.stack[i] = static_cast<char*>(stack);
#if defined(MOEKERNELS_TSAN)
      fiber.tsan[i] = __tsan_create_fiber(0);
#endif
    }
    fibers.push_back(fiber);
  }
}

// A fiber that begins in fiber_main at its first turn: six registers, where to go, and no caller.
void rewind(Fiber& fiber, unsigned thread) {
  void** top = reinterpret_cast<void**>(fiber.stack[parity()] + kStack - 16);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&fiber_main);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber.stack_pointer = top;
  fiber.thread = thread;
  fiber.state = State::ready;
}

// Shared memory begins as junk. What the block before did there is no access of this one's.
void clear_shared() {
  char *const begin = simt_shared_begin, *const end = simt_shared_end;
#if defined(MOEKERNELS_TSAN)
  mmap(begin, end - begin, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
#endif
  // Not by memset, which may not touch redzones.
  for (volatile char* p = begin; p < end; ++p) *p = static_cast<char>(kJunk);
}

void release_barrier() {
  waiting = 0;
  ++barrier_generation;
}

std::string who_waits() {
  std::string text;
  int named = 0;
  for (unsigned i = 0; i < now.threads && named < 4; ++i) {
    if (fibers[i].state == State::done) continue;
    text += (named++ ? ", thread " : "thread ") + std::to_string(i) +
            (fibers[i].state == State::in_warp ? " waits for lanes of its warp"
                                               : " waits at __syncthreads");
  }
  return text;
}

void run_block(std::vector<unsigned>& turns, std::mt19937_64& random) {
  warps.assign((now.threads + 31) / 32, Warp{});
  alive = now.threads;
  waiting = 0;
  for (unsigned i = 0; i < now.threads; ++i) rewind(fibers[i], i);
  while (alive > 0) {
    bool moved = false;
    if (order_seed != 0) std::shuffle(turns.begin(), turns.end(), random);
    for (unsigned i : turns) {
      Fiber& fiber = fibers[i];
      if (fiber.state == State::done) continue;
      if (fiber.state == State::in_warp && warps[i / 32].generation == fiber.generation) continue;
      if (fiber.state == State::at_barrier && barrier_generation == fiber.generation) continue;
      fiber.state = State::ready;
      moved = true;
      to_fiber(&fiber);
      if (now.error) return;
      // Threads that have returned no longer count.
      if (fiber.state == State::done && --alive > 0 && waiting == alive) release_barrier();
    }
    if (!moved) fail("deadlock: " + who_waits());
  }
}

}  // namespace

uint3 thread_index() { return {current->thread, 0, 0}; }
uint3 block_index() { return {now.block, 0, 0}; }
uint3 block_size() { return {now.threads, 1, 1}; }
uint3 grid_size() { return {now.blocks, 1, 1}; }
void* dynamic_shared() { return dynamic; }

void block_barrier() {
  const uint32_t generation = barrier_generation;
  char* const clock = &barrier_clock[parity()][generation & 1];
  release(clock);
  if (++waiting == alive) {
    release_barrier();
  } else {
    current->state = State::at_barrier;
    current->generation = generation;
    to_main(false);
  }
  acquire(clock);
}

const uint64_t* meet(Collective kind, uint32_t mask, uint64_t mine) {
  const unsigned lane = current->thread % 32, first = current->thread - lane;
  Warp& warp = warps[current->thread / 32];
  if (!(mask >> lane & 1)) fail("the mask of a warp's collective leaves the calling lane out");
  for (unsigned i = 0; i < 32 && warp.arrived == 0; ++i) {
    if (!(mask >> i & 1)) continue;
    if (first + i >= now.threads)
      fail("the mask of a warp's collective names a lane past the block");
    if (fibers[first + i].state == State::done)
      fail("the mask of a warp's collective names a lane that has returned");
  }
  if (warp.arrived == 0) {
    warp.kind = kind;
    warp.mask = mask;
  } else if (warp.kind != kind || warp.mask != mask) {
    fail("the lanes of a warp meet in different collectives");
  }
  const uint32_t generation = warp.generation;
  char* const clock = &warp_clock[parity()][current->thread / 32][generation & 1];
  warp.values[generation & 1][lane] = mine;
  warp.arrived |= 1u << lane;
  release(clock);
  if (warp.arrived == mask) {
    warp.arrived = 0;
    ++warp.generation;
  } else {
    current->state = State::in_warp;
    current->generation = generation;
    to_main(false);
  }
  acquire(clock);
  return warp.values[generation & 1];
}

uint64_t value_of(const uint64_t* values, uint32_t mask, int lane) {
  if (!(mask >> lane & 1)) fail("a shuffle reads a lane that its mask leaves out");
  return values[lane];
}

void run(const char* name, unsigned blocks, unsigned threads, size_t shared,
         void (*body)(const void*), const void* context) {
  ++launches;
  now = {name, blocks, threads, 0, body, context, nullptr};
  if (threads == 0 || threads > 1024) fail("a block of " + std::to_string(threads) + " threads");
  if (shared > kMostShared)
    fail(std::to_string(shared) + " bytes of dynamic shared memory were not asked for");
#if defined(MOEKERNELS_TSAN)
  main_tsan = __tsan_get_current_fiber();
#endif
  make_fibers(threads);
  std::vector<unsigned> turns(threads);
  for (unsigned i = 0; i < threads; ++i) turns[i] = i;
  std::mt19937_64 random(order_seed);
  // Freed with the launch, not with the block: to the sanitizer the launching thread does not wait
  // for a block.
  std::vector<std::unique_ptr<char[]>> arrays;
  for (; now.block < blocks && !now.error; ++now.block) {
    clear_shared();
    arrays.emplace_back(new char[shared]);
    dynamic = arrays.back().get();
    memset(dynamic, kJunk, shared);
    release(&launch_begin);
    run_block(turns, random);
  }
  acquire(&launch_end);
  if (now.error) {
    fibers.clear();  // they stand in the middle of a kernel
    std::rethrow_exception(now.error);
  }
}

}  // namespace simt

namespace moekernels::emulated {
// What an op allocates begins as junk.
void note_array(const void* data, int64_t bytes) {
  memset(const_cast<void*>(data), simt::kJunk, bytes);
}
}  // namespace moekernels::emulated

extern "C" {
// The order in which the threads of a block get their turns: 0 by number, else shuffled anew each
// round.
__attribute__((visibility("default"))) void moekernels_simt_order(uint64_t seed) {
  simt::order_seed = seed;
}
__attribute__((visibility("default"))) uint64_t moekernels_simt_launches() {
  return simt::launches;
}
}
