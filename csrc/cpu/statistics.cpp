#include "statistics.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <type_traits>
#include <vector>

#include "rows.h"
#include "scale.h"
#include "vectors.h"

namespace repmtl {
namespace {

// Rows of one unit of work. Units do not depend on the number of threads, so sums don't either.
constexpr int64_t kChunk = 256;
// Rows that are read side by side, and vectors of a row that are added before they become double.
constexpr int kGroup = 4, kWide = 4;
// Elements of a row that are copied at a time, and those that are read in place: their sums over
// rows stay in the second cache.
constexpr int64_t kCopied = 1024, kBlock = 8192;

// The next kVectors vectors of kRows rows. Up to four numbers are added in their own precision, and
// these sums in double: where saliencies of opposite signs cancel, the entropy sees the remainder.
template <int kRows, int kVectors, typename A>
struct Piece {
  Vector<A> x[kRows][kVectors];

  REPMTL_INLINE Piece(const A* data, int64_t stride) {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) x[r][v] = load(data + r * stride + v * kLanes);
    }
  }

  // Adds the sums over rows to `sums`.
  REPMTL_INLINE void add_across(double* sums) const {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      Vector<A> sum = x[0][v];
      if constexpr (kRows == kGroup) sum = (x[0][v] + x[1][v]) + (x[2][v] + x[3][v]);
      store(load(sums + v * kLanes) + widened(sum), sums + v * kLanes);
    }
  }

  // Adds the sums of the rows to `sums` (kRows), and raises `top` to the largest |x|.
  REPMTL_INLINE void add_along(Vector<double>* sums, Vector<A>& top) const {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      Vector<A> sum = x[r][0], largest = magnitude(x[r][0]);
      if constexpr (kVectors == kWide) {
        sum = (x[r][0] + x[r][1]) + (x[r][2] + x[r][3]);
        largest = larger(larger(largest, magnitude(x[r][1])),
                         larger(magnitude(x[r][2]), magnitude(x[r][3])));
      }
      sums[r] += widened(sum);
      top = larger(top, largest);
    }
  }
};

// Adds kRows rows of `count` elements, `stride` apart, to `across` (count), the sums over rows, and
// to `along` (kRows), the sums of the rows. Raises `top` (kLanes) to the largest |x|.
template <int kRows, bool kAcross, bool kAlong, typename A>
REPMTL_INLINE void add_group(const A* data, int64_t stride, int64_t count, double* across,
                             double* along, A* top) {
  Vector<double> sums[kRows] = {};
  Vector<A> largest = load(top);
  int64_t i = 0;
  const auto add = [&](const auto& piece) __attribute__((always_inline)) {
    if (kAcross) piece.add_across(across + i);
    if (kAlong) piece.add_along(sums, largest);
  };
  for (; i + kWide * kLanes <= count; i += kWide * kLanes) {
    // The next rows in the order of memory, which processors don't guess from rows side by side.
    const A* next = data + kRows * (stride + i);
#pragma GCC unroll 16
    for (size_t k = 0; k < kRows * kWide * kLanes; k += 64 / sizeof(A)) {
      __builtin_prefetch(next + k, 0, 2);
    }
    add(Piece<kRows, kWide, A>(data + i, stride));
  }
  for (; i + kLanes <= count; i += kLanes) add(Piece<kRows, 1, A>(data + i, stride));
  for (; i < count; ++i) {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const A x = data[r * stride + i];
      if (kAcross) across[i] += x;
      if (kAlong) {
        along[r] += x;
        top[0] = std::max(top[0], std::fabs(x));
      }
    }
  }
  if (!kAlong) return;
  store(larger(load(top), largest), top);
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) along[r] += sum_of(sums[r]);
}

// The same for any number of rows.
template <bool kAcross, bool kAlong, typename A>
REPMTL_INLINE void add_rows(const A* data, int64_t stride, int64_t rows, int64_t count,
                            double* across, double* along, A* top) {
  int64_t r = 0;
  for (; r + kGroup <= rows; r += kGroup) {
    double* sums = kAlong ? along + r : nullptr;
    add_group<kGroup, kAcross, kAlong>(data + r * stride, stride, count, across, sums, top);
  }
  for (; r < rows; ++r) {
    double* sums = kAlong ? along + r : nullptr;
    add_group<1, kAcross, kAlong>(data + r * stride, stride, count, across, sums, top);
  }
}

