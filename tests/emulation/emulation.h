// Runs the blocks of a kernel launch one after the other on the calling thread, and the threads of
// a block as fibers. The names of CUDA's own headers are in cuda_runtime.h.
//
// CUDA_EMULATION_ORDER says which blocks and threads run first: `forward` (default), `reverse`, or
// a number, the seed of a random order of blocks and, at every barrier, of threads. The results of
// correct kernels do not depend on it.
#pragma once

#include <cstdint>
#include <cstring>
#include <mutex>
#include <numeric>
#include <utility>
#include <vector>

#include "fibers.h"

namespace cuda_emulation {

// Warps ---------------------------------------------------------------------------------------

inline int lane() { return state.current % kWarp; }

// The values that the lanes of a warp brought to one barrier.
struct Exchange {
  const Slot* slots;
  uint64_t phase;

  bool has(int lane) const { return slots[lane].phase == phase; }
  // Returns 0xFF... for a lane that has returned or does not exist.
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

// Fills shared memory with 0xFF. The memory is that of all kernels in the program, so only every
// 16th block gets all of it filled. The others get the range that such blocks wrote.
class Poison {
 public:
  Poison() {
    dl_iterate_phdr([](dl_phdr_info* info, size_t,
                       void* self) { return static_cast<Poison*>(self)->find(*info); },
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

// Runs a grid, whose dimensions are valid. `call` runs one thread.
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
  last_error = error;  // it lies in shared memory, which is overwritten
}

}  // namespace cuda_emulation
