// Number types, views of saliencies and parallel loops, for every stage on the CPU.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <vector>

#include "../common/numbers.h"
#include "../common/shape.h"

// GCC compiles the loops of a function with this mark for several vector widths, and the loader
// picks one. GCC 12 is the first to know these names.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && __GNUC__ >= 12 && \
    !defined(__clang__) && !defined(__SANITIZE_ADDRESS__)
#define REPMTL_HAS_CLONES
#define REPMTL_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define REPMTL_CLONES
#endif

// The body of a function with this mark has to be part of its caller, whose vector width it takes.
#define REPMTL_INLINE inline __attribute__((always_inline))

namespace repmtl {

using bfloat16 = c10::BFloat16;
using float16 = c10::Half;

// One task's saliencies or their gradient (B, C, N) in memory; strides and offsets count elements.
template <typename S>
struct View {
  S* data;  // element (0, 0, 0)
  int64_t batch_stride;
  int64_t channel_stride;
  int64_t position_stride;       // where `offsets` is empty
  std::vector<int64_t> offsets;  // (N), for positions that have no single stride

  bool positions_are_adjacent() const { return offsets.empty() && position_stride == 1; }

  S* at(int64_t b, int64_t c, int64_t n) const {
    return data + b * batch_stride + c * channel_stride +
           (offsets.empty() ? n * position_stride : offsets[n]);
  }
};

// Applies a macro to every type that saliencies have.
#define REPMTL_FOR_SALIENCY_TYPES(macro) macro(double) macro(float) macro(bfloat16) macro(float16)

// A thread is worth its start if it reads this many numbers.
constexpr int64_t kGrain = 16384;

// Returns how many parts of `size` numbers make a thread worth its start.
inline int64_t grain_of(int64_t size) { return size < kGrain ? kGrain / (size > 0 ? size : 1) : 1; }

// Runs loops in parallel: f(begin, end) over parts of [0, count), of about `grain` each or more.
struct ParallelFor {
  virtual void run(int64_t count, int64_t grain, void (*f)(int64_t, int64_t, void*),
                   void* context) const = 0;

  template <typename F>
  void operator()(int64_t count, int64_t grain, const F& f) const {
    if (count == 0) return;
    run(
        count, grain,
        [](int64_t begin, int64_t end, void* context) {
          (*static_cast<const F*>(context))(begin, end);
        },
        const_cast<void*>(static_cast<const void*>(&f)));
  }

 protected:
  ~ParallelFor() = default;
};

}  // namespace repmtl
