// The scheduler behind simt.h: fibers, barriers, warp exchanges. Compiled without sanitizers: what
// passes here orders nothing for ThreadSanitizer but what is declared to it.
#include "cuda/launch.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

// Each is there only under its own sanitizer.
#define WEAK extern "C" __attribute__((weak))
WEAK void __sanitizer_start_switch_fiber(void** save, const void* bottom, std::size_t size);
WEAK void __sanitizer_finish_switch_fiber(void* save, const void** bottom, std::size_t* size);
WEAK void __sanitizer_set_death_callback(void (*callback)());
WEAK void __asan_poison_memory_region(const volatile void* address, std::size_t size);
WEAK void __asan_unpoison_memory_region(const volatile void* address, std::size_t size);
WEAK void* __tsan_create_fiber(unsigned flags);
WEAK void __tsan_destroy_fiber(void* fiber);
WEAK void* __tsan_get_current_fiber();
WEAK void __tsan_switch_to_fiber(void* fiber, unsigned flags);
WEAK void __tsan_set_fiber_name(void* fiber, const char* name);
WEAK void __tsan_acquire(void* address);
WEAK void __tsan_release(void* address);
WEAK char __start_simt_shared[], __stop_simt_shared[];
WEAK char __data_start[], _end[];  // the program's variables