#define ADD_ROWS(A, name, across, along)                                              \
  REPMTL_CLONES void name(const A* data, int64_t stride, int64_t rows, int64_t count, \
                          double* sums, double* row_sums, A* top) {                   \
    add_rows<across, along>(data, stride, rows, count, sums, row_sums, top);          \
  }
ADD_ROWS(float, add_across, true, false)
ADD_ROWS(float, add_along, false, true)
ADD_ROWS(float, add_both, true, true)
ADD_ROWS(double, add_across, true, false)
ADD_ROWS(double, add_along, false, true)
ADD_ROWS(double, add_both, true, true)
#undef ADD_ROWS

// Adds `rows` rows of `length` elements, from row `first` on, to `across` (length), and writes
// their sums to `along` (rows). Either may be null. Returns the largest |x|, if `along` is not
// null.
template <typename S>
acc_t<S> add_chunk(const Rows<S>& matrix, int64_t first, int64_t rows, int64_t length,
                   double* across, double* along) {
  using A = acc_t<S>;
  A top[kLanes] = {};
  if (along) std::fill_n(along, rows, 0.0);
  const auto add = [&](const A* data, int64_t stride, int64_t r, int64_t count, int64_t begin,
                       int64_t block) {
    double* sums = across ? across + begin : nullptr;
    double* row_sums = along ? along + r : nullptr;
    void (*function)(const A*, int64_t, int64_t, int64_t, double*, double*, A*) = add_both;
    if (!along) function = add_across;
    if (!across) function = add_along;
    function(data, stride, count, block, sums, row_sums, top);
  };
  if constexpr (std::is_same_v<S, A>) {
    if (matrix.direct()) {
      for (int64_t begin = 0; begin < length; begin += kBlock) {
        add(matrix.data + first * matrix.row_stride + begin, matrix.row_stride, 0, rows, begin,
            std::min(kBlock, length - begin));
      }
      return *std::max_element(top, top + kLanes);
    }
  }
  A buffer[kGroup * kCopied];
  for (int64_t r = 0; r < rows; r += kGroup) {
    const int64_t count = std::min<int64_t>(kGroup, rows - r);
    for (int64_t begin = 0; begin < length; begin += kCopied) {
      const int64_t block = std::min(kCopied, length - begin);
      for (int64_t k = 0; k < count; ++k) {
        matrix.copy(first + r + k, begin, block, buffer + k * kCopied);
      }
      add(buffer, kCopied, r, count, begin, block);
    }
  }
  return *std::max_element(top, top + kLanes);
}

}  // namespace

namespace {

// The same for a single position: its channels are their own means.
template <typename S>
void pooled_statistics(const Shape& shape, const View<const S>* views, acc_t<S>* positions,
                       acc_t<S>* channels, acc_t<S>* scale, const unsigned char* mask,
                       const ParallelFor& parallel_for) {
  using A = acc_t<S>;
  const int64_t batch = shape.batch, C = shape.channels;
  parallel_for(shape.tasks * batch, grain_of(C), [&](int64_t begin, int64_t end) {
    std::vector<A> buffer(channels ? 0 : C);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i % batch;
      A* row = channels ? channels + i * C : buffer.data();
      rows_of(views[i / batch], b, false, mask ? mask + b : nullptr).copy(0, 0, C, row);
      double sum = 0;
      A top[kLanes] = {};
      add_along(row, C, 1, C, nullptr, &sum, top);
      if (positions) positions[i] = static_cast<A>(sum / static_cast<double>(C));
      if (scale) scale[i] = power_of_two(*std::max_element(top, top + kLanes));
    }
  });
}

}  // namespace

