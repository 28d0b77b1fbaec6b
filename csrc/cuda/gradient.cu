// Stage `saliency_grad`.
#include <type_traits>

#include "tile.cuh"

namespace repmtl::cuda {
namespace {

// `Coefficients` and `Outer` with the type of accumulators.
template <typename A>
struct Terms {
  const A *scale, *anchor_weight, *affinity_weight;  // (T, B)
  const A *da, *dx;                                  // (T, B, C), (T, B, N) or null
  int64_t vectors;                                   // K
  const A *left, *right;                             // (K, B, C), (T, B, K, N)
};

template <typename A>
Terms<A> terms_of(const Coefficients& c, const Outer& o) {
  const auto cast = [](const void* x) { return static_cast<const A*>(x); };
  return {cast(c.scale),
          cast(c.anchor_weight),
          cast(c.affinity_weight),
          cast(o.da),
          cast(o.dx),
          o.vectors,
          cast(o.left),
          cast(o.right)};
}

// A thread for each sample. grad (), radial_weight (B), the other arrays (T, B).
template <typename A>
REPMTL_KERNEL coefficients_kernel(const A* grad, const A* weight, const A* similarity,
                                  const A* inverse, const A* slope, int64_t tasks, int64_t batch,
                                  A* anchor_weight, A* affinity_weight, A* radial_weight) {
  const int64_t b = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (b >= batch) return;
  A sum = 0;
  for (int64_t t = 0; t < tasks; ++t) {
    const int64_t i = t * batch + b;
    const A ds = 2 * *grad * weight[i];
    anchor_weight[i] = ds * inverse[i];
    affinity_weight[i] = anchor_weight[i] * slope[i];
    sum += ds * similarity[i];
  }
  radial_weight[b] = sum;
}

// `AnchorGradient` with the type of accumulators.
template <typename A>
struct AnchorTerms {
  const A *negatives, *grad, *factor, *anchor_weight, *y, *radial_weight, *radial;
};

// Writes da (T, B, C). Grid: (anchor and sample, tile of channels).
template <typename A>
REPMTL_KERNEL anchor_gradient_kernel(
    const __grid_constant__ AnchorTerms<A> terms, Shape shape, unsigned blocks, A* da,
    const A* counts) {  // (B): present positions of a sample; null: all are present
  const int64_t sample = blockIdx.x / blocks, v = sample / shape.batch, b = sample % shape.batch;
  const int64_t c = blockIdx.x % blocks * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (c >= shape.channels) return;
  A positive = 0;
  for (int64_t t = 0; t < shape.tasks; ++t) {
    const int64_t task = t * shape.batch + b;
    positive += terms.anchor_weight[task] * terms.y[(task * shape.tasks + v) * shape.channels + c];
  }
  const int64_t i = sample * shape.channels + c;
  const A through = terms.factor[b] * (positive - terms.radial_weight[b] * terms.radial[i]);
  const A count = counts ? larger(counts[b], A(1)) : static_cast<A>(shape.positions);
  da[i] = (*terms.negatives * terms.grad[i] + through) / count;
}

constexpr int kChannels = 64;  // channels of a block
constexpr int kRowTiles = kChannels / kSide;
constexpr int kDepth = 32;  // positions of one step

// The tasks of one launch whose gradients are wanted.
struct Outputs {
  View from[kTasks], to[kTasks];
  int task[kTasks];
};

// Grid: (task and sample, chunk of channels); N <= 16 kTiles.
template <typename S, int kTiles, bool kMasked>
__global__ void __launch_bounds__(kThreads, std::is_same_v<S, double> ? 1 : 2)
    small_gradient_kernel(const __grid_constant__ Outputs views, Shape shape, unsigned chunks,
                          const S* matrix,  // (T, B, N, N)
                          acc_t<S> multiple, const __grid_constant__ Terms<acc_t<S>> terms,
                          const unsigned char* valid) {  // (B, N)
  using A = acc_t<S>;
  using Operand = std::conditional_t<kIs16Bit<S>, S, A>;
  constexpr int kStride = kSide * kTiles + 8, kLeftStride = kChannels + 8;
  __shared__ __align__(32) Operand left[kDepth * kLeftStride];  // S^^T
  __shared__ __align__(32) Operand right[kDepth * kStride];
  const int64_t N = shape.positions, C = shape.channels;
  const unsigned local = blockIdx.x / chunks;
  const int64_t first = static_cast<int64_t>(blockIdx.x % chunks) * kChannels;
  const View &from = views.from[local / shape.batch], &to = views.to[local / shape.batch];
  const int64_t t = views.task[local / shape.batch], b = local % shape.batch;
  const int64_t sample = t * shape.batch + b;
  const A scale = terms.scale[sample];
  const S* saliency = static_cast<const S*>(from.data) + b * from.batch;
  const bool channels_lead = from.channel == 1;  // neighbouring threads read neighbouring elements
  matrix += sample * N * N;
  if constexpr (kMasked) valid += b * N;

  Elements<A, kRowTiles, kTiles> g{};
  MatrixUnits<std::conditional_t<kIs16Bit<S>, S, float16>, kRowTiles, kTiles> units;
  if constexpr (kIs16Bit<S>) units.clear();
  for (int64_t step = 0; step < N; step += kDepth) {
    for (int i = threadIdx.x; i < kDepth * kChannels; i += kThreads) {
      const int c = channels_lead ? i % kChannels : i / kDepth;
      const int n = channels_lead ? i / kChannels : i % kDepth;
      A x = 0;
      if (first + c < C && step + n < N && (!kMasked || valid[step + n])) {
        x = widen(saliency[(first + c) * from.channel + position_offset(from, step + n)]) * scale;
      }
      narrow(x, left[n * kLeftStride + c]);
    }
    for (int i = threadIdx.x; i < kDepth * kSide * kTiles; i += kThreads) {
      const int64_t m = i / (kSide * kTiles), n = i % (kSide * kTiles);
      const bool inside = step + m < N && n < N;
      narrow(inside ? widen(matrix[(step + m) * N + n]) : A(0), right[m * kStride + n]);
    }
    __syncthreads();
    if constexpr (kIs16Bit<S>) {
      units.template multiply<kDepth, kLeftStride, kStride>(left, right);
    } else {
      multiply<kDepth, kLeftStride, kStride>(left, right, g);
    }
    __syncthreads();
  }
  if constexpr (kIs16Bit<S>) {
    __shared__ __align__(32) float products[kChannels * kStride];
    units.template elements<kStride>(products, g);
  }

  const A affinity_weight = terms.affinity_weight[sample] / multiple;
  const A anchor_weight = terms.anchor_weight[sample];
  const int64_t c0 = first + threadIdx.x / kSide, n0 = threadIdx.x % kSide;
  Elements<A, kRowTiles, kTiles> outer{};
  for (int64_t k = 0; k < terms.vectors; ++k) {
    A channel_factors[kRowTiles], position_factors[kTiles];
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
      const int64_t c = min(c0 + i * kSide, C - 1);
      channel_factors[i] = terms.left[(k * shape.batch + b) * C + c];
    }
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      const int64_t n = min(n0 + j * kSide, N - 1);
      position_factors[j] = terms.right[(sample * terms.vectors + k) * N + n];
    }
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int j = 0; j < kTiles; ++j) outer.x[i][j] += channel_factors[i] * position_factors[j];
    }
  }
  S* output = static_cast<S*>(to.data) + b * to.batch;
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
    const int64_t n = n0 + j * kSide;
    if (n >= N) break;
    const A dx = terms.dx ? terms.dx[sample * N + n] : A(0);
    S* column = output + position_offset(to, n);
    const bool is_present = !kMasked || valid[n];
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
      const int64_t c = c0 + i * kSide;
      if (c >= C) break;
      const A x = scale * (affinity_weight * g.x[i][j] + anchor_weight * outer.x[i][j]);
      narrow(is_present ? x + terms.da[sample * C + c] + dx : A(0), column[c * to.channel]);
    }
  }
}