namespace simt {
namespace {

constexpr std::size_t kStack = 256 << 10, kGuard = 4 << 10, kMostShared = 227 << 10;
constexpr int kNaps = 100;  // in a row, of all who are not waiting: then nobody will wake them

struct Context {
  ucontext_t registers;
  const void* bottom = nullptr;
  std::size_t size = 0;
  void* fake_stack = nullptr;  // AddressSanitizer's
  void* thread = nullptr;      // ThreadSanitizer's
};

enum class State { ready, waiting, done };

// What names a barrier to ThreadSanitizer, by its address. Two take turns: who leaves one late must
// not be ordered behind those who have come to the next.
struct Meeting {
  char order[2] = {};
  int turn = 0;
};

struct Fiber : Context {
  uint3 index;
  State state = State::ready;
  Site site = {};          // where it waits
  unsigned waits_for = 0;  // these lanes; 0: the whole block
  bool napping = false;
  std::uint64_t given = 0, received[32] = {};
  std::vector<Copy> copies;
  unsigned group = 0;  // of the copies to come
  Meeting meeting;  // __syncwarp of a mask that begins with this lane
};

struct Block {
  std::string kernel, failure;
  const std::function<void()>* body;
  std::vector<Fiber> fibers;
  char* shared;
  std::size_t shared_bytes;
  unsigned at_barrier;
  Meeting barrier;
  char start, end;  // as a meeting's
};

Context host;
Block* block = nullptr;
Fiber* running = nullptr;

void acquire(char* order) {
  if (__tsan_acquire) __tsan_acquire(order);
}
void release(char* order) {
  if (__tsan_release) __tsan_release(order);
}

std::string place(const uint3& i) {
  return "(" + std::to_string(i.x) + "," + std::to_string(i.y) + "," + std::to_string(i.z) + ")";
}
std::string place(const Fiber& fiber) {
  return block->kernel + " block " + place(blockIdx) + " thread " + place(fiber.index);
}
std::string place(const Site& site) {
  const char* slash = std::strrchr(site.file, '/');
  return std::string(site.what) + " at " + (slash ? slash + 1 : site.file) + ":" +
         std::to_string(site.line);
}
std::string doing(const Fiber& fiber) {
  const std::string who = "thread " + place(fiber.index);
  return who + (fiber.state == State::done ? " has exited" : " waits in " + place(fiber.site));
}

void say_where() {  // a sanitizer found something, and does not know where on the grid
  if (running) std::fprintf(stderr, "simt: in %s\n", place(*running).c_str());
}

// Stacks and ThreadSanitizer's threads are kept from block to block: both cost more than a kernel.
struct Kept {
  char* stack;
  void* thread;
};
std::vector<Kept> pool;

const Kept& keep(std::size_t i) {
  while (pool.size() <= i) {
    void* made = mmap(nullptr, kGuard + kStack, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (made == MAP_FAILED || mprotect(made, kGuard, PROT_NONE)) throw std::bad_alloc();
    pool.push_back({static_cast<char*>(made) + kGuard, nullptr});
  }
  if (__tsan_create_fiber && !pool[i].thread) pool[i].thread = __tsan_create_fiber(0);
  return pool[i];
}

// Threads that were stopped on the way leave redzones, open copies and open calls behind.
void clean_up() {
  if (__asan_unpoison_memory_region)
    for (const Fiber& fiber : block->fibers)
      for (const Copy& copy : fiber.copies) __asan_unpoison_memory_region(copy.to, 16);
  for (Kept& kept : pool) {
    if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(kept.stack, kStack);
    if (kept.thread) __tsan_destroy_fiber(kept.thread);
    kept.thread = nullptr;
  }
}

void go(Context& from, Context& to, bool for_good = false) {
  if (__sanitizer_start_switch_fiber)
    __sanitizer_start_switch_fiber(for_good ? nullptr : &from.fake_stack, to.bottom, to.size);
  constexpr unsigned kOrdersNothing = 1;
  if (to.thread) __tsan_switch_to_fiber(to.thread, kOrdersNothing);
  swapcontext(&from.registers, &to.registers);
  if (__sanitizer_finish_switch_fiber)
    __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
}

void enter() {
  if (__sanitizer_finish_switch_fiber)
    __sanitizer_finish_switch_fiber(nullptr, &host.bottom, &host.size);
  acquire(&block->start);
  (*block->body)();
  if (!running->copies.empty())
    fail(running->copies[0].site, "is waited for by nobody: the thread has exited");
  running->state = State::done;
  release(&block->end);
  go(*running, host, true);
}

void wait(Site site, unsigned lanes) {
  running->site = site;
  running->waits_for = lanes;
  running->state = State::waiting;
  release(&block->end);  // should it never come back
  go(*running, host);
}

// Nobody can go on: who waits, and the first who is not there with it.
std::string stuck() {
  const auto& all = block->fibers;
  std::size_t i = 0, j = 0;
  while (all[i].state != State::waiting) ++i;
  const auto awaited = [&](std::size_t j) {
    const unsigned lanes = all[i].waits_for;
    const bool mine = lanes == 0 || (j / 32 == i / 32 && (lanes >> j % 32 & 1));
    return mine && (all[j].state == State::done || all[j].waits_for != lanes);
  };
  while (j < all.size() && !awaited(j)) ++j;
  const std::string other = j < all.size() ? doing(all[j]) : "its lanes do not exist";
  return place(all[i]) + ": " + place(all[i].site) + " is not reached by all: " + other;
}

void prepare(Fiber& fiber, const Kept& kept) {
  fiber.bottom = kept.stack;
  fiber.size = kStack;
  getcontext(&fiber.registers);
  fiber.registers.uc_stack.ss_sp = kept.stack;
  fiber.registers.uc_stack.ss_size = kStack;
  makecontext(&fiber.registers, enter, 0);
  // AddressSanitizer's swapcontext would wipe the redzones of a stack that it is told of.
  fiber.registers.uc_stack.ss_size = 0;
  fiber.thread = kept.thread;
  if (fiber.thread) __tsan_set_fiber_name(fiber.thread, place(fiber).c_str());
}

void run_block(std::size_t shared_bytes) {
  // Volatile: a loop that becomes memset would be checked against the redzones between variables.
  for (volatile char* p = __start_simt_shared; p < __stop_simt_shared; ++p) *p = char(0xFF);
  void* shared;
  if (posix_memalign(&shared, 128, shared_bytes + !shared_bytes)) throw std::bad_alloc();
  const std::unique_ptr<void, void (*)(void*)> owned(shared, std::free);
  std::memset(shared, 0xFF, shared_bytes);
  block->shared = static_cast<char*>(shared);
  block->shared_bytes = shared_bytes;

  const unsigned threads = blockDim.x * blockDim.y * blockDim.z;
  block->at_barrier = 0;
  block->fibers.assign(threads, {});
  release(&block->start);
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = block->fibers[i];
    fiber.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
    prepare(fiber, keep(i));
  }
  bool moved = true;
  for (int naps = 0; moved && block->failure.empty();) {
    moved = false;
    bool awake = false;
    for (Fiber& fiber : block->fibers) {
      if (fiber.state != State::ready || !block->failure.empty()) continue;
      if (naps == kNaps) {
        block->failure = place(fiber) + ": " + place(fiber.site) + " waits for what nobody brings";
        break;
      }
      moved = true;
      fiber.napping = false;
      running = &fiber;
      threadIdx = fiber.index;
      go(host, fiber);
      running = nullptr;
      awake |= !fiber.napping;
    }
    naps = awake ? 0 : naps + 1;
  }
  for (const Fiber& fiber : block->fibers)
    if (block->failure.empty() && fiber.state == State::waiting) block->failure = stuck();
  acquire(&block->end);
  if (block->failure.empty()) return;
  clean_up();
  throw std::logic_error(block->failure);
}

}  // namespace
}  // namespace simt

