// Stage `affinity`: inner products of the tasks' saliencies.
#include <algorithm>
#include <vector>

#include "device.cuh"

namespace repmtl::cuda {
namespace {

// Tasks whose products with as many others are summed in registers. Three would spill beside a
// mask, and in 16 bits, where a load brings twice as many numbers.
template <typename S, bool kMasked>
constexpr int kSquareOf = kMasked || sizeof(S) == 2 ? 2 : 3;
// A thread holds so many 32-bit numbers of one task at a time, unless one load has more.
constexpr int kHeld = 4;

template <typename S, int kVector>
constexpr int kUnroll = std::clamp(kHeld * 4 / static_cast<int>(sizeof(acc_t<S>)) / kVector, 1, 2);

// Blocks of a multiprocessor. By itself, the compiler takes a few registers more than two have.
constexpr int kBlocks = 2;

struct Group {
  Tasks tasks;
  int64_t first, count;  // task `first` and those after it
};

struct Plan {
  Axes axes;
  int64_t parts, chunk;  // of a sample: blocks, and elements of a block
  int64_t tasks;         // of the result
};

// The places of a thread's vectors. The bits say which of their elements are present.
template <int kRows>
struct Places {
  int64_t row[kRows], column[kRows];
  unsigned bits[kRows];
};

// Loads vectors of sample b, zeros where no bit is set.
template <bool kMasked, typename S, int kVector, int kRows>
__device__ __forceinline__ void load_vectors(const View& view, const Axes& axes, int64_t b,
                                             const Places<kRows>& places,
                                             Pack<S, kVector> (&to)[kRows]) {
  const S* base = static_cast<const S*>(view.data) + b * view.batch;
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    to[i] = {};
    if (places.bits[i] == 0) continue;
    const S* from =
        base + row_offset(view, axes, places.row[i]) + column_offset(view, axes, places.column[i]);
    to[i] = *reinterpret_cast<const Pack<S, kVector>*>(from);
    if constexpr (kMasked) keep(to[i], places.bits[i]);
  }
}

// A thread's elements of one task: in float at a scale of their own, at which products are in its
// range.
template <typename A, int kCount>
struct Scaled {
  A x[kCount];
  double factor;  // undoes the scale

  template <typename S, int kVector, int kRows>
  __device__ __forceinline__ void take(const Pack<S, kVector> (&from)[kRows]) {
    static_assert(kRows * kVector == kCount);
    A top = 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      x[i] = widen(from[i / kVector].x[i % kVector]);
      top = larger(top, magnitude(x[i]));
    }
    factor = 1;
    if constexpr (std::is_same_v<A, float>) {
      const float scale = power_of_two(top);
      factor = __int_as_float((254 << 23) - __float_as_int(scale));
#pragma unroll
      for (int i = 0; i < kCount; ++i) x[i] *= scale;
    }
  }

  __device__ __forceinline__ double product(const Scaled& other) const {
    A sum = 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) sum += x[i] * other.x[i];
    if constexpr (std::is_same_v<A, float>) return sum * (factor * other.factor);
    return sum;
  }
};

