#include "small_products.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

namespace repmtl {
namespace {

constexpr int64_t kWidth = 16;  // elements of a vector; the machine's may be shorter
constexpr int64_t kRows = 4;    // rows of a tile of accumulators
// Channels that are multiplied at a time: the sums of a panel are rounded on their own, and the
// panel stays in the cache.
constexpr int64_t kPanel = 256;

typedef float Vector __attribute__((vector_size(kWidth * sizeof(float))));

REPMTL_INLINE Vector load(const float* from) {
  Vector x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

REPMTL_INLINE void store(const Vector& x, float* to) { std::memcpy(to, &x, sizeof x); }

// out (kRows, kVectors * kWidth) += sum_k a[r * row + k * step] b[k * kSmall + ...]
template <int kVectors>
REPMTL_INLINE void multiply_tile(const float* a, int64_t row, int64_t step, const float* b,
                                 int64_t count, float* out, int64_t out_row) {
  Vector sums[kRows][kVectors] = {};
  for (int64_t k = 0; k < count; ++k) {
    Vector right[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) right[v] = load(b + k * kSmall + v * kWidth);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const float left = a[r * row + k * step];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[r][v] += left * right[v];
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      float* to = out + r * out_row + v * kWidth;
      store(load(to) + sums[r][v], to);
    }
  }
}

// The same for columns [first, last), multiples of kWidth. Two vectors at a time, since machines
// have few registers.
REPMTL_INLINE void multiply_rows(const float* a, int64_t row, int64_t step, const float* b,
                                 int64_t count, float* out, int64_t out_row, int64_t first,
                                 int64_t last) {
  int64_t j = first;
  for (; j + 2 * kWidth <= last; j += 2 * kWidth) {
    multiply_tile<2>(a, row, step, b + j, count, out + j, out_row);
  }
  if (j < last) multiply_tile<1>(a, row, step, b + j, count, out + j, out_row);
}

// Adds a panel's products to gram (kSmall, kSmall), at least right of the diagonal, and to
// projection (rows, kSmall), where rows is a multiple of kRows. panel (count, kSmall), anchors
// (count, rows).
REPMTL_CLONES void multiply_panel(const float* panel, int64_t count, int64_t columns,
                                  const float* anchors, int64_t rows, float* gram,
                                  float* projection) {
  const int64_t last = ceil_div(columns, kWidth) * kWidth;
  for (int64_t i = 0; i < columns; i += kRows) {
    multiply_rows(panel + i, 1, kSmall, panel, count, gram + i * kSmall, kSmall,
                  i / kWidth * kWidth, last);
  }
  for (int64_t i = 0; i < rows; i += kRows) {
    multiply_rows(anchors + i, 1, rows, panel, count, projection + i * kSmall, kSmall, 0, last);
  }
}

// out (kRows, columns rounded up to kWidth) += a (kRows, count) b (count, kSmall)
REPMTL_CLONES void multiply_few_rows(const float* a, int64_t row, int64_t count, const float* b,
                                     int64_t columns, float* out, int64_t out_row) {
  const int64_t last = ceil_div(columns, kWidth) * kWidth;
  multiply_rows(a, row, 1, b, count, out, out_row, 0, last);
}

// Writes zeros where the mask is zero, even over NaN.
void keep(const unsigned char* mask, int64_t columns, float* row) {
  for (int64_t n = 0; n < columns; ++n) row[n] = mask[n] ? row[n] : 0.0f;
}

// Reads rows of one task and sample.
struct Reader {
  const View<const float>& view;
  int64_t columns;
  const unsigned char* mask;  // (B, columns) or null

  // Copies channel c of sample b, times factor.
  void copy(int64_t b, int64_t c, float factor, float* to) const {
    if (view.positions_are_adjacent()) {
      const float* from = view.at(b, c, 0);
      for (int64_t n = 0; n < columns; ++n) to[n] = from[n] * factor;
    } else {
      for (int64_t n = 0; n < columns; ++n) to[n] = *view.at(b, c, n) * factor;
    }
    if (mask) keep(mask + b * columns, columns, to);
  }
};

}  // namespace

bool small_products_are_fast() {
#ifdef REPMTL_HAS_CLONES
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return false;
#endif
}

void small_gram(const Shape& shape, const View<const float>* views, const float* scale,
                const float* anchors, const unsigned char* mask, float* norm, float* positive,
                float* projection, float* matrix, const ParallelFor& parallel_for) {
  const int64_t tasks = shape.tasks, batch = shape.batch, C = shape.channels, N = shape.positions;
  const int64_t rows = ceil_div(tasks, kRows) * kRows;
  parallel_for(tasks * batch, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> panel(kPanel * kSmall), u(kPanel * rows), products(kSmall * kSmall),
        projected(rows * kSmall);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t t = i / batch, b = i % batch;
      const Reader reader{views[t], N, mask};
      std::fill(products.begin(), products.end(), 0.0f);
      std::fill(projected.begin(), projected.end(), 0.0f);
      for (int64_t first = 0; first < C; first += kPanel) {
        const int64_t count = std::min(kPanel, C - first);
        for (int64_t c = 0; c < count; ++c) {
          reader.copy(b, first + c, scale[i], &panel[c * kSmall]);
          for (int64_t k = 0; k < tasks; ++k) {
            u[c * rows + k] = anchors[(k * batch + b) * C + first + c];
          }
        }
        multiply_panel(panel.data(), count, N, u.data(), rows, products.data(), projected.data());
      }
      double square = 0, sum = 0;
      for (int64_t m = 0; m < N; ++m) {
        const float* row = &products[m * kSmall];
        square += static_cast<double>(row[m]) * row[m];
        for (int64_t n = m + 1; n < N; ++n) square += 2 * static_cast<double>(row[n]) * row[n];
      }
      for (int64_t k = 0; k < tasks; ++k) {
        const float* row = &projected[k * kSmall];
        for (int64_t n = 0; n < N; ++n) sum += static_cast<double>(row[n]) * row[n];
        if (projection) std::copy_n(row, N, projection + (i * tasks + k) * N);
      }
      norm[i] = static_cast<float>(std::sqrt(square));
      positive[i] = static_cast<float>(sum);
      if (!matrix) continue;
      for (int64_t m = 0; m < N; ++m) {
        float* to = matrix + (i * N + m) * N;
        for (int64_t n = 0; n < m; ++n) to[n] = products[n * kSmall + m];
        std::copy_n(&products[m * kSmall + m], N - m, to + m);
      }
    }
  });
}

