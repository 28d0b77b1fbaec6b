#include "statistics.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <type_traits>

#include "rows.h"
#include "scale.h"

namespace repmtl {
namespace {

// Partial sums of a row that do not depend on each other.
constexpr int64_t kLanes = 8;
// Rows of one unit of work. Units do not depend on the number of threads, so sums don't either.
constexpr int64_t kChunk = 256;
// Elements of a row at a time: four such parts fit the first cache.
constexpr int64_t kBlock = 1024;

// Adds `rows` rows of `count` elements, `stride` apart, to `across` (count), the sums over rows,
// and to `along` (rows), the sums of the rows. Raises `top` (kLanes), so that its maximum is at
// least the largest |x|. Four numbers at a time are added in their own precision, and these sums in
// double: where saliencies of opposite signs cancel, the entropy sees the remainder.
template <bool kAcross, bool kAlong, typename A>
inline __attribute__((always_inline)) void add_rows(const A* __restrict data, int64_t stride,
                                                    int64_t rows, int64_t count,
                                                    double* __restrict across,
                                                    double* __restrict along, A* __restrict top) {
  if (kAcross) {
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) {
      const A *r0 = data + r * stride, *r1 = r0 + stride, *r2 = r1 + stride, *r3 = r2 + stride;
      for (int64_t i = 0; i < count; ++i) across[i] += (r0[i] + r1[i]) + (r2[i] + r3[i]);
    }
    for (; r < rows; ++r) {
      for (int64_t i = 0; i < count; ++i) across[i] += data[r * stride + i];
    }
  }
  if (kAlong) {
    for (int64_t r = 0; r < rows; ++r) {
      const A* row = data + r * stride;
      double sums[kLanes] = {};
      int64_t i = 0;
      for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
        for (int64_t j = i; j < i + kLanes; ++j) {
          const A x0 = row[j], x1 = row[j + kLanes];
          const A x2 = row[j + 2 * kLanes], x3 = row[j + 3 * kLanes];
          sums[j - i] += (x0 + x1) + (x2 + x3);
          const A a = std::max(std::fabs(x0), std::fabs(x1));
          const A b = std::max(std::fabs(x2), std::fabs(x3));
          top[j - i] = std::max(top[j - i], std::max(a, b));
        }
      }
      for (; i + kLanes <= count; i += kLanes) {
        for (int64_t j = i; j < i + kLanes; ++j) {
          sums[j - i] += row[j];
          top[j - i] = std::max(top[j - i], std::fabs(row[j]));
        }
      }
      for (int64_t j = i; j < count; ++j) {
        sums[j - i] += row[j];
        top[j - i] = std::max(top[j - i], std::fabs(row[j]));
      }
      along[r] +=
          ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]));
    }
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
  constexpr int64_t group = 4;
  A buffer[group * kBlock];
  for (int64_t begin = 0; begin < length; begin += kBlock) {
    const int64_t block = std::min(kBlock, length - begin);
    if constexpr (std::is_same_v<S, A>) {
      if (matrix.direct()) {
        // Rows that fit the cache, so that both kinds of sums read them once from memory.
        const int64_t step = std::max<int64_t>(group, group * kBlock / block);
        for (int64_t r = 0; r < rows; r += step) {
          add(matrix.data + (first + r) * matrix.row_stride + begin, matrix.row_stride, r,
              std::min(step, rows - r), begin, block);
        }
        continue;
      }
    }
    for (int64_t r = 0; r < rows; r += group) {
      const int64_t count = std::min(group, rows - r);
      for (int64_t k = 0; k < count; ++k) {
        matrix.copy(first + r + k, begin, block, buffer + k * kBlock);
      }
      add(buffer, kBlock, r, count, begin, block);
    }
  }
  return *std::max_element(top, top + kLanes);
}

}  // namespace

template <typename S>
void statistics(const Shape& shape, const View<const S>* views, acc_t<S>* positions,
                acc_t<S>* channels, acc_t<S>* scale, const unsigned char* mask,
                const ParallelFor& parallel_for) {
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