extern "C" void __ubsan_on_report() { simt::say_where(); }

namespace simt {

void launch(const std::string& kernel, dim3 grid, dim3 threads, std::size_t shared_bytes,
            const std::function<void()>& body) {
  const std::size_t count = std::size_t{threads.x} * threads.y * threads.z;
  if (!count || count > 1024 || threads.z > 64 || !grid.x || !grid.y || !grid.z ||
      grid.x > 0x7FFFFFFF || grid.y > 65535 || grid.z > 65535 || shared_bytes > kMostShared)
    throw std::runtime_error(kernel + ": invalid configuration argument");
  if (__sanitizer_set_death_callback) __sanitizer_set_death_callback(say_where);
  if (__tsan_get_current_fiber) host.thread = __tsan_get_current_fiber();
  Block made{};
  made.kernel = kernel;
  made.body = &body;
  block = &made;
  gridDim = grid;
  blockDim = threads;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = {x, y, z};
        run_block(shared_bytes);
      }
}

void* dynamic_shared() { return block->shared; }

void fail(Site site, const std::string& why) {
  block->failure = place(*running) + ": " + place(site) + " " + why;
  release(&block->end);
  go(*running, host);
  std::abort();  // an abandoned fiber is never entered again
}

void nap(Site site) {
  running->site = site;
  running->napping = true;
  release(&block->end);
  go(*running, host);
}

void check_shared(const void* p, Site site) {
  const auto* at = static_cast<const char*>(p);
  const auto inside = [&](const char* begin, const char* end) {
    return at >= begin && at + 16 <= end;
  };
  if (!inside(block->shared, block->shared + block->shared_bytes) &&
      !inside(__data_start, _end))
    fail(site, "is given an address outside the block's shared memory");
  if (reinterpret_cast<std::uintptr_t>(p) % 16)
    fail(site, "is given an address in shared memory that is no multiple of 16");
}

void copy_later(const Copy& copy) {
  running->copies.push_back(copy);
  running->copies.back().group = running->group;
  if (__asan_poison_memory_region) __asan_poison_memory_region(copy.to, 16);
}

void commit_copies() { ++running->group; }

bool next_copy(unsigned left, Copy* copy) {
  auto& copies = running->copies;
  if (copies.empty() || copies[0].group + left >= running->group) return false;
  *copy = copies[0];
  copies.erase(copies.begin());
  if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(copy->to, 16);
  return true;
}

void barrier(Site site) {
  static Site first;
  if (block->at_barrier == 0) first = site;
  if (first.line != site.line || std::strcmp(first.file, site.file))
    fail(site, "is not reached by all: others wait in " + place(first));
  char* const order = &block->barrier.order[block->barrier.turn];
  release(order);
  if (++block->at_barrier < block->fibers.size()) {
    wait(site, 0);
  } else {
    block->at_barrier = 0;
    block->barrier.turn ^= 1;
    for (Fiber& fiber : block->fibers) fiber.state = State::ready;
  }
  acquire(order);
}

const std::uint64_t* exchange(unsigned mask, std::uint64_t value, bool orders, Site site) {
  const std::size_t self = running - block->fibers.data(), lane = self % 32;
  Fiber* const lanes = running - lane;
  if (!(mask >> lane & 1)) fail(site, "is called by a lane outside its own mask");
  Meeting& meeting = lanes[__builtin_ctz(mask)].meeting;
  char* const order = &meeting.order[meeting.turn];
  if (orders) release(order);
  running->given = value;
  bool complete = true;
  for (unsigned i = 0; i < 32; ++i) {
    if (!takes_part(i, mask) || i == lane) continue;
    const bool here = lanes[i].state == State::waiting && lanes[i].waits_for == mask;
    if (here && std::strcmp(lanes[i].site.what, site.what)) fail(site, "meets " + doing(lanes[i]));
    complete &= here;
  }
  if (!complete) {
    wait(site, mask);
  } else {
    meeting.turn ^= 1;
    for (unsigned i = 0; i < 32; ++i) {
      if (!takes_part(i, mask)) continue;
      lanes[i].state = State::ready;
      for (unsigned j = 0; j < 32; ++j)
        if (takes_part(j, mask)) lanes[i].received[j] = lanes[j].given;
    }
  }
  if (orders) acquire(order);
  return running->received;
}

bool takes_part(unsigned lane, unsigned mask) {
  const std::size_t self = running - block->fibers.data();
  return (mask >> lane & 1) && self / 32 * 32 + lane < block->fibers.size();
}

}  // namespace simt