// Sums the products of kSquare tasks from i on with as many others from j on, or with each other.
// The last groups may have fewer tasks.
template <typename S, int kVector, bool kMasked, bool kSame>
__device__ __forceinline__ void multiply_square(const Group& left, const Group& right,
                                                const Plan& plan, int64_t i, int64_t j, int64_t b,
                                                int64_t begin, int64_t end,
                                                const unsigned char* valid, double* shared,
                                                double* sums) {
  constexpr int kRows = kUnroll<S, kVector>;
  constexpr int kSquare = kSquareOf<S, kMasked>;
  constexpr int64_t kStride = static_cast<int64_t>(kThreads) * kVector;
  const Axes& axes = plan.axes;
  const int64_t rows = min(left.count - i, int64_t{kSquare});
  const int64_t columns = min(right.count - j, int64_t{kSquare});
  double total[kSquare][kSquare] = {};
  for (int64_t first = begin + threadIdx.x * kVector; first < end; first += kRows * kStride) {
    Places<kRows> places;
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
      const int64_t element = first + k * kStride;
      places.row[k] = element / axes.columns;
      places.column[k] = element - places.row[k] * axes.columns;
      places.bits[k] = element < end ? ~0u : 0u;
      if constexpr (kMasked) {
        if (element < end) {
          places.bits[k] = present_bits<kVector>(valid, axes, places.row[k], places.column[k]);
        }
      }
    }
    // All loads come first, to be under way together.
    Pack<S, kVector> packs[kSquare][kRows];
#pragma unroll
    for (int t = 0; t < kSquare; ++t) {
      if (t < rows) load_vectors<kMasked>(left.tasks.views[i + t], axes, b, places, packs[t]);
    }
    Scaled<acc_t<S>, kRows * kVector> x[kSquare];
#pragma unroll
    for (int t = 0; t < kSquare; ++t) {
      if (t < rows) x[t].take(packs[t]);
    }
#pragma unroll
    for (int u = 0; u < kSquare; ++u) {
      if (u >= columns) continue;
      if constexpr (kSame) {
#pragma unroll
        for (int t = 0; t <= u; ++t) total[t][u] += x[t].product(x[u]);
      } else {
        Pack<S, kVector> pack[kRows];
        load_vectors<kMasked>(right.tasks.views[j + u], axes, b, places, pack);
        Scaled<acc_t<S>, kRows * kVector> y;
        y.take(pack);
#pragma unroll
        for (int t = 0; t < kSquare; ++t) {
          if (t < rows) total[t][u] += x[t].product(y);
        }
      }
    }
  }

#pragma unroll
  for (int t = 0; t < kSquare; ++t) {
#pragma unroll
    for (int u = kSame ? t : 0; u < kSquare; ++u) {
      const double sum = warp_sum(total[t][u]);
      const int warp = threadIdx.x / kWarp;
      if (threadIdx.x % kWarp == 0) shared[(t * kSquare + u) * kWarps + warp] = sum;
    }
  }
  __syncthreads();
  const int64_t t = threadIdx.x / kSquare, u = threadIdx.x % kSquare;
  if (t < rows && u < columns && (!kSame || t <= u)) {
    double sum = 0;
    for (int w = 0; w < kWarps; ++w) sum += shared[threadIdx.x * kWarps + w];
    sums[(left.first + i + t) * plan.tasks + right.first + j + u] = sum;
  }
  __syncthreads();
}

// The products of two groups of tasks, or of one with itself. A block goes through its elements for
// each square of tasks: after the first they are in the cache.
// Grid: (sample, part), the last running fastest.
template <typename S, int kVector, bool kMasked>
__global__ void __launch_bounds__(kThreads, kBlocks)
    affinity_kernel(const __grid_constant__ Group left, const __grid_constant__ Group right,
                    const __grid_constant__ Plan plan,
                    double* sums,                  // (B, parts, T, T), where u >= t
                    const unsigned char* valid) {  // (B, N)
  constexpr int kSquare = kSquareOf<S, kMasked>;
  __shared__ double shared[kSquare * kSquare * kWarps];
  const int64_t b = blockIdx.x / plan.parts, begin = blockIdx.x % plan.parts * plan.chunk;
  const int64_t end = min(plan.axes.rows * plan.axes.columns, begin + plan.chunk);
  if constexpr (kMasked) valid += b * positions_of(plan.axes);
  sums += blockIdx.x * plan.tasks * plan.tasks;
  const bool same = left.first == right.first;
  for (int64_t i = 0; i < left.count; i += kSquare) {
    if (same) {
      multiply_square<S, kVector, kMasked, true>(left, left, plan, i, i, b, begin, end, valid,
                                                 shared, sums);
    }
    for (int64_t j = same ? i + kSquare : 0; j < right.count; j += kSquare) {
      multiply_square<S, kVector, kMasked, false>(left, right, plan, i, j, b, begin, end, valid,
                                                  shared, sums);
    }
  }
}

