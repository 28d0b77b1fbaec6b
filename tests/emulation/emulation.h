// Runs the blocks of a kernel launch one after the other on the calling thread, the threads of a
// block as fibers that switch at barriers only. What CUDA's own headers name is in cuda_runtime.h.
//
// CUDA_EMULATION_ORDER says who runs first: `forward` (default), `reverse`, or a number, the seed
// of a random order of blocks and, at every barrier, of threads. Right kernels do not care.
#pragma once

#include <sys/mman.h>

#include <cerrno>
#include <cstdarg>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <numeric>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#define CUDA_EMULATION_ASAN
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define CUDA_EMULATION_ASAN
#endif
#endif
#ifdef CUDA_EMULATION_ASAN
#include <pthread.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(__x86_64__) && !defined(CUDA_EMULATION_UCONTEXT)
#define CUDA_EMULATION_UCONTEXT
#endif
#ifdef CUDA_EMULATION_UCONTEXT
#include <ucontext.h>
#endif

// Shared memory lies in the thread-local segment of its program or library, for that is the one
// range which also holds variables of templates. It is filled with 0xFF before a block, so nothing
// else may be thread-local there. The address sanitizer checks bounds of plain statics only.
#if defined(__linux__) && !defined(CUDA_EMULATION_ASAN)
#define CUDA_EMULATION_POISON
#include <link.h>
#define CUDA_EMULATION_SHARED static thread_local
#else
#define CUDA_EMULATION_SHARED static
#endif

#if defined(__GNUC__) && !defined(__clang__)
#define CUDA_EMULATION_OPAQUE __attribute__((noinline, noipa))
#else
#define CUDA_EMULATION_OPAQUE __attribute__((noinline))
#endif
#define CUDA_EMULATION_HIDDEN __attribute__((visibility("hidden")))

struct uint3 {
  unsigned int x, y, z;
};

namespace cuda_emulation {

constexpr int kMaxThreads = 1024;
constexpr int kWarp = 32;
constexpr size_t kStack = 256 * 1024;  // address space; memory is what a kernel touches
constexpr size_t kGuard = 64 * 1024;   // a multiple of every page size

// Contexts ------------------------------------------------------------------------------------

struct Context {
#ifdef CUDA_EMULATION_UCONTEXT
  ucontext_t registers;
#else
  void* stack_pointer;
#endif
#ifdef CUDA_EMULATION_ASAN
  const void* bottom;
  size_t size;
  void* fake_stack;
#endif
};

#ifdef CUDA_EMULATION_UCONTEXT

inline void prepare(Context& context, char* bottom, char* top, void (*entry)()) {
  getcontext(&context.registers);
  context.registers.uc_stack.ss_sp = bottom;
  context.registers.uc_stack.ss_size = static_cast<size_t>(top - bottom);
  context.registers.uc_link = nullptr;
  makecontext(&context.registers, entry, 0);
}

inline void swap_registers(Context& from, Context& to) {
  swapcontext(&from.registers, &to.registers);
}

#else

inline void prepare(Context& context, char*, char* top, void (*entry)()) {
  void** stack = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(top) & ~uintptr_t(15)) - 2;
  stack[0] = reinterpret_cast<void*>(entry);
  stack[1] = nullptr;  // where a return address would be
  context.stack_pointer = stack;
}

// The compiler saves what the asm names, and the caller what a call may change; rbp can't be named.
CUDA_EMULATION_OPAQUE inline void swap_registers(Context& from, Context& to) {
  void** save = &from.stack_pointer;
  void* load = to.stack_pointer;
  asm volatile(
      "leaq -128(%%rsp), %%rsp\n\t"  // the red zone may be in use
      "pushq %%rbp\n\t"
      "leaq 1f(%%rip), %%rax\n\t"
      "pushq %%rax\n\t"
      "movq %%rsp, (%%rdi)\n\t"
      "movq %%rsi, %%rsp\n\t"
      "popq %%rax\n\t"
      "jmpq *%%rax\n"
      "1:\n\t"
      "popq %%rbp\n\t"
      "leaq 128(%%rsp), %%rsp\n\t"
      : "+D"(save), "+S"(load)
      :
      : "rax", "rbx", "rcx", "rdx", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "memory",
        "cc");
}

