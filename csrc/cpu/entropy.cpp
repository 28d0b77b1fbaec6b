#include "entropy.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>

#include "exponentials.h"

namespace repmtl {
namespace {

// Numbers that are computed side by side: in a row, or at one place of adjacent distributions.
constexpr int64_t kWidth = 16;
// Distributions of one unit of work. The mean adds the units' sums in order, so that it does not
// depend on the number of threads.
constexpr int64_t kChunk = 256;

// Rows that begin `stride` apart: `full` rows of kWidth numbers, then shorter ones of `width`.
// Either they are parts of one distribution (joined), or each lane is a distribution of its own.
struct Block {
  int64_t full, rows, width, stride;
  bool joined;

  // Calls f(offset, width) for each row, with a width that the compiler knows for full rows.
  template <typename F>
  REPMTL_INLINE void each(const F& f) const {
    int64_t r = 0;
    for (; r < full; ++r) f(r * stride, kWidth);
    for (; r < rows; ++r) f(r * stride, width);
  }

  // Puts the result for the distribution of a lane into that lane.
  template <typename A, typename F>
  REPMTL_INLINE void join(A* lanes, const F& f) const {
    if (!joined) return;
    A all = lanes[0];
    for (int64_t j = 1; j < kWidth; ++j) all = f(all, lanes[j]);
    std::fill_n(lanes, kWidth, all);
  }

