// Products of the saliencies with few vectors. Four vectors share one read of the saliencies.
#include "device.cuh"

namespace repmtl::cuda {
namespace {

// A sum over positions leaves out absent ones. The sum for an absent position is 0.

constexpr int kGroup = 4;         // vectors of one read
constexpr int kRows = 4;          // rows of a warp that share a read of the vectors
constexpr int64_t kMinRows = 64;  // the least rows of a chunk

struct Plan {
  Axes axes;
  int64_t first, batch, chunk;     // the first task; samples; rows of a chunk
  unsigned chunks, tiles, groups;  // chunks of rows, tiles of columns, groups of vectors
};

// `Vectors` with the type of accumulators.
template <typename A>
struct Columns {
  const A* data;
  int64_t count, task, batch, column;

  __device__ const A* at(int64_t t, int64_t b, int64_t k) const {
    return data + t * task + b * batch + k * column;
  }
};

// parts (tasks, B, chunks, columns of v, columns) = sum over a chunk of rows, of S v.
// Grid: (task and sample, chunk of rows, tile of columns, group of vectors).
template <typename S, int kVector, bool kMasked>
REPMTL_KERNEL over_rows_kernel(const __grid_constant__ Tasks tasks,
                               const __grid_constant__ Plan plan,
                               const __grid_constant__ Columns<acc_t<S>> vectors, acc_t<S>* parts,
                               const unsigned char* valid) {  // (B, N)
  using A = acc_t<S>;
  constexpr int kColumns = kWarp * kVector;
  const int64_t columns = plan.axes.columns;
  unsigned block = blockIdx.x;
  const int64_t k0 = static_cast<int64_t>(block % plan.groups) * kGroup;
  block /= plan.groups;
  const int64_t tile = block % plan.tiles, chunk = block / plan.tiles % plan.chunks;
  const int64_t sample = block / plan.tiles / plan.chunks;
  const int64_t t = sample / plan.batch, b = sample % plan.batch;
  const View& view = tasks.views[t];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t column = tile * kColumns + lane * kVector;
  const bool inside = column < columns;
  const int64_t end = min(plan.axes.rows, (chunk + 1) * plan.chunk);
  const S* base = static_cast<const S*>(view.data) + b * view.batch +
                  (inside ? column_offset(view, plan.axes, column) : 0);
  const bool rows_are_masked = kMasked && !plan.axes.rows_are_channels;
  if constexpr (kMasked) valid += b * positions_of(plan.axes);
  const A* v[kGroup];
#pragma unroll
  for (int k = 0; k < kGroup; ++k) {
    v[k] = vectors.at(plan.first + t, b, min(k0 + k, vectors.count - 1));
  }
  A sums[kGroup][kVector] = {};
  for (int64_t first = chunk * plan.chunk + warp; first < end; first += kWarps * kRows) {
    Pack<S, kVector> x[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int64_t row = first + i * kWarps;
      x[i] = Pack<S, kVector>{};
      if (inside && row < end && (!rows_are_masked || valid[row])) {
        const S* from = base + row_offset(view, plan.axes, row);
        x[i] = *reinterpret_cast<const Pack<S, kVector>*>(from);
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int64_t row = first + i * kWarps;
      if (row >= end) break;
#pragma unroll
      for (int k = 0; k < kGroup; ++k) {
        const A weight = v[k][row];
#pragma unroll
        for (int j = 0; j < kVector; ++j) sums[k][j] += weight * widen(x[i].x[j]);
      }
    }
  }
  __shared__ A shared[kWarps][kColumns];
  for (int k = 0; k < kGroup && k0 + k < vectors.count; ++k) {
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      // Unrolled, so that `sums` stays in registers.
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        if (i == k) shared[warp][lane * kVector + j] = sums[i][j];
      }
    }
    __syncthreads();
    A* to = parts + ((sample * plan.chunks + chunk) * vectors.count + k0 + k) * columns;
    for (int i = threadIdx.x; i < kColumns; i += kThreads) {
      if (tile * kColumns + i >= columns) continue;
      A sum = 0;
      for (int w = 0; w < kWarps; ++w) sum += shared[w][i];
      if (kMasked && !rows_are_masked && !valid[tile * kColumns + i]) sum = 0;
      to[tile * kColumns + i] = sum;
    }
    __syncthreads();
  }
}

// out (samples, length) = scale (samples) times the sum of parts (samples, chunks, length).
template <typename A>
REPMTL_KERNEL add_chunks_kernel(const A* parts, const A* scale, int64_t chunks, int64_t length,
                                unsigned blocks, A* out) {
  const int64_t sample = blockIdx.x / blocks;
  const int64_t i = blockIdx.x % blocks * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (i >= length) return;
  A sum = 0;
  for (int64_t k = 0; k < chunks; ++k) sum += parts[(sample * chunks + k) * length + i];
  out[sample * length + i] = sum * scale[sample];
}

// out (tasks, B, columns of v, rows) = scale S v. Grid: (task and sample, tile of rows, group).
// With a mask the kernel takes a few registers too many for two blocks on a multiprocessor, unless
// the launch bounds ask for two.
template <typename S, int kVector, bool kMasked>
__global__ void __launch_bounds__(kThreads, kMasked&& kIs16Bit<S> ? 2 : 1)
    over_columns_kernel(const __grid_constant__ Tasks tasks, const __grid_constant__ Plan plan,
                        const __grid_constant__ Columns<acc_t<S>> vectors, const acc_t<S>* scale,
                        acc_t<S>* out,
                        const unsigned char* valid) {  // (B, N)
  using A = acc_t<S>;
  const int64_t rows = plan.axes.rows, columns = plan.axes.columns;
  unsigned block = blockIdx.x;
  const int64_t k0 = static_cast<int64_t>(block % plan.groups) * kGroup;
  block /= plan.groups;
  const int64_t tile = block % plan.tiles, sample = block / plan.tiles;
  const int64_t t = sample / plan.batch, b = sample % plan.batch;
  const View& view = tasks.views[t];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t first = (tile * kWarps + warp) * kRows;
  const S* base = static_cast<const S*>(view.data) + b * view.batch;
  const S* from[kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    from[i] = base + row_offset(view, plan.axes, min(first + i, rows - 1));
  }
  const bool rows_are_masked = kMasked && !plan.axes.rows_are_channels;
  if constexpr (kMasked) valid += b * positions_of(plan.axes);
  const A* v[kGroup];
#pragma unroll
  for (int k = 0; k < kGroup; ++k) {
    v[k] = vectors.at(plan.first + t, b, min(k0 + k, vectors.count - 1));
  }
  A sums[kRows][kGroup] = {};
  for (int64_t column = lane * kVector; column < columns; column += kWarp * kVector) {
    const int64_t offset = column_offset(view, plan.axes, column);
    Pack<S, kVector> x[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      x[i] = *reinterpret_cast<const Pack<S, kVector>*>(from[i] + offset);
    }
    if constexpr (kMasked) {
      if (!rows_are_masked) {
        const unsigned bits = present_bits<kVector>(valid + column);
#pragma unroll
        for (int i = 0; i < kRows; ++i) keep(x[i], bits);
      }
    }
#pragma unroll
    for (int k = 0; k < kGroup; ++k) {
      A weights[kVector];
      load(v[k] + column, weights);
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
#pragma unroll
        for (int i = 0; i < kRows; ++i) sums[i][k] += weights[j] * widen(x[i].x[j]);
      }
    }
  }
  const A factor = scale[sample];
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
#pragma unroll
    for (int k = 0; k < kGroup; ++k) {
      A sum = warp_sum(sums[i][k]);
      if (lane == 0 && first + i < rows && k0 + k < vectors.count) {
        if (rows_are_masked && !valid[first + i]) sum = 0;
        out[(sample * vectors.count + k0 + k) * rows + first + i] = sum * factor;
      }
    }
  }
}

