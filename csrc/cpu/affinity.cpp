#include "affinity.h"

#include <algorithm>
#include <cstdint>
#include <memory>
#include <type_traits>
#include <vector>

#include "rows.h"
#include "vectors.h"

namespace repmtl {
namespace {

// Elements of a task that are multiplied at a time. With those of a few other tasks they fit the
// first cache.
constexpr int64_t kTile = 1024;
// Tiles of one unit of work. Units do not depend on the number of threads, so sums don't either.
constexpr int64_t kTiles = 32;
// Bytes of a column of a tile where neighbours of a row are far apart in memory: those of a column
// may share a line of the cache.
constexpr int64_t kLine = 64;
// Tasks whose products with as many others are summed in registers.
constexpr int64_t kTasks = 4;

// The products of kI tasks with kJ tasks, or of kI tasks with each other: those with u >= t. In
// double, products of float have no rounding error, and all of them are in its range.
template <int kI, int kJ, bool kSame>
struct Block {
  Vector<double> sums[kI][kJ] = {};

  template <typename A>
  REPMTL_INLINE void add(const A* const* left, const A* const* right, int64_t i) {
    Vector<double> x[kI], y[kJ];
#pragma GCC unroll 4
    for (int t = 0; t < kI; ++t) x[t] = widened(load(left[t] + i));
#pragma GCC unroll 4
    for (int u = 0; u < kJ; ++u) y[u] = kSame ? x[u] : widened(load(right[u] + i));
#pragma GCC unroll 4
    for (int t = 0; t < kI; ++t) {
#pragma GCC unroll 4
      for (int u = kSame ? t : 0; u < kJ; ++u) sums[t][u] += x[t] * y[u];
    }
  }
};

// Adds the products of `count` elements to `sums`, whose rows are `row` apart.
template <int kI, int kJ, bool kSame, typename A>
REPMTL_INLINE void add_block(const A* const* left_tasks, const A* const* right_tasks, int64_t count,
                             double* sums, int64_t row) {
  const A *left[kI], *right[kJ];
  std::copy_n(left_tasks, kI, left);
  std::copy_n(right_tasks, kJ, right);
  Block<kI, kJ, kSame> block;
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) block.add(left, right, i);
  if (i < count) {  // the rest, and zeros
    A left_rest[kI][kLanes] = {}, right_rest[kJ][kLanes] = {};
    for (int t = 0; t < kI; ++t) {
      std::copy_n(left[t] + i, count - i, left_rest[t]);
      left[t] = left_rest[t];
    }
    for (int u = 0; u < kJ; ++u) {
      std::copy_n(right[u] + i, count - i, right_rest[u]);
      right[u] = right_rest[u];
    }
    block.add(left, right, 0);
  }
  for (int t = 0; t < kI; ++t) {
    for (int u = kSame ? t : 0; u < kJ; ++u) {
      sums[t * row + u] += sum_of(block.sums[t][u]);
    }
  }
}

// Adds the products of `count` elements of each task to sums (T, T), right of the diagonal and on
// it.
template <typename A>
REPMTL_INLINE void add_body(const A* const* x, int64_t tasks, int64_t count, double* sums) {
  for (int64_t t = 0; t < tasks; t += kTasks) {
    const A* const* left = x + t;
    double* to = sums + t * tasks + t;
    switch (std::min(kTasks, tasks - t)) {
      case 1: add_block<1, 1, true>(left, left, count, to, tasks); break;
      case 2: add_block<2, 2, true>(left, left, count, to, tasks); break;
      case 3: add_block<3, 3, true>(left, left, count, to, tasks); break;
      default: add_block<4, 4, true>(left, left, count, to, tasks);
    }
    for (int64_t u = t + kTasks; u < tasks; u += kTasks) {
      const A* const* right = x + u;
      to = sums + t * tasks + u;
      switch (std::min(kTasks, tasks - u)) {
        case 1: add_block<4, 1, false>(left, right, count, to, tasks); break;
        case 2: add_block<4, 2, false>(left, right, count, to, tasks); break;
        case 3: add_block<4, 3, false>(left, right, count, to, tasks); break;
        default: add_block<4, 4, false>(left, right, count, to, tasks);
      }
    }
  }
}

REPMTL_CLONES void add_products(const float* const* x, int64_t tasks, int64_t count, double* sums) {
  add_body(x, tasks, count, sums);
}

REPMTL_CLONES void add_products(const double* const* x, int64_t tasks, int64_t count,
                                double* sums) {
  add_body(x, tasks, count, sums);
}

// How the tasks of a sample are cut up: all of them in the same order of elements.
struct Plan {
  bool by_channel;
  int64_t count, length;         // rows of a sample, elements of a row
  int64_t rows, columns;         // of a tile
  int64_t beside, tiles, units;  // tiles side by side, all tiles and units of a sample
};

template <typename S>
Plan plan_of(const Shape& shape, const View<const S>* views, bool masked) {
  const int64_t C = shape.channels, N = shape.positions;
  Plan plan{};
  plan.by_channel = channels_are_rows(views[0], N);
  plan.count = plan.by_channel ? C : N;
  plan.length = plan.by_channel ? N : C;
  bool scattered = false, dense = !masked;
  for (int64_t t = 0; t < shape.tasks; ++t) {
    const Rows<S> rows = rows_of(views[t], 0, plan.by_channel, nullptr);
    scattered |= rows.offsets != nullptr || rows.stride != 1;
    dense &= rows.complete() && rows.row_stride == plan.length;
  }
  if (dense) {  // a sample is one row
    plan.length *= plan.count;
    plan.count = 1;
  }
  const int64_t most = scattered ? kTile * static_cast<int64_t>(sizeof(S)) / kLine : kTile;
  plan.columns = std::min(plan.length, most);
  plan.rows = std::min(plan.count, kTile / plan.columns);
  plan.beside = ceil_div(plan.length, plan.columns);
  plan.tiles = plan.beside * ceil_div(plan.count, plan.rows);
  plan.units = ceil_div(plan.tiles, kTiles);
  return plan;
}

// Asks for elements that are read soon: a processor sees no stream where tasks take turns.
template <typename S>
void fetch_ahead(const Rows<S>& matrix, int64_t row, int64_t begin, int64_t count) {
  if (matrix.stride != 1 || matrix.row_offsets) return;
  const auto from = reinterpret_cast<std::uintptr_t>(matrix.data) +
                    static_cast<std::uintptr_t>(row * matrix.row_stride + begin) * sizeof(S);
  for (std::uintptr_t i = 0; i < static_cast<std::uintptr_t>(count) * sizeof(S); i += kLine) {
    __builtin_prefetch(reinterpret_cast<const void*>(from + i));
  }
}

// Adds the products of tile `tile` of a sample to sums (T, T). `buffer` holds a tile of each task.
template <typename S>
void add_tile(const Plan& plan, const std::vector<Rows<S>>& matrices, int64_t tile,
              acc_t<S>* buffer, std::vector<const acc_t<S>*>& x, double* sums) {
  using A = acc_t<S>;
  const int64_t first = tile / plan.beside * plan.rows, begin = tile % plan.beside * plan.columns;
  const int64_t rows = std::min(plan.rows, plan.count - first);
  const int64_t columns = std::min(plan.columns, plan.length - begin);
  for (size_t t = 0; t < matrices.size(); ++t) {
    const Rows<S>& matrix = matrices[t];
    if constexpr (std::is_same_v<S, A>) {
      if (matrix.direct() && rows == 1) {
        x[t] = matrix.data + first * matrix.row_stride + begin;
        continue;
      }
    }
    A* to = buffer + t * kTile;
    fetch_ahead(matrix, first, begin + kTile, rows * columns);
    for (int64_t r = 0; r < rows; ++r) matrix.copy(first + r, begin, columns, to + r * columns);
    x[t] = to;
  }
  add_products(x.data(), static_cast<int64_t>(matrices.size()), rows * columns, sums);
}

}  // namespace