  // Returns the sum over the distributions.
  double sum(const double* lanes) const {
    double all = lanes[0];
    for (int64_t j = 1; j < (joined ? 1 : full ? kWidth : width); ++j) all += lanes[j];
    return all;
  }
};

// Returns the sum of the entropies of the distributions |x| / (sum |x| + eps). Writes d entropy /
// d x, times `weight`, unless `grad` is null.
template <typename A>
REPMTL_INLINE double entropy_of_abs(const Block& block, const A* x, A eps, A weight, A* grad) {
  double sums[kWidth] = {}, h[kWidth] = {};
  A total[kWidth], log_total[kWidth];
  block.each([&](int64_t at, int64_t width) __attribute__((always_inline)) {
    for (int64_t j = 0; j < width; ++j) sums[j] += std::fabs(x[at + j]);
  });
  block.join(sums, [](double a, double b) { return a + b; });
  for (int64_t j = 0; j < kWidth; ++j) {
    const A sum = static_cast<A>(sums[j] + eps);
    total[j] = sum == 0 ? A(1) : sum;
    log_total[j] = log_of(total[j]);
  }
  block.each([&](int64_t at, int64_t width) __attribute__((always_inline)) {
    for (int64_t j = 0; j < width; ++j) {
      const A magnitude = std::fabs(x[at + j]), p = magnitude / total[j];
      // Computed from p unless p underflows: the logarithms of tiny saliencies nearly cancel.
      const bool normal = p >= std::numeric_limits<A>::min();
      const A other = magnitude == 0 ? total[j] : magnitude;
      const A log_p = log_of(normal ? p : other) - (normal ? A(0) : log_total[j]);
      h[j] -= p * log_p;
      if (grad) grad[at + j] = log_p;
    }
  });
  block.join(h, [](double a, double b) { return a + b; });
  if (grad) {
    block.each([&](int64_t at, int64_t width) __attribute__((always_inline)) {
      for (int64_t j = 0; j < width; ++j) {
        const A value = x[at + j];
        // d h / d |x|, where sum p = 1 - eps / total; the sign of 0 is 0, that of NaN is NaN
        const A sign = value > 0 ? A(1) : value < 0 ? A(-1) : value;
        const A slope = static_cast<A>(-h[j] - grad[at + j] - eps / total[j]);
        grad[at + j] = slope * sign / total[j] * weight;
      }
    });
  }
  return block.sum(h);
}

// The same for softmax. A probability of 0 adds nothing to entropy and gradient, though its
// logarithm may be -inf.
template <typename A>
REPMTL_INLINE double entropy_of_softmax(const Block& block, const A* x, A temperature, A weight,
                                        A* grad) {
  A largest[kWidth], log_sum[kWidth];
  double sums[kWidth] = {}, h[kWidth] = {};
  std::fill_n(largest, kWidth, -std::numeric_limits<A>::infinity());
  block.each([&](int64_t at, int64_t width) __attribute__((always_inline)) {
    for (int64_t j = 0; j < width; ++j) largest[j] = std::max(largest[j], x[at + j] / temperature);
  });
  block.join(largest, [](A a, A b) { return std::max(a, b); });
  block.each([&](int64_t at, int64_t width) __attribute__((always_inline)) {
    for (int64_t j = 0; j < width; ++j) sums[j] += exp_of(x[at + j] / temperature - largest[j]);
  });
  block.join(sums, [](double a, double b) { return a + b; });
  for (int64_t j = 0; j < kWidth; ++j) log_sum[j] = log_of(static_cast<A>(sums[j]));
  block.each([&](int64_t at, int64_t width) __attribute__((always_inline)) {
    for (int64_t j = 0; j < width; ++j) {
      const A log_p = x[at + j] / temperature - largest[j] - log_sum[j];
      const A p = exp_of(log_p);
      h[j] -= p * (p == 0 ? A(0) : log_p);
    }
  });
  block.join(h, [](double a, double b) { return a + b; });
  if (grad) {
    block.each([&](int64_t at, int64_t width) __attribute__((always_inline)) {
      for (int64_t j = 0; j < width; ++j) {
        const A log_p = x[at + j] / temperature - largest[j] - log_sum[j];
        const A p = exp_of(log_p);
        const A slope = p == 0 ? A(0) : p * static_cast<A>(-h[j] - log_p);
        grad[at + j] = slope / temperature * weight;
      }
    });
  }
  return block.sum(h);
}

#define ENTROPIES(A)                                                                           \
  REPMTL_CLONES double sum_of_abs(const Block& block, const A* x, A eps, A weight, A* grad) {  \
    return entropy_of_abs(block, x, eps, weight, grad);                                        \
  }                                                                                            \
  REPMTL_CLONES double sum_of_softmax(const Block& block, const A* x, A temperature, A weight, \
                                      A* grad) {                                               \
    return entropy_of_softmax(block, x, temperature, weight, grad);                            \
  }
ENTROPIES(float)
ENTROPIES(double)
#undef ENTROPIES

}  // namespace

template <typename A>
A entropy(int64_t tasks, int64_t batch, int64_t positions, const A* x,
          const EntropyOptions& options, A* grad, const ParallelFor& parallel_for) {
  // Over tasks, adjacent numbers belong to adjacent distributions, and a block has kWidth of them.
  // So they do over a single position.
  const bool joined = !options.over_tasks && positions > 1;
  const int64_t count = options.over_tasks ? batch * positions : tasks * batch;
  const int64_t size = options.over_tasks ? tasks : positions;
  const int64_t lanes = joined ? 1 : kWidth, blocks = ceil_div(count, lanes);
  const A eps = static_cast<A>(options.eps), temperature = static_cast<A>(options.temperature);
  const A weight = A(1) / static_cast<A>(count);
  const int64_t chunk = std::max<int64_t>(1, kChunk / (size * lanes));
  const int64_t chunks = ceil_div(blocks, chunk);
  const std::unique_ptr<double[]> sums(new double[chunks]);
  parallel_for(chunks, grain_of(4 * chunk * lanes * size), [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      double sum = 0;
      for (int64_t i = k * chunk; i < std::min(blocks, (k + 1) * chunk); ++i) {
        const int64_t at = i * (joined ? size : kWidth);
        const int64_t width = joined ? size % kWidth : std::min(kWidth, count - at);
        const Block block = joined
                                ? Block{size / kWidth, ceil_div(size, kWidth), width, kWidth, true}
                                : Block{width == kWidth ? size : 0, size, width, count, false};
        A* to = grad ? grad + at : nullptr;
        sum += options.softmax ? sum_of_softmax(block, x + at, temperature, weight, to)
                               : sum_of_abs(block, x + at, eps, weight, to);
      }
      sums[k] = sum;
    }
  });
  double total = 0;
  for (int64_t k = 0; k < chunks; ++k) total += sums[k];
  return static_cast<A>(total / static_cast<double>(count));
}

template float entropy(int64_t, int64_t, int64_t, const float*, const EntropyOptions&, float*,
                       const ParallelFor&);
template double entropy(int64_t, int64_t, int64_t, const double*, const EntropyOptions&, double*,
                        const ParallelFor&);

}  // namespace repmtl