template <typename S>
void statistics(const Shape& shape, const View<const S>* views, acc_t<S>* positions,
                acc_t<S>* channels, acc_t<S>* scale, const unsigned char* mask,
                const ParallelFor& parallel_for) {
  if (shape.positions == 1) {
    pooled_statistics(shape, views, positions, channels, scale, mask, parallel_for);
    return;
  }
  using A = acc_t<S>;
  const int64_t tasks = shape.tasks, batch = shape.batch, C = shape.channels, N = shape.positions;
  struct Task {
    bool by_channel;
    bool across, along;          // the sums that add_chunk computes
    int64_t count, length;       // rows of a sample, elements of a row
    int64_t chunks, chunk;       // units of work of a sample, rows of a unit
    int64_t unit, partial, row;  // where its units, its sums over rows and its row sums begin
  };
  std::vector<Task> plan;
  int64_t units = 0, partials = 0, row_sums = 0;
  for (int64_t t = 0; t < tasks; ++t) {
    Task task{};
    task.by_channel = channels_are_rows(views[t], N);
    task.across = task.by_channel ? positions : channels;
    task.along = scale || (task.by_channel ? channels : positions);
    task.count = task.by_channel ? C : N;
    task.length = task.by_channel ? N : C;
    task.chunk = std::min(kChunk, task.count);
    task.chunks = ceil_div(task.count, task.chunk);
    task.unit = units;
    task.partial = partials;
    task.row = row_sums;
    units += batch * task.chunks;
    partials += task.across ? batch * task.chunks * task.length : 0;
    row_sums += task.along ? batch * task.chunks * task.chunk : 0;
    plan.push_back(task);
  }
  const std::unique_ptr<double[]> across(new double[partials]), along(new double[row_sums]);
  const std::unique_ptr<A[]> largest(new A[units]);

  const auto chunk = [&](int64_t begin, int64_t end) {
    const auto is_before = [](int64_t u, const Task& k) { return u < k.unit; };
    auto task = std::upper_bound(plan.begin(), plan.end(), begin, is_before) - 1;
    for (int64_t u = begin; u < end; ++u) {
      while (task + 1 != plan.end() && u >= (task + 1)->unit) ++task;
      const int64_t unit = u - task->unit, b = unit / task->chunks, k = unit % task->chunks;
      const View<const S>& view = views[task - plan.begin()];
      const Rows<S> rows = rows_of(view, b, task->by_channel, mask ? mask + b * N : nullptr);
      double *sums = nullptr, *sums_of_rows = nullptr;
      if (task->across) {
        sums = across.get() + task->partial + unit * task->length;
        std::fill_n(sums, task->length, 0.0);
      }
      if (task->along) sums_of_rows = along.get() + task->row + unit * task->chunk;
      const int64_t first = k * task->chunk, count = std::min(task->chunk, task->count - first);
      largest[u] = add_chunk(rows, first, count, task->length, sums, sums_of_rows);
    }
  };
  // Approximately; units of different tasks may have different sizes.
  const int64_t unit_size = std::min(kChunk, std::max(C, N)) * std::min(C, N);
  parallel_for(units, grain_of(unit_size), chunk);

  const auto finish = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Task& task = plan[i / batch];
      const int64_t b = i % batch, first = task.unit + b * task.chunks;
      const int64_t absent = mask ? std::count(mask + b * N, mask + (b + 1) * N, 0) : 0;
      const double present = static_cast<double>(std::max<int64_t>(1, N - absent));
      A* by_row = task.by_channel ? channels : positions;
      A* by_element = task.by_channel ? positions : channels;
      if (by_row) {
        const double* sums = along.get() + task.row + b * task.chunks * task.chunk;
        const double length = task.by_channel ? present : static_cast<double>(C);
        A* out = by_row + i * task.count;
        for (int64_t r = 0; r < task.count; ++r) out[r] = static_cast<A>(sums[r] / length);
      }
      if (by_element) {
        A* out = by_element + i * task.length;
        double* sums = across.get() + task.partial + b * task.chunks * task.length;
        const double count = task.by_channel ? static_cast<double>(C) : present;
        for (int64_t k = 1; k < task.chunks; ++k) {
          for (int64_t j = 0; j < task.length; ++j) sums[j] += sums[k * task.length + j];
        }
        for (int64_t j = 0; j < task.length; ++j) out[j] = static_cast<A>(sums[j] / count);
      }
      if (scale) {
        scale[i] = power_of_two(
            *std::max_element(largest.get() + first, largest.get() + first + task.chunks));
      }
    }
  };
  parallel_for(tasks * batch, grain_of(C + N), finish);
}

#define INSTANTIATE(S)                                                                          \
  template void statistics(const Shape&, const View<const S>*, acc_t<S>*, acc_t<S>*, acc_t<S>*, \
                           const unsigned char*, const ParallelFor&);
REPMTL_FOR_SALIENCY_TYPES(INSTANTIATE)
#undef INSTANTIATE

}  // namespace repmtl