#endif

inline void switch_context(Context& from, Context& to) {
#ifdef CUDA_EMULATION_ASAN
  __sanitizer_start_switch_fiber(&from.fake_stack, to.bottom, to.size);
#endif
  swap_registers(from, to);
#ifdef CUDA_EMULATION_ASAN
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

// State ---------------------------------------------------------------------------------------

enum class Operation { syncthreads, syncwarp, shuffle, vote, matrix };

inline const char* name_of(Operation operation) {
  switch (operation) {
    case Operation::syncthreads: return "__syncthreads";
    case Operation::syncwarp: return "__syncwarp";
    case Operation::shuffle: return "a shuffle";
    case Operation::vote: return "a vote";
    default: return "a matrix load or store";
  }
}

struct Site {
  Operation operation;
  const char* file;
  int line;

  bool operator==(const Site& other) const {
    return operation == other.operation && line == other.line &&
           (file == other.file || std::strcmp(file, other.file) == 0);
  }
};

struct Barrier {
  int first, size;  // its threads
  int live;         // those that have not returned
  int waiting;
  uint64_t phase;  // never starts again, so values of another block are not taken for this one's
  Site site;       // of those that wait
};

struct Slot {
  uint64_t phase, bits;
};

struct Warp {
  Barrier barrier;
  Slot slots[2][kWarp];  // of the phase and of the one before, which some lanes may still read
};

using Fiber = Context;

struct Thread {
  uint3 index;
  Fiber* fiber;  // null before the thread starts
  Barrier* waits_at;
};

enum class Order { forward, reverse, random };

struct State {
  std::mutex launching;  // one launch at a time in a process
  void (*call)(void*) = nullptr;
  void* arguments = nullptr;
  uint3 thread_index{}, block_index{}, block_dim{}, grid_dim{};
  int current = 0;
  Thread threads[kMaxThreads];
  Barrier block{};
  Warp warps[kMaxThreads / kWarp]{};
  uint16_t ready[kMaxThreads];  // a ring: a thread is in it once at most
  unsigned ready_head = 0, ready_count = 0;
  Context launcher{};
  std::vector<std::unique_ptr<Fiber>> fibers;  // they and their stacks are never given back
  std::vector<Fiber*> idle;
  Order order = Order::forward;
  uint64_t random = 0;
};

CUDA_EMULATION_HIDDEN inline State state;

// A cudaError_t. It also marks the segment of shared memory.
CUDA_EMULATION_HIDDEN inline thread_local int last_error = 0;

__attribute__((format(printf, 1, 2))) inline void complain(const char* format, ...) {
  const uint3 b = state.block_index, g = state.grid_dim, d = state.block_dim;
  std::fprintf(stderr,
               "CUDA emulation: block (%u, %u, %u) of grid (%u, %u, %u), %ux%ux%u threads: ", b.x,
               b.y, b.z, g.x, g.y, g.z, d.x, d.y, d.z);
  va_list values;
  va_start(values, format);
  std::vfprintf(stderr, format, values);
  va_end(values);
  std::fputc('\n', stderr);
}

[[noreturn]] inline void fail(const Site& site, const char* what) {
  const uint3 t = state.thread_index;
  complain("thread (%u, %u, %u), %s at %s:%d: %s", t.x, t.y, t.z, name_of(site.operation),
           site.file, site.line, what);
  std::abort();
}

[[noreturn]] inline void report_deadlock() {
  struct Group {
    Barrier* barrier;
    int count;
  };
  complain("deadlock");
  std::vector<Group> groups;
  for (int t = 0; t < state.block.size; ++t) {
    Barrier* barrier = state.threads[t].waits_at;
    if (barrier == nullptr) continue;
    if (groups.empty() || groups.back().barrier != barrier) groups.push_back({barrier, 0});
    ++groups.back().count;
  }
  for (const Group& group : groups) {
    const Site& site = group.barrier->site;
    std::fprintf(stderr, "  threads %d to %d: %d wait at %s, %s:%d\n", group.barrier->first,
                 group.barrier->first + group.barrier->size - 1, group.count,
                 name_of(site.operation), site.file, site.line);
  }
  std::fprintf(stderr, "  %d of %d threads have returned\n", state.block.size - state.block.live,
               state.block.size);
  std::abort();
}

// Order ---------------------------------------------------------------------------------------

inline uint64_t random_below(uint64_t count) {  // count < 2^32
  state.random += 0x9E3779B97F4A7C15u;          // SplitMix64
  uint64_t z = state.random;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return ((z ^ (z >> 31)) >> 32) * count >> 32;
}

inline void read_order() {
  const char* text = std::getenv("CUDA_EMULATION_ORDER");
  if (text == nullptr || *text == 0 || std::strcmp(text, "forward") == 0) {
    state.order = Order::forward;
  } else if (std::strcmp(text, "reverse") == 0) {
    state.order = Order::reverse;
  } else {
    char* end;
    errno = 0;
    state.random = std::strtoull(text, &end, 10);
    if (*text < '0' || *text > '9' || *end != 0 || errno != 0) {
      std::fprintf(stderr, "CUDA_EMULATION_ORDER is forward, reverse or a number, not \"%s\"\n",
                   text);
      std::abort();
    }
    state.order = Order::random;
  }
}

inline void make_ready(int thread) {
  state.ready[(state.ready_head + state.ready_count++) % kMaxThreads] =
      static_cast<uint16_t>(thread);
}

inline int take_ready() {
  uint16_t& head = state.ready[state.ready_head];
  if (state.order == Order::random) {
    const unsigned i = static_cast<unsigned>(random_below(state.ready_count));
    std::swap(head, state.ready[(state.ready_head + i) % kMaxThreads]);
  }
  state.ready_head = (state.ready_head + 1) % kMaxThreads;
  --state.ready_count;
  return head;
}

// Fibers --------------------------------------------------------------------------------------

inline void select(int thread) {
  state.current = thread;
  state.thread_index = state.threads[thread].index;
}

inline void release(Barrier& barrier) {
  barrier.waiting = 0;
  ++barrier.phase;
  const bool reverse = state.order == Order::reverse;
  for (int i = 0; i < barrier.size; ++i) {
    const int t = barrier.first + (reverse ? barrier.size - 1 - i : i);
    if (state.threads[t].waits_at != &barrier) continue;
    state.threads[t].waits_at = nullptr;
    make_ready(t);
  }
}

inline void leave(Barrier& barrier) {
  --barrier.live;
  if (barrier.live > 0 && barrier.waiting == barrier.live) release(barrier);
}

// A fiber runs threads from start to end, one after the other; those that were stopped by a barrier
// have a fiber of their own to go on with.
inline void run_fiber() {
#ifdef CUDA_EMULATION_ASAN
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
  for (;;) {
    Thread& started = state.threads[state.current];
    Fiber* const self = started.fiber;
    state.call(state.arguments);
    started.fiber = nullptr;
    leave(state.warps[state.current / kWarp].barrier);
    leave(state.block);

    if (state.ready_count > 0) {
      select(take_ready());
      Thread& next = state.threads[state.current];
      if (next.fiber == nullptr) {
        next.fiber = self;
        continue;
      }
      state.idle.push_back(self);
      switch_context(*self, *next.fiber);
    } else if (state.block.live == 0) {
      state.idle.push_back(self);
      switch_context(*self, state.launcher);
    } else {
      report_deadlock();
    }
  }
}

inline Fiber* new_fiber() {
  char* bottom = static_cast<char*>(
      mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON, -1, 0));
  if (bottom == MAP_FAILED || mprotect(bottom, kGuard, PROT_NONE) != 0) {
    std::perror("CUDA emulation: the stack of a fiber");
    std::abort();
  }
  // Stacks at equal offsets would compete for the same few lines of the cache.
  char* const top = bottom + kStack - (state.fibers.size() % 64) * 1088;
  state.fibers.push_back(std::make_unique<Fiber>());
  Fiber* const fiber = state.fibers.back().get();
#ifdef CUDA_EMULATION_ASAN
  fiber->bottom = bottom + kGuard;
  fiber->size = static_cast<size_t>(top - bottom) - kGuard;
#endif
  prepare(*fiber, bottom + kGuard, top, run_fiber);
  return fiber;
}