// Adds the parts in a fixed order. A warp for each sample and two tasks.
REPMTL_KERNEL finish_affinity_kernel(const __grid_constant__ Plan plan,
                                     const double* sums,  // (B, parts, T, T)
                                     int64_t count,       // B T T
                                     double* products) {  // (B, T, T)
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kWarp;
  if (i >= count) return;
  const int64_t size = plan.tasks * plan.tasks, t = i % size / plan.tasks, u = i % plan.tasks;
  if (u < t) return;
  const double* from = sums + i / size * plan.parts * size + t * plan.tasks + u;
  double sum = 0;
  for (int64_t k = threadIdx.x % kWarp; k < plan.parts; k += kWarp) sum += from[k * size];
  sum = warp_sum(sum);
  if (threadIdx.x % kWarp != 0) return;
  products[i] = sum;
  products[i / size * size + u * plan.tasks + t] = sum;
}

// Returns axes that hold for all tasks.
template <typename S>
Axes common_axes(const Shape& shape, const std::vector<View>& views, bool rows_are_channels) {
  Axes axes = axes_of<S>(views[0], shape, rows_are_channels);
  for (const View& view : views) axes.wide &= axes_of<S>(view, shape, rows_are_channels).wide;
  return axes;
}

// The same, after samples without gaps have become single rows.
template <typename S>
Axes arrange(const Shape& shape, std::vector<View>& views, bool masked) {
  const bool rows_are_channels = !channels_are_adjacent(views[0], shape);
  const Axes axes = common_axes<S>(shape, views, rows_are_channels);
  const auto is_dense = [&](const View& view) {
    const int64_t step = rows_are_channels ? view.stride[0] : view.channel;
    const int64_t row = rows_are_channels ? view.channel : view.stride[0];
    return view.has_single_stride() && (axes.columns == 1 || step == 1) &&
           (axes.rows == 1 || row == axes.columns);
  };
  if (masked || !std::all_of(views.begin(), views.end(), is_dense)) return axes;
  const Shape row{shape.tasks, shape.batch, 1, shape.channels * shape.positions};
  for (View& view : views) view = {view.data, view.batch, row.positions, {1, 0, 0}, {1, 1}};
  return common_axes<S>(row, views, true);
}

Group group_of(const std::vector<View>& views, int64_t first) {
  const int64_t count = std::min<int64_t>(kTasks, static_cast<int64_t>(views.size()) - first);
  Group group{{}, first, count};
  std::copy_n(views.begin() + first, count, group.tasks.views);
  return group;
}

template <typename S>
void run(const Context& on, const Shape& shape, std::vector<View> views, const unsigned char* valid,
         double* products) {
  const int64_t T = shape.tasks, B = shape.batch;
  Plan plan{arrange<S>(shape, views, valid != nullptr), 0, 0, T};
  const int64_t elements = shape.channels * shape.positions;
  // A multiple of what the threads of a block hold at a time, and worth a block's start.
  constexpr int64_t kStep = kThreads * 16;
  // Few elements of many tasks are in the cache until all squares have read them.
  const int64_t square = valid ? kSquareOf<S, true> : kSquareOf<S, false>;
  const int64_t wanted = T > square ? kStep : ceil_div(elements, ceil_div(kFill, B));
  plan.chunk = ceil_div(wanted, kStep) * kStep;
  plan.parts = ceil_div(elements, plan.chunk);
  double* sums = scratch<double>(on, B * plan.parts * T * T);
  dispatch_mask({valid, nullptr}, [&](auto masked) {
    constexpr bool kMasked = decltype(masked)::value;
    const auto kernel =
        plan.axes.wide ? affinity_kernel<S, kWide<S>, kMasked> : affinity_kernel<S, 1, kMasked>;
    for (int64_t left = 0; left < T; left += kTasks) {
      for (int64_t right = left; right < T; right += kTasks) {
        launch(on, kernel, B * plan.parts, group_of(views, left), group_of(views, right), plan,
               sums, valid);
      }
    }
  });
  const int64_t count = B * T * T;
  launch(on, finish_affinity_kernel, ceil_div(count, kWarps), plan, sums, count, products);
}

}  // namespace

void affinity(const Context& on, Type type, const Shape& shape, const View* views,
              const unsigned char* valid, double* products) {
  dispatch(type, [&](auto example) {
    run<decltype(example)>(on, shape, {views, views + shape.tasks}, valid, products);
  });
}

}  // namespace repmtl::cuda
