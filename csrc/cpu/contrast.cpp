#include "contrast.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "exponentials.h"
#include "rows.h"
#include "scale.h"
#include "vectors.h"

namespace repmtl {
namespace {

// Numbers that are added side by side.
constexpr int64_t kWidth = 16;

// Returns the largest |x|, NaN left out.
template <typename A>
REPMTL_INLINE A largest_magnitude_body(const A* x, int64_t count) {
  Vector<A> largest = {};
  int64_t c = 0;
  for (; c + kLanes <= count; c += kLanes) largest = larger(largest, magnitude(load(x + c)));
  A all = 0;
  for (int64_t j = 0; j < kLanes; ++j) all = std::max(all, largest[j]);
  for (; c < count; ++c) all = std::max(all, std::fabs(x[c]));
  return all;
}

REPMTL_CLONES float largest_magnitude(const float* x, int64_t count) {
  return largest_magnitude_body(x, count);
}

REPMTL_CLONES double largest_magnitude(const double* x, int64_t count) {
  return largest_magnitude_body(x, count);
}

}  // namespace

template <typename A>
void unit_anchors(int64_t tasks, int64_t batch, int64_t channels, const A* a, double eps, A* u,
                  A* factor, A* radial, const ParallelFor& parallel_for) {
  parallel_for(batch, grain_of(tasks * tasks * channels), [&](int64_t begin, int64_t end) {
    std::vector<A> products(tasks * tasks);
    const auto row = [&](auto* x, int64_t t, int64_t b) { return x + (t * batch + b) * channels; };
    for (int64_t b = begin; b < end; ++b) {
      A largest = 0;
      for (int64_t t = 0; t < tasks; ++t) {
        largest = std::max(largest, largest_magnitude(row(a, t, b), channels));
      }
      const A scale = power_of_two(largest);
      for (int64_t t = 0; t < tasks; ++t) {
        const A* from = row(a, t, b);
        A* to = row(u, t, b);
        for (int64_t c = 0; c < channels; ++c) to[c] = from[c] * scale;
      }
      double square = 0;
      for (int64_t t = 0; t < tasks; ++t) {
        for (int64_t v = 0; v <= t; ++v) {
          const A product = dot(row(u, t, b), row(u, v, b), channels);
          products[t * tasks + v] = products[v * tasks + t] = product;
          square += static_cast<double>(product) * product * (v < t ? 2 : 1);
        }
      }
      const Guarded<A> guarded = guarded_inverse(static_cast<A>(std::sqrt(square)), scale, eps);
      const A root = std::sqrt(guarded.inverse);
      factor[b] = scale * root;
      for (int64_t t = 0; t < tasks; ++t) {
        A* to = row(u, t, b);
        for (int64_t c = 0; c < channels; ++c) to[c] *= root;
      }
      if (!radial) continue;
      const A share = guarded.clamped ? 0 : guarded.inverse;
      for (int64_t t = 0; t < tasks; ++t) {
        A* to = row(radial, t, b);
        std::fill_n(to, channels, A(0));
        for (int64_t v = 0; v < tasks; ++v) {
          add_row(row(u, v, b), products[t * tasks + v] * share, channels, to);
        }
      }
    }
  });
}

namespace {

// Numbers of a row of products that are added up at a time: with their sums they fit the first
// cache.
constexpr int64_t kColumns = 512;

// The products of one sample's anchors with those of `count` <= kColumns samples, in dots (T, M, T,
// B): a row of them for each pair of tasks.
template <typename A>
struct Products {
  A* first;
  int64_t tasks, task_stride, row_stride, count;