// The fiber on which a selected thread starts or goes on.
inline Fiber& fiber_of(Thread& thread) {
  if (thread.fiber == nullptr) {
    if (state.idle.empty()) {
      thread.fiber = new_fiber();
    } else {
      thread.fiber = state.idle.back();
      state.idle.pop_back();
    }
  }
  return *thread.fiber;
}

CUDA_EMULATION_OPAQUE inline void wait(Barrier& barrier, const Site& site) {
  Thread& self = state.threads[state.current];
  if (barrier.waiting == 0) {
    barrier.site = site;
  } else if (!(barrier.site == site)) {
    complain("%d threads wait at %s, %s:%d", barrier.waiting, name_of(barrier.site.operation),
             barrier.site.file, barrier.site.line);
    fail(site, "waits at another barrier than other threads");
  }
  self.waits_at = &barrier;
  if (++barrier.waiting == barrier.live) release(barrier);
  if (state.ready_count == 0) report_deadlock();
  select(take_ready());
  Thread& next = state.threads[state.current];
  if (&next != &self) switch_context(*self.fiber, fiber_of(next));
}

// Warps ---------------------------------------------------------------------------------------

inline int lane() { return state.current % kWarp; }

// What the lanes of a warp gave at one barrier.
struct Exchange {
  const Slot* slots;
  uint64_t phase;

