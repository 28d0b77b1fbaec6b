#include "entropy.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>

namespace repmtl {
namespace {

// Distributions of one unit of work. The mean adds the units' sums in order, so that it does not
// depend on the number of threads.
constexpr int64_t kChunk = 256;

// Returns the entropy of the distribution |x| / (sum |x| + eps) of `count` values with a stride.
// Writes d entropy / d x, times `weight`, unless `grad` is null.
template <typename A>
double entropy_of_abs(const A* x, int64_t count, int64_t stride, A eps, A weight, A* grad) {
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += std::fabs(x[i * stride]);
  A total = static_cast<A>(sum + eps);
  if (total == 0) total = 1;
  const A log_total = std::log(total);
  // Computed from p unless p underflows: the logarithms of tiny saliencies nearly cancel.
  const auto log_of = [&](A magnitude, A p) {
    if (p >= std::numeric_limits<A>::min()) return std::log(p);
    return (magnitude == 0 ? log_total : std::log(magnitude)) - log_total;
  };
  double h = 0;
  for (int64_t i = 0; i < count; ++i) {
    const A magnitude = std::fabs(x[i * stride]), p = magnitude / total;
    const A log_p = log_of(magnitude, p);
    h -= p * log_p;
    if (grad) grad[i * stride] = log_p;
  }
  if (grad) {
    for (int64_t i = 0; i < count; ++i) {
      const A value = x[i * stride];
      // d h / d |x|, where sum p = 1 - eps / total; the sign of 0 is 0, that of NaN is NaN
      const A sign = value > 0 ? A(1) : value < 0 ? A(-1) : value;
      const A slope = static_cast<A>(-h - grad[i * stride] - eps / total);
      grad[i * stride] = slope * sign / total * weight;
    }
  }
  return h;
}

// The same for softmax. A probability of 0 adds nothing to entropy and gradient, though its
// logarithm may be -inf.
template <typename A>
double entropy_of_softmax(const A* x, int64_t count, int64_t stride, A temperature, A weight,
                          A* grad) {
  A largest = x[0] / temperature;
  double sum = 0;
  for (int64_t i = 1; i < count; ++i) largest = std::max(largest, x[i * stride] / temperature);
  for (int64_t i = 0; i < count; ++i) sum += std::exp(x[i * stride] / temperature - largest);
  const A log_sum = static_cast<A>(std::log(sum));
  double h = 0;
  for (int64_t i = 0; i < count; ++i) {
    const A log_p = x[i * stride] / temperature - largest - log_sum;
    const A p = std::exp(log_p);
    h -= p == 0 ? A(0) : p * log_p;
  }
  if (grad) {
    for (int64_t i = 0; i < count; ++i) {
      const A log_p = x[i * stride] / temperature - largest - log_sum;
      const A p = std::exp(log_p);
      const A slope = p == 0 ? A(0) : p * static_cast<A>(-h - log_p);
      grad[i * stride] = slope / temperature * weight;
    }
  }
  return h;
}

}  // namespace

template <typename A>
A entropy(int64_t tasks, int64_t batch, int64_t positions, const A* x,
          const EntropyOptions& options, A* grad, const ParallelFor& parallel_for) {
  const int64_t count = options.over_tasks ? batch * positions : tasks * batch;
  const int64_t size = options.over_tasks ? tasks : positions;
  const int64_t stride = options.over_tasks ? batch * positions : 1;
  const int64_t step = options.over_tasks ? 1 : positions;  // from one distribution to the next
  const A eps = static_cast<A>(options.eps), temperature = static_cast<A>(options.temperature);
  const A weight = A(1) / static_cast<A>(count);
  const int64_t chunk = std::max<int64_t>(1, kChunk / size), chunks = ceil_div(count, chunk);
  const std::unique_ptr<double[]> sums(new double[chunks]);
  parallel_for(chunks, grain_of(16 * kChunk), [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      double sum = 0;
      for (int64_t i = k * chunk; i < std::min(count, (k + 1) * chunk); ++i) {
        const A* from = x + i * step;
        A* to = grad ? grad + i * step : nullptr;
        sum += options.softmax ? entropy_of_softmax(from, size, stride, temperature, weight, to)
                               : entropy_of_abs(from, size, stride, eps, weight, to);
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