  REPMTL_INLINE A* row(int64_t t, int64_t v) const {
    return first + t * task_stride + v * row_stride;
  }
};

// Writes the similarities r (count). Adds in double: float would lose digits in a sum of T^2 terms.
template <typename A>
REPMTL_INLINE void similarities_body(const Products<const A>& x, A* r) {
  double sums[kColumns] = {};
  for (int64_t t = 0; t < x.tasks; ++t) {
    for (int64_t v = 0; v < x.tasks; ++v) {
      const A* row = x.row(t, v);
      for (int64_t k = 0; k < x.count; ++k) sums[k] += static_cast<double>(row[k]) * row[k];
    }
  }
  for (int64_t k = 0; k < x.count; ++k) r[k] = static_cast<A>(sums[k]);
}

// Returns the largest of the numbers and `largest`.
template <typename A>
REPMTL_INLINE A largest_body(const A* r, int64_t count, A largest) {
  A lanes[kWidth];
  std::fill_n(lanes, kWidth, largest);
  int64_t k = 0;
  for (; k + kWidth <= count; k += kWidth) {
    for (int64_t j = 0; j < kWidth; ++j) lanes[j] = std::max(lanes[j], r[k + j]);
  }
  for (int64_t j = 0; k + j < count; ++j) lanes[j] = std::max(lanes[j], r[k + j]);
  return *std::max_element(lanes, lanes + kWidth);
}

// Returns the sum of exp((r - largest) / temperature).
template <typename A>
REPMTL_INLINE double sum_exp_body(const A* r, int64_t count, A largest, A temperature) {
  double lanes[kWidth] = {};
  int64_t k = 0;
  for (; k + kWidth <= count; k += kWidth) {
    for (int64_t j = 0; j < kWidth; ++j) lanes[j] += exp_of((r[k + j] - largest) / temperature);
  }
  for (int64_t j = 0; k + j < count; ++j) lanes[j] += exp_of((r[k + j] - largest) / temperature);
  double sum = 0;
  for (int64_t j = 0; j < kWidth; ++j) sum += lanes[j];
  return sum;
}

// Adds `count` <= kColumns columns of r (samples, stride) to the peaks so far: largest and sums.
template <typename A>
REPMTL_INLINE void add_column_peaks_body(const A* r, int64_t samples, int64_t stride, int64_t count,
                                         A temperature, A* largest, A* sums) {
  A top[kColumns];
  double sum[kColumns];
  std::copy_n(largest, count, top);
  for (int64_t m = 0; m < samples; ++m) {
    const A* row = r + m * stride;
    for (int64_t k = 0; k < count; ++k) top[k] = std::max(top[k], row[k]);
  }
  for (int64_t k = 0; k < count; ++k) {
    sum[k] = sums[k] * exp_of((largest[k] - top[k]) / temperature);
  }
  for (int64_t m = 0; m < samples; ++m) {
    const A* row = r + m * stride;
    for (int64_t k = 0; k < count; ++k) sum[k] += exp_of((row[k] - top[k]) / temperature);
  }
  std::copy_n(top, count, largest);
  for (int64_t k = 0; k < count; ++k) sums[k] = static_cast<A>(sum[k]);
}

// The peaks of a sample's similarities, and those of the columns.
template <typename A>
struct Peaks {
  A largest, sum;
  const A *column_largest, *column_sums;
};

// Multiplies products with factor * (their similarity's share of its row + that of its column).
template <typename A>
REPMTL_INLINE void weigh_body(const Products<A>& x, const A* r, const Peaks<A>& peaks,
                              A temperature, A factor) {
  A weights[kColumns];
  for (int64_t k = 0; k < x.count; ++k) {
    const A of_row = exp_of((r[k] - peaks.largest) / temperature) / peaks.sum;
    const A of_column =
        exp_of((r[k] - peaks.column_largest[k]) / temperature) / peaks.column_sums[k];
    weights[k] = factor * (of_row + of_column);
  }
  for (int64_t t = 0; t < x.tasks; ++t) {
    for (int64_t v = 0; v < x.tasks; ++v) {
      A* row = x.row(t, v);
      for (int64_t k = 0; k < x.count; ++k) row[k] *= weights[k];
    }
  }
}

#define CONTRAST(A)                                                                                \
  REPMTL_CLONES void similarities(const Products<const A>& x, A* r) { similarities_body(x, r); }   \
  REPMTL_CLONES A largest_of(const A* r, int64_t count, A largest) {                               \
    return largest_body(r, count, largest);                                                        \
  }                                                                                                \
  REPMTL_CLONES double sum_exp(const A* r, int64_t count, A largest, A temperature) {              \
    return sum_exp_body(r, count, largest, temperature);                                           \
  }                                                                                                \
  REPMTL_CLONES void add_column_peaks(const A* r, int64_t samples, int64_t stride, int64_t count,  \
                                      A temperature, A* largest, A* sums) {                        \
    add_column_peaks_body(r, samples, stride, count, temperature, largest, sums);                  \
  }                                                                                                \
  REPMTL_CLONES void weigh(const Products<A>& x, const A* r, const Peaks<A>& peaks, A temperature, \
                           A factor) {                                                             \
    weigh_body(x, r, peaks, temperature, factor);                                                  \
  }
CONTRAST(float)
CONTRAST(double)
#undef CONTRAST

// Calls f(begin, products) for the products of sample m of a block, kColumns samples at a time.
template <typename A, typename F>
void for_products(int64_t tasks, int64_t batch, int64_t samples, int64_t m, A* dots, const F& f) {
  for (int64_t begin = 0; begin < batch; begin += kColumns) {
    f(begin, Products<A>{dots + m * tasks * batch + begin, tasks, samples * tasks * batch, batch,
                         std::min(kColumns, batch - begin)});
  }
}

// Puts -inf in the place of sample `own`, if it is among those from `begin` on.
template <typename A>
void leave_out(int64_t own, int64_t begin, int64_t count, A* r) {
  if (own >= begin && own < begin + count) r[own - begin] = -std::numeric_limits<A>::infinity();
}

}  // namespace

template <typename A>
void log_sum_exp(int64_t tasks, int64_t batch, int64_t first, int64_t samples, const A* dots,
                 double temperature, A* logsumexp, A* rows, A* columns,
                 const ParallelFor& parallel_for) {
  const A tau = static_cast<A>(temperature);
  std::vector<A> similarity(columns ? samples * batch : 0);  // (M, B)
  parallel_for(samples, grain_of(tasks * tasks * batch), [&](int64_t begin, int64_t end) {
    std::vector<A> row(columns ? 0 : batch);
    for (int64_t m = begin; m < end; ++m) {
      A* r = columns ? &similarity[m * batch] : row.data();
      for_products(tasks, batch, samples, m, dots,
                   [&](int64_t k, const Products<const A>& x) { similarities(x, r + k); });
      leave_out(first + m, 0, batch, r);
      const A largest = largest_of(r, batch, A(0));
      const double sum = sum_exp(r, batch, largest, tau);
      rows[m] = largest;
      rows[samples + m] = static_cast<A>(sum);
      logsumexp[m] = static_cast<A>(largest / temperature + std::log(sum));
    }
  });
  if (!columns) return;
  constexpr int64_t unit = 64;
  static_assert(unit <= kColumns);
  parallel_for(ceil_div(batch, unit), grain_of(samples * unit), [&](int64_t begin, int64_t end) {
    for (int64_t k = begin * unit; k < std::min(batch, end * unit); k += unit) {
      add_column_peaks(&similarity[k], samples, batch, std::min(unit, batch - k), tau, columns + k,
                       columns + batch + k);
    }
  });
}

template <typename A>
void weigh_dots(int64_t tasks, int64_t batch, int64_t first, int64_t samples, A* dots,
                const A* rows, const A* columns, double temperature,
                const ParallelFor& parallel_for) {
  const A tau = static_cast<A>(temperature);
  const A factor = static_cast<A>(2 / (temperature * static_cast<double>(batch)));
  parallel_for(samples, grain_of(tasks * tasks * batch), [&](int64_t begin, int64_t end) {
    A r[kColumns];
    for (int64_t m = begin; m < end; ++m) {
      for_products(tasks, batch, samples, m, dots, [&](int64_t k, const Products<A>& x) {
        similarities({x.first, x.tasks, x.task_stride, x.row_stride, x.count}, r);
        leave_out(first + m, k, x.count, r);
        weigh(x, r, Peaks<A>{rows[m], rows[samples + m], columns + k, columns + batch + k}, tau,
              factor);
      });
    }
  });
}

template <typename A>
void through_normalisation(int64_t tasks, int64_t batch, int64_t channels, const A* u,
                           const A* factor, const A* radial, A* du,
                           const ParallelFor& parallel_for) {
  parallel_for(batch, grain_of(tasks * channels), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      double radial_weight = 0;
      for (int64_t t = 0; t < tasks; ++t) {
        const int64_t row = (t * batch + b) * channels;
        radial_weight += dot(du + row, u + row, channels);
      }
      for (int64_t t = 0; t < tasks; ++t) {
        const int64_t row = (t * batch + b) * channels;
        for (int64_t c = row; c < row + channels; ++c) {
          du[c] = factor[b] * (du[c] - static_cast<A>(radial_weight) * radial[c]);
        }
      }
    }
  });
}

#define INSTANTIATE(A)                                                                             \
  template void unit_anchors(int64_t, int64_t, int64_t, const A*, double, A*, A*, A*,              \
                             const ParallelFor&);                                                  \
  template void log_sum_exp(int64_t, int64_t, int64_t, int64_t, const A*, double, A*, A*, A*,      \
                            const ParallelFor&);                                                   \
  template void weigh_dots(int64_t, int64_t, int64_t, int64_t, A*, const A*, const A*, double,     \
                           const ParallelFor&);                                                    \
  template void through_normalisation(int64_t, int64_t, int64_t, const A*, const A*, const A*, A*, \
                                      const ParallelFor&);
INSTANTIATE(float)
INSTANTIATE(double)
#undef INSTANTIATE

}  // namespace repmtl