constexpr int kRows = 4;  // rows of a thread of add_outer, which share the terms of its columns

// Rows and columns are those of the output's axes. Grid: (sample, tile of rows, tile of columns).
template <typename S, int kVector, bool kMasked>
REPMTL_KERNEL add_outer_kernel(const __grid_constant__ View to, const __grid_constant__ Axes axes,
                               Shape shape, int64_t task, unsigned row_tiles, unsigned column_tiles,
                               const acc_t<S>* product,  // (B, rows, columns)
                               acc_t<S> multiple, const __grid_constant__ Terms<acc_t<S>> terms,
                               const unsigned char* valid) {  // (B, N)
  using A = acc_t<S>;
  const int64_t b = blockIdx.x / column_tiles / row_tiles;
  const int64_t row_tile = blockIdx.x / column_tiles % row_tiles;
  const int64_t column_tile = blockIdx.x % column_tiles;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t first = (row_tile * kWarps + warp) * kRows;
  const int64_t column = (column_tile * kWarp + lane) * kVector;
  if (column >= axes.columns) return;
  const int64_t sample = task * shape.batch + b;
  const int64_t C = shape.channels, N = shape.positions;
  const auto row_of = [&](int i) { return min(first + i, axes.rows - 1); };

  A x[kRows][kVector] = {};
  for (int64_t k = 0; k < terms.vectors; ++k) {
    const A* left = terms.left + (k * shape.batch + b) * C;
    const A* right = terms.right + (sample * terms.vectors + k) * N;
    A column_factors[kVector];
    load((axes.rows_are_channels ? right : left) + column, column_factors);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const A row_factor = axes.rows_are_channels ? left[row_of(i)] : right[row_of(i)];
#pragma unroll
      for (int j = 0; j < kVector; ++j) x[i][j] += row_factor * column_factors[j];
    }
  }
  const A scale = terms.scale[sample], anchor_weight = terms.anchor_weight[sample];
  const A affinity_weight = terms.affinity_weight[sample] / multiple;
  const A* da = terms.da + sample * C;
  const A* dx = terms.dx ? terms.dx + sample * N : nullptr;
  const A* along_rows = axes.rows_are_channels ? da : dx;
  const A* along_columns = axes.rows_are_channels ? dx : da;
  A rest[kVector] = {};
  if (along_columns) load(along_columns + column, rest);
  S* target = static_cast<S*>(to.data) + b * to.batch + column_offset(to, axes, column);
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int64_t row = first + i;
    if (row >= axes.rows) break;
    A from[kVector];
    load(product + (b * axes.rows + row) * axes.columns + column, from);
    const A row_term = along_rows ? along_rows[row] : A(0);
    Pack<S, kVector> pack;
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      // In this order: scale^2 may overflow.
      const A value = scale * (affinity_weight * (scale * from[j]) + anchor_weight * x[i][j]);
      narrow(value + row_term + rest[j], pack.x[j]);
    }
    if constexpr (kMasked) keep(pack, present_bits<kVector>(valid + b * N, axes, row, column));
    store(pack, target + row_offset(to, axes, row));
  }
}

}  // namespace