  bool has(int lane) const { return slots[lane].phase == phase; }
  // A lane that returned or does not exist has no value; 0xFF shows it.
  uint64_t bits(int lane) const { return has(lane) ? slots[lane].bits : ~uint64_t(0); }
};

inline Exchange exchange(uint64_t bits, const Site& site) {
  Warp& warp = state.warps[state.current / kWarp];
  const uint64_t phase = warp.barrier.phase;
  Slot* const slots = warp.slots[phase % 2];
  slots[lane()] = {phase, bits};
  wait(warp.barrier, site);
  return {slots, phase};
}

inline void check_mask(unsigned mask, const Site& site) {
  const int size = state.warps[state.current / kWarp].barrier.size;
  const unsigned all = size == kWarp ? ~0u : (1u << size) - 1;
  if ((mask & all) != all) fail(site, "only masks of the whole warp are emulated");
}

// Launch --------------------------------------------------------------------------------------

#ifdef CUDA_EMULATION_POISON

// Fills shared memory with 0xFF. As it is that of all kernels in the program, most blocks refill
// only the range that was written by those of every 16 that got it whole.
class Poison {
 public:
  Poison() {
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* self) {
          return static_cast<Poison*>(self)->find(*info);
        },
        this);
  }

  void before_block(uint64_t number) {
    if (number % 16 == 1) learn();
    if (number % 16 == 0) {
      fill(0, size_);
    } else {
      fill(low_, high_);
    }
  }

 private:
  int find(const dl_phdr_info& info) {
    const char* const marker = reinterpret_cast<char*>(&last_error);
    char* const data = static_cast<char*>(info.dlpi_tls_data);
    if (data == nullptr) return 0;
    for (int i = 0; i < info.dlpi_phnum; ++i) {
      const auto& header = info.dlpi_phdr[i];
      if (header.p_type != PT_TLS || marker < data || marker >= data + header.p_memsz) continue;
      data_ = data;
      size_ = low_ = header.p_memsz;
      return 1;
    }
    return 0;
  }

  void fill(size_t begin, size_t end) {
    if (begin < end) std::memset(data_ + begin, 0xFF, end - begin);
  }

  void learn() {
    size_t first = 0, last = size_;
    while (first < low_ && data_[first] == '\xFF') ++first;
    while (last > high_ && last > first && data_[last - 1] == '\xFF') --last;
    low_ = first;
    if (last > first) high_ = last;
  }

  char* data_ = nullptr;
  size_t size_ = 0, low_ = 0, high_ = 0;
};

