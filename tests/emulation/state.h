// The state of the launch that runs: threads, barriers, the order of threads; reports of errors.
#pragma once

#include <cerrno>
#include <cstdarg>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "contexts.h"

// Shared memory lies in the thread-local segment of its program or library, since that range also
// holds variables of templates. It is filled with 0xFF before a block, so nothing else may be
// thread-local. With the address sanitizer it lies in plain statics, whose bounds are checked.
#if defined(__linux__) && !defined(CUDA_EMULATION_ASAN)
#define CUDA_EMULATION_POISON
#include <link.h>
#define CUDA_EMULATION_SHARED static thread_local
#else
#define CUDA_EMULATION_SHARED static
#endif

#define CUDA_EMULATION_HIDDEN __attribute__((visibility("hidden")))

struct uint3 {
  unsigned int x, y, z;
};

namespace cuda_emulation {

constexpr int kMaxThreads = 1024;
constexpr int kWarp = 32;

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
  int live;         // threads that have not returned
  int waiting;
  uint64_t phase;  // never starts again, so values of another block are not taken for this one's
  Site site;       // where its threads wait
};

struct Slot {
  uint64_t phase, bits;
};

struct Warp {
  Barrier barrier;
  Slot slots[2][kWarp];  // for this phase and the one before, which lanes may still read
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

}  // namespace cuda_emulation
