// What every stage shares: number types, views of saliencies, parallel loops.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <vector>

#include "shape.h"

// The loops of a function with this mark are compiled for several vector widths; the loader picks.
#if defined(__x86_64__) && defined(__linux__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__) && \
    defined(__GNUC__) && __GNUC__ >= 12  // the first that knows these names
#define REPMTL_HAS_CLONES
#define REPMTL_CLONES \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define REPMTL_CLONES
#endif

namespace repmtl {

using bfloat16 = c10::BFloat16;
using float16 = c10::Half;

// The type that sums, similarities and losses have for saliencies of a type.
template <typename S>
struct Accumulation {
  using type = float;
};
template <>
struct Accumulation<double> {
  using type = double;
};
template <typename S>
using acc_t = typename Accumulation<S>::type;

// One task's saliencies or their gradient (B, C, N) in memory; strides and offsets count elements.
template <typename S>
struct View {
  S* data;  // (0, 0, 0)
  int64_t batch_stride;
  int64_t channel_stride;
  int64_t position_stride;       // where `offsets` is empty
  std::vector<int64_t> offsets;  // (N), of positions that have no single stride

  bool positions_are_adjacent() const { return offsets.empty() && position_stride == 1; }

  S* at(int64_t b, int64_t c, int64_t n) const {
    return data + b * batch_stride + c * channel_stride +
           (offsets.empty() ? n * position_stride : offsets[n]);
  }
};

// Applies a macro to every type that saliencies have.
#define REPMTL_FOR_SALIENCY_TYPES(macro) macro(double) macro(float) macro(bfloat16) macro(float16)

// Numbers to read that are worth a thread.
constexpr int64_t kGrain = 16384;

// How many parts of `size` numbers are worth a thread.
inline int64_t grain_of(int64_t size) { return size < kGrain ? kGrain / (size > 0 ? size : 1) : 1; }

// What parallelises loops: f(begin, end) over parts of [0, count), about `grain` each or more.
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

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace repmtl