void coefficients(const Context& on, Type type, int64_t tasks, int64_t batch, const void* grad,
                  const void* weight, const void* similarity, const void* inverse,
                  const void* slope, void* anchor_weight, void* affinity_weight,
                  void* radial_weight) {
  dispatch_accumulation(type, [&](auto example) {
    using A = decltype(example);
    launch(on, coefficients_kernel<A>, ceil_div(batch, kThreads), static_cast<const A*>(grad),
           static_cast<const A*>(weight), static_cast<const A*>(similarity),
           static_cast<const A*>(inverse), static_cast<const A*>(slope), tasks, batch,
           static_cast<A*>(anchor_weight), static_cast<A*>(affinity_weight),
           static_cast<A*>(radial_weight));
  });
}

void anchor_gradient(const Context& on, Type type, const Shape& shape, const Mask& mask,
                     const AnchorGradient& terms, void* da) {
  dispatch_accumulation(type, [&](auto example) {
    using A = decltype(example);
    const auto cast = [](const void* x) { return static_cast<const A*>(x); };
    const AnchorTerms<A> typed{cast(terms.negatives), cast(terms.grad),
                               cast(terms.factor),    cast(terms.anchor_weight),
                               cast(terms.y),         cast(terms.radial_weight),
                               cast(terms.radial)};
    const int64_t blocks = ceil_div(shape.channels, kThreads);
    launch(on, anchor_gradient_kernel<A>, shape.tasks * shape.batch * blocks, typed, shape,
           static_cast<unsigned>(blocks), static_cast<A*>(da), cast(mask.counts));
  });
}

void small_gradient(const Context& on, Type type, const Shape& shape, int64_t count,
                    const int64_t* tasks, const View* views, const View* outputs, const Mask& mask,
                    const void* matrix, double multiple, const Coefficients& coefficients,
                    const Outer& outer) {
  dispatch(type, [&](auto example) {
    using S = decltype(example);
    using A = acc_t<S>;
    const int64_t chunks = ceil_div(shape.channels, kChannels);
    for (int64_t first = 0; first < count; first += kTasks) {
      const int64_t group_size = std::min<int64_t>(kTasks, count - first);
      Outputs group{};
      for (int64_t i = 0; i < group_size; ++i) {
        group.from[i] = views[first + i];
        group.to[i] = outputs[first + i];
        group.task[i] = static_cast<int>(tasks[first + i]);
      }
      dispatch_mask(mask, [&](auto masked) {
        constexpr bool kMasked = decltype(masked)::value;
        launch(on,
               shape.positions <= kSide ? small_gradient_kernel<S, 1, kMasked>
                                        : small_gradient_kernel<S, 4, kMasked>,
               group_size * shape.batch * chunks, group, shape, static_cast<unsigned>(chunks),
               static_cast<const S*>(matrix), static_cast<A>(multiple),
               terms_of<A>(coefficients, outer), mask.valid);
      });
    }
  });
}

void add_outer(const Context& on, Type type, const Shape& shape, int64_t task, const View& output,
               const Mask& mask, const void* product, double multiple,
               const Coefficients& coefficients, const Outer& outer) {
  dispatch(type, [&](auto example) {
    using S = decltype(example);
    using A = acc_t<S>;
    const Axes axes = axes_of<S>(output, shape);
    const int64_t vector = axes.wide ? kWide<S> : 1;
    const int64_t row_tiles = ceil_div(axes.rows, kWarps * kRows);
    const int64_t column_tiles = ceil_div(axes.columns, kWarp * vector);
    dispatch_mask(mask, [&](auto masked) {
      constexpr bool kMasked = decltype(masked)::value;
      launch(on,
             axes.wide ? add_outer_kernel<S, kWide<S>, kMasked> : add_outer_kernel<S, 1, kMasked>,
             shape.batch * row_tiles * column_tiles, output, axes, shape, task,
             static_cast<unsigned>(row_tiles), static_cast<unsigned>(column_tiles),
             static_cast<const A*>(product), static_cast<A>(multiple),
             terms_of<A>(coefficients, outer), mask.valid);
    });
  });
}

}  // namespace repmtl::cuda
