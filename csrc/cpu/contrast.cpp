#include "contrast.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "scale.h"

namespace repmtl {
namespace {

constexpr int64_t kLanes = 16;

template <typename A>
inline __attribute__((always_inline)) A dot_body(const A* x, const A* y, int64_t count) {
  A sums[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int64_t j = 0; j < kLanes; ++j) sums[j] += x[i + j] * y[i + j];
  }
  for (int64_t j = 0; i < count; ++i, ++j) sums[j] += x[i] * y[i];
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t j = 0; j < half; ++j) sums[j] += sums[j + half];
  }
  return sums[0];
}

REPMTL_CLONES float dot(const float* x, const float* y, int64_t count) {
  return dot_body(x, y, count);
}

REPMTL_CLONES double dot(const double* x, const double* y, int64_t count) {
  return dot_body(x, y, count);
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
        const A* from = row(a, t, b);
        for (int64_t c = 0; c < channels; ++c) largest = std::max(largest, std::fabs(from[c]));
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
          const A* from = row(u, v, b);
          const A weight = products[t * tasks + v] * share;
          for (int64_t c = 0; c < channels; ++c) to[c] += weight * from[c];
        }
      }
    }
  });
}

namespace {

// Adds in double: float would lose digits in a sum of T^2 terms.
template <typename A>
inline __attribute__((always_inline)) void add_squares_body(const A* x, int64_t count,
                                                            double* sums) {
  for (int64_t k = 0; k < count; ++k) sums[k] += static_cast<double>(x[k]) * x[k];
}

REPMTL_CLONES void add_squares(const float* x, int64_t count, double* sums) {
  add_squares_body(x, count, sums);
}

REPMTL_CLONES void add_squares(const double* x, int64_t count, double* sums) {
  add_squares_body(x, count, sums);
}

// Writes r (B), the similarities sum_tv dots^2 of sample m of a block; -inf for the sample itself.
// dots (T, M, T, B); sums (B) is scratch.
template <typename A>
void similarities(int64_t tasks, int64_t batch, int64_t first, int64_t samples, int64_t m,
                  const A* dots, double* sums, A* r) {
  std::fill_n(sums, batch, 0.0);
  for (int64_t t = 0; t < tasks; ++t) {
    for (int64_t v = 0; v < tasks; ++v) {
      add_squares(dots + ((t * samples + m) * tasks + v) * batch, batch, sums);
    }
  }
  for (int64_t k = 0; k < batch; ++k) r[k] = static_cast<A>(sums[k]);
  r[first + m] = -std::numeric_limits<A>::infinity();
}

// The columns of one unit of work.
constexpr int64_t kColumns = 64;

// Adds columns [begin, begin + count) of r (M, B), count <= kColumns, to the peaks so far: largest
// and sums (B).
template <typename A>
void add_column_peaks(int64_t batch, int64_t samples, const A* r, A temperature, int64_t begin,
                      int64_t count, A* largest, A* sums) {
  A top[kColumns];
  double sum[kColumns];
  std::copy_n(largest + begin, count, top);
  for (int64_t m = 0; m < samples; ++m) {
    const A* row = r + m * batch + begin;
    for (int64_t k = 0; k < count; ++k) top[k] = std::max(top[k], row[k]);
  }
  for (int64_t k = 0; k < count; ++k) {
    sum[k] = sums[begin + k] * std::exp((largest[begin + k] - top[k]) / temperature);
  }
  for (int64_t m = 0; m < samples; ++m) {
    const A* row = r + m * batch + begin;
    for (int64_t k = 0; k < count; ++k) sum[k] += std::exp((row[k] - top[k]) / temperature);
  }
  std::copy_n(top, count, largest + begin);
  for (int64_t k = 0; k < count; ++k) sums[begin + k] = static_cast<A>(sum[k]);
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
    std::vector<double> squares(batch);
    for (int64_t m = begin; m < end; ++m) {
      A* r = columns ? &similarity[m * batch] : row.data();
      similarities(tasks, batch, first, samples, m, dots, squares.data(), r);
      A largest = 0;
      for (int64_t k = 0; k < batch; ++k) largest = std::max(largest, r[k]);
      double sum = 0;
      for (int64_t k = 0; k < batch; ++k) sum += std::exp((r[k] - largest) / tau);
      rows[m] = largest;
      rows[samples + m] = static_cast<A>(sum);
      logsumexp[m] = static_cast<A>(largest / temperature + std::log(sum));
    }
  });
  if (!columns) return;
  parallel_for(
      ceil_div(batch, kColumns), grain_of(samples * kColumns), [&](int64_t begin, int64_t end) {
        for (int64_t k = begin * kColumns; k < std::min(batch, end * kColumns); k += kColumns) {
          add_column_peaks(batch, samples, similarity.data(), tau, k, std::min(kColumns, batch - k),
                           columns, columns + batch);
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
    std::vector<A> r(batch);
    std::vector<double> squares(batch);
    for (int64_t m = begin; m < end; ++m) {
      similarities(tasks, batch, first, samples, m, dots, squares.data(), r.data());
      for (int64_t k = 0; k < batch; ++k) {
        const A row_weight = std::exp((r[k] - rows[m]) / tau) / rows[samples + m];
        const A column_weight = std::exp((r[k] - columns[k]) / tau) / columns[batch + k];
        r[k] = factor * (row_weight + column_weight);
      }
      for (int64_t t = 0; t < tasks; ++t) {
        for (int64_t v = 0; v < tasks; ++v) {
          A* d = dots + ((t * samples + m) * tasks + v) * batch;
          for (int64_t k = 0; k < batch; ++k) d[k] *= r[k];
        }
      }
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
