// Runs the threads of a block as fibers, which switch at barriers only.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <memory>

#include "state.h"

namespace cuda_emulation {

constexpr size_t kStack = 256 * 1024;  // address space; memory is what a kernel touches
constexpr size_t kGuard = 64 * 1024;   // a multiple of every page size

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

// A fiber runs threads from start to end, one after the other. A thread that waits at a barrier
// keeps its fiber.
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

}  // namespace cuda_emulation