template <typename S>
void affinity(const Shape& shape, const View<const S>* views, const unsigned char* mask,
              double* products, const ParallelFor& parallel_for) {
  using A = acc_t<S>;
  const int64_t tasks = shape.tasks, batch = shape.batch, N = shape.positions;
  const Plan plan = plan_of(shape, views, mask != nullptr);
  const int64_t size = tasks * tasks;
  const std::unique_ptr<double[]> sums(new double[batch * plan.units * size]());

  const int64_t tiles = std::min(kTiles, plan.tiles);
  const int64_t unit_size = tiles * plan.rows * plan.columns * tasks;
  parallel_for(batch * plan.units, grain_of(unit_size), [&](int64_t begin, int64_t end) {
    const std::unique_ptr<A[]> buffer(new A[tasks * kTile]);
    std::vector<const A*> x(tasks);
    std::vector<Rows<S>> matrices(tasks);
    for (int64_t u = begin; u < end; ++u) {
      const int64_t b = u / plan.units, first = u % plan.units * kTiles;
      for (int64_t t = 0; t < tasks; ++t) {
        matrices[t] = rows_of(views[t], b, plan.by_channel, mask ? mask + b * N : nullptr);
      }
      for (int64_t tile = first; tile < std::min(first + kTiles, plan.tiles); ++tile) {
        add_tile(plan, matrices, tile, buffer.get(), x, sums.get() + u * size);
      }
    }
  });

  parallel_for(batch, grain_of(plan.units * size), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      double* of_sample = sums.get() + b * plan.units * size;
      for (int64_t u = 1; u < plan.units; ++u) {
        for (int64_t i = 0; i < size; ++i) of_sample[i] += of_sample[u * size + i];
      }
      for (int64_t t = 0; t < tasks; ++t) {
        for (int64_t u = 0; u < tasks; ++u) {
          products[b * size + t * tasks + u] = of_sample[std::min(t, u) * tasks + std::max(t, u)];
        }
      }
    }
  });
}

#define INSTANTIATE(S)                                                                      \
  template void affinity(const Shape&, const View<const S>*, const unsigned char*, double*, \
                         const ParallelFor&);
REPMTL_FOR_SALIENCY_TYPES(INSTANTIATE)
#undef INSTANTIATE

}  // namespace repmtl