namespace {

// Copies the rows of channels c to c + kRows of sample b, times factor, to places `row` apart.
// Returns how many of these channels exist.
int64_t copy_rows(const Reader& reader, int64_t channels, int64_t b, int64_t c, float factor,
                  float* to, int64_t row) {
  const int64_t copied = std::min(kRows, channels - c);
  for (int64_t r = 0; r < copied; ++r) reader.copy(b, c + r, factor, to + r * row);
  return copied;
}

}  // namespace

void small_gradient(const Shape& shape, const View<const float>* views, const SmallGradient& g,
                    const std::vector<int64_t>& wanted, const View<float>* outputs,
                    const ParallelFor& parallel_for) {
  const int64_t tasks = shape.tasks, batch = shape.batch, C = shape.channels, N = shape.positions;
  const int64_t columns = ceil_div(tasks, kWidth) * kWidth;
  // The outer products are further columns of S and further rows of the matrix.
  const int64_t count = N + tasks;
  // The tasks of a sample follow each other, so that their saliencies are still in the second cache
  // when they are read again.
  parallel_for(batch, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> factors(count * kSmall), rows(kRows * count), sums(kRows * kSmall);
    std::vector<float> positive(ceil_div(C, kRows) * kRows * columns);
    for (int64_t b = begin; b < end; ++b) {
      const unsigned char* mask = g.mask ? g.mask + b * N : nullptr;
      const int64_t absent = mask ? std::count(mask, mask + N, 0) : 0;
      const float present = static_cast<float>(std::max<int64_t>(1, N - absent));
      // positive (C, T) = sum_t anchor_weight_t S^_t S^_t^T u
      std::fill(positive.begin(), positive.end(), 0.0f);
      for (int64_t t = 0; t < tasks; ++t) {
        const int64_t sample = t * batch + b;
        std::fill_n(factors.begin(), N * kSmall, 0.0f);
        for (int64_t v = 0; v < tasks; ++v) {
          const float* from = g.projection + (sample * tasks + v) * N;
          for (int64_t n = 0; n < N; ++n)
            factors[n * kSmall + v] = g.anchor_weight[sample] * from[n];
        }
        const Reader reader{views[t], N, g.mask};
        for (int64_t c = 0; c < C; c += kRows) {
          copy_rows(reader, C, b, c, g.scale[sample], rows.data(), N);
          multiply_few_rows(rows.data(), N, N, factors.data(), tasks, &positive[c * columns],
                            columns);
        }
      }
      for (size_t i = 0; i < wanted.size(); ++i) {
        const int64_t t = wanted[i], sample = t * batch + b;
        const float affinity_weight = g.affinity_weight[sample] * g.scale[sample];
        const float anchor_weight = g.anchor_weight[sample] * g.scale[sample];
        for (int64_t k = 0; k < count; ++k) {
          const float* from =
              k < N ? g.matrix + (sample * N + k) * N : g.projection + (sample * tasks + k - N) * N;
          const float factor = k < N ? affinity_weight : anchor_weight;
          for (int64_t n = 0; n < N; ++n) factors[k * kSmall + n] = factor * from[n];
        }
        const Reader reader{views[t], N, g.mask};
        for (int64_t c = 0; c < C; c += kRows) {
          const int64_t copied = copy_rows(reader, C, b, c, g.scale[sample], rows.data(), count);
          for (int64_t r = 0; r < copied; ++r) {
            for (int64_t v = 0; v < tasks; ++v) {
              rows[r * count + N + v] = g.anchors[(v * batch + b) * C + c + r];
            }
            const int64_t place = sample * C + c + r;
            const float through = g.factor[b] * (positive[(c + r) * columns + t] -
                                                 g.radial_weight[b] * g.radial[place]);
            const float da = (*g.negatives * g.contrast_grad[place] + through) / present;
            float* sum = &sums[r * kSmall];
            for (int64_t n = 0; n < N; ++n) {
              sum[n] = da + (g.position_grad ? g.position_grad[sample * N + n] : 0);
            }
          }
          multiply_few_rows(rows.data(), count, count, factors.data(), N, sums.data(), kSmall);
          const View<float>& output = outputs[i];
          for (int64_t r = 0; r < copied; ++r) {
            float* sum = &sums[r * kSmall];
            if (mask) keep(mask, N, sum);
            if (output.positions_are_adjacent()) {
              std::copy_n(sum, N, output.at(b, c + r, 0));
            } else {
              for (int64_t n = 0; n < N; ++n) *output.at(b, c + r, n) = sum[n];
            }
          }
        }
      }
    }
  });
}

}  // namespace repmtl