#else

struct Poison {
  void before_block(uint64_t) {}
};

#endif

// The blocks of a grid in the order in which they run.
class Blocks {
 public:
  explicit Blocks(uint3 grid) : grid_(grid), count_(uint64_t(grid.x) * grid.y * grid.z) {
    if (state.order != Order::random) return;
    shuffled_.resize(count_);
    std::iota(shuffled_.begin(), shuffled_.end(), uint64_t(0));
    for (uint64_t i = count_; i > 1; --i) std::swap(shuffled_[i - 1], shuffled_[random_below(i)]);
  }

  uint64_t count() const { return count_; }

  uint3 at(uint64_t i) const {
    if (state.order == Order::reverse) i = count_ - 1 - i;
    if (state.order == Order::random) i = shuffled_[i];
    const uint64_t row = i / grid_.x;
    return {static_cast<unsigned>(i % grid_.x), static_cast<unsigned>(row % grid_.y),
            static_cast<unsigned>(row / grid_.y)};
  }

 private:
  uint3 grid_;
  uint64_t count_;
  std::vector<uint64_t> shuffled_;
};

inline void start_block(uint3 index, int threads) {
  state.block_index = index;
  state.block.live = threads;
  for (int first = 0; first < threads; first += kWarp) {
    Barrier& barrier = state.warps[first / kWarp].barrier;
    barrier.live = barrier.size;
  }
  for (int i = 0; i < threads; ++i) {
    make_ready(state.order == Order::reverse ? threads - 1 - i : i);
  }
}

// The dimensions are valid. `call` runs one thread.
inline void launch(uint3 grid, uint3 block, void (*call)(void*), void* arguments) {
  const std::lock_guard<std::mutex> lock(state.launching);
  const int error = last_error;
  read_order();
  state.call = call;
  state.arguments = arguments;
  state.grid_dim = grid;
  state.block_dim = block;
  const int threads = static_cast<int>(block.x * block.y * block.z);
  for (int t = 0; t < threads; ++t) {
    const unsigned u = static_cast<unsigned>(t), row = u / block.x;
    state.threads[t] = {{u % block.x, row % block.y, row / block.y}, nullptr, nullptr};
  }
  state.block.first = 0;
  state.block.size = threads;
  for (int first = 0; first < threads; first += kWarp) {
    Barrier& barrier = state.warps[first / kWarp].barrier;
    barrier.first = first;
    barrier.size = threads - first < kWarp ? threads - first : kWarp;
    if (barrier.phase == 0) barrier.phase = 1;  // slots that were never written have 0
  }
#ifdef CUDA_EMULATION_ASAN
  pthread_attr_t attributes;
  void* bottom;
  pthread_getattr_np(pthread_self(), &attributes);
  pthread_attr_getstack(&attributes, &bottom, &state.launcher.size);
  pthread_attr_destroy(&attributes);
  state.launcher.bottom = bottom;
#endif

  const Blocks blocks(grid);
  Poison poison;
  for (uint64_t i = 0; i < blocks.count(); ++i) {
    poison.before_block(i);
    start_block(blocks.at(i), threads);
    select(take_ready());
    switch_context(state.launcher, fiber_of(state.threads[state.current]));
  }
  last_error = error;  // it lies among shared memory
}

}  // namespace cuda_emulation