template <typename S, bool kMasked>
void run(const Context& on, const Shape& shape, const View* views, const unsigned char* valid,
         bool over_channels, const Columns<acc_t<S>>& vectors, const acc_t<S>* scale,
         acc_t<S>* out) {
  using A = acc_t<S>;
  for_runs_of_tasks<S>(
      shape, views, [&](int64_t first, int64_t count, const Tasks& tasks, const Axes& axes) {
        const int64_t samples = count * shape.batch, before = first * shape.batch;
        const int64_t groups = ceil_div(vectors.count, kGroup);
        Plan plan{axes, first, shape.batch, 0, 0, 0, static_cast<unsigned>(groups)};
        const bool over_rows = axes.rows_are_channels == over_channels;
        const int64_t length = over_rows ? axes.columns : axes.rows;
        A* to = out + before * vectors.count * length;
        if (!over_rows) {
          const int64_t tiles = ceil_div(axes.rows, kWarps * kRows);
          plan.tiles = static_cast<unsigned>(tiles);
          launch(on,
                 axes.wide ? over_columns_kernel<S, kWide<S>, kMasked>
                           : over_columns_kernel<S, 1, kMasked>,
                 samples * tiles * groups, tasks, plan, vectors, scale + before, to, valid);
          return;
        }
        const int64_t tiles = ceil_div(axes.columns, kWarp * (axes.wide ? kWide<S> : 1));
        const int64_t wanted = ceil_div(kFill, samples * tiles);
        plan.chunk = std::max(kMinRows, ceil_div(axes.rows, wanted));
        const int64_t chunks = ceil_div(axes.rows, plan.chunk);
        plan.tiles = static_cast<unsigned>(tiles);
        plan.chunks = static_cast<unsigned>(chunks);
        A* parts = scratch<A>(on, samples * chunks * vectors.count * length);
        launch(on,
               axes.wide ? over_rows_kernel<S, kWide<S>, kMasked> : over_rows_kernel<S, 1, kMasked>,
               samples * chunks * tiles * groups, tasks, plan, vectors, parts, valid);
        const int64_t blocks = ceil_div(vectors.count * length, kThreads);
        launch(on, add_chunks_kernel<A>, samples * blocks, parts, scale + before, chunks,
               vectors.count * length, static_cast<unsigned>(blocks), to);
      });
}

}  // namespace

void products(const Context& on, Type type, const Shape& shape, const View* views, const Mask& mask,
              bool over_channels, const Vectors& vectors, const void* scale, void* out) {
  dispatch(type, [&](auto example) {
    using A = acc_t<decltype(example)>;
    const Columns<A> columns{static_cast<const A*>(vectors.data), vectors.count, vectors.task,
                             vectors.batch, vectors.column};
    dispatch_mask(mask, [&](auto masked) {
      run<decltype(example), decltype(masked)::value>(on, shape, views, mask.valid, over_channels,
                                                      columns, static_cast<const A*>(scale),
                                                      static_cast<A*>(out));
    });
  });
}

}  // namespace repmtl::cuda
