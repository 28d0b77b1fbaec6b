// Stage `statistics`, and the number of present positions.
#include "device.cuh"

namespace repmtl::cuda {
namespace {

constexpr int kUnroll = 4;         // rows of a warp whose loads are under way together
constexpr int64_t kMaxRows = 512;  // rows of a chunk; partial sums are then 1 % of the bytes

struct Plan {
  Axes axes;
  int64_t batch, chunk;    // samples; rows of a chunk
  unsigned chunks, tiles;  // chunks of rows, tiles of columns
};

// Grid: (task and sample, chunk of rows, tile of columns), the last running fastest.
template <typename S, int kVector, bool kMasked>
REPMTL_KERNEL statistics_kernel(const __grid_constant__ Tasks tasks,
                                const __grid_constant__ Plan plan,
                                acc_t<S>* column_parts,  // (tasks, B, chunks, columns) or null
                                acc_t<S>* row_parts,     // (tasks, B, tiles, rows) or null
                                acc_t<S>* max_parts,     // (tasks, B, chunks, tiles) or null
                                const unsigned char* valid) {  // (B, N)
  using A = acc_t<S>;
  constexpr int kColumns = kWarp * kVector;
  const int64_t rows = plan.axes.rows, columns = plan.axes.columns;
  const int64_t tile = blockIdx.x % plan.tiles, chunk = blockIdx.x / plan.tiles % plan.chunks;
  const int64_t sample = blockIdx.x / plan.tiles / plan.chunks;
  const View& view = tasks.views[sample / plan.batch];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t column = tile * kColumns + lane * kVector;
  const bool inside = column < columns;
  const int64_t end = min(rows, (chunk + 1) * plan.chunk);
  const S* base = static_cast<const S*>(view.data) + sample % plan.batch * view.batch +
                  (inside ? column_offset(view, plan.axes, column) : 0);
  const bool rows_are_masked = kMasked && !plan.axes.rows_are_channels;
  unsigned bits = ~0u;  // which columns are present
  if constexpr (kMasked) {
    valid += sample % plan.batch * positions_of(plan.axes);
    if (inside && !rows_are_masked) bits = present_bits<kVector>(valid + column);
  }

  A sums[kVector] = {}, top = 0;
  for (int64_t first = chunk * plan.chunk + warp; first < end; first += kWarps * kUnroll) {
    A x[kUnroll][kVector];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const int64_t row = first + i * kWarps;
      Pack<S, kVector> pack{};
      if (inside && row < end && (!rows_are_masked || valid[row])) {
        const S* from = base + row_offset(view, plan.axes, row);
        pack = *reinterpret_cast<const Pack<S, kVector>*>(from);
        if constexpr (kMasked) keep(pack, bits);
      }
#pragma unroll
      for (int j = 0; j < kVector; ++j) x[i][j] = widen(pack.x[j]);
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      A along = 0;
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        sums[j] += x[i][j];
        along += x[i][j];
        top = larger(top, magnitude(x[i][j]));
      }
      if (row_parts) {
        along = warp_sum(along);
        const int64_t row = first + i * kWarps;
        if (lane == 0 && row < end) row_parts[(sample * plan.tiles + tile) * rows + row] = along;
      }
    }
  }

  __shared__ A shared[kWarps * kColumns];
  if (column_parts) {
#pragma unroll
    for (int j = 0; j < kVector; ++j) shared[warp * kColumns + lane * kVector + j] = sums[j];
    __syncthreads();
    for (int i = threadIdx.x; i < kColumns; i += kThreads) {
      if (tile * kColumns + i >= columns) continue;
      A sum = 0;
      for (int w = 0; w < kWarps; ++w) sum += shared[w * kColumns + i];
      column_parts[(sample * plan.chunks + chunk) * columns + tile * kColumns + i] = sum;
    }
    __syncthreads();
  }
  if (max_parts) {
    top = block_max(top, shared);
    if (threadIdx.x == 0) max_parts[blockIdx.x] = top;
  }
}

// Adds the parts in a fixed order. Grid: (task and sample, block of columns and then rows).
template <typename A>
REPMTL_KERNEL finish_kernel(
    const __grid_constant__ Plan plan, unsigned blocks, const A* column_parts, const A* row_parts,
    const A* max_parts,
    A* column_means,    // (tasks, B, columns) or null
    A* row_means,       // (tasks, B, rows) or null
    A* scale,           // (tasks, B) or null
    const A* counts) {  // (B): present positions of a sample; null: all are present
  const int64_t rows = plan.axes.rows, columns = plan.axes.columns;
  const int64_t sample = blockIdx.x / blocks;
  int64_t i = blockIdx.x % blocks * static_cast<int64_t>(kThreads) + threadIdx.x;
  A along_rows = static_cast<A>(columns), along_columns = static_cast<A>(rows);
  if (counts) {
    const A count = larger(counts[sample % plan.batch], A(1));
    (plan.axes.rows_are_channels ? along_rows : along_columns) = count;
  }
  if (i < columns) {
    if (column_means) {
      A sum = 0;
      for (unsigned k = 0; k < plan.chunks; ++k) {
        sum += column_parts[(sample * plan.chunks + k) * columns + i];
      }
      column_means[sample * columns + i] = sum / along_columns;
    }
  } else if (row_means && i - columns < rows) {
    i -= columns;
    A sum = 0;
    for (unsigned k = 0; k < plan.tiles; ++k) {
      sum += row_parts[(sample * plan.tiles + k) * rows + i];
    }
    row_means[sample * rows + i] = sum / along_rows;
  }
  if (!scale || blockIdx.x % blocks != 0) return;
  __shared__ A shared[kWarps];
  const int64_t parts = static_cast<int64_t>(plan.chunks) * plan.tiles;
  A top = 0;
  for (int64_t k = threadIdx.x; k < parts; k += kThreads) {
    top = larger(top, max_parts[sample * parts + k]);
  }
  top = block_max(top, shared);
  if (threadIdx.x == 0) scale[sample] = power_of_two(top);
}

// Writes counts (B). A block for each sample.
template <typename A>
REPMTL_KERNEL count_kernel(const unsigned char* valid,  // (B, N)
                           int64_t positions, A* counts) {
  __shared__ A shared[kWarps];
  int64_t count = 0;
  for (int64_t n = threadIdx.x; n < positions; n += kThreads) {
    count += valid[blockIdx.x * positions + n];
  }
  const A sum = block_sum(static_cast<A>(count), shared);
  if (threadIdx.x == 0) counts[blockIdx.x] = sum;
}

template <typename S>
void run(const Context& on, const Shape& shape, const View* views, const Mask& mask,
         acc_t<S>* positions, acc_t<S>* channels, acc_t<S>* scale) {
  using A = acc_t<S>;
  for_runs_of_tasks<S>(
      shape, views, [&](int64_t first, int64_t count, const Tasks& tasks, const Axes& axes) {
        const int64_t samples = count * shape.batch, before = first * shape.batch;
        Plan plan{axes, shape.batch, 0, 0, 0};
        const int64_t tiles = ceil_div(axes.columns, kWarp * (axes.wide ? kWide<S> : 1));
        const int64_t wanted = ceil_div(kFill, samples * tiles);
        plan.chunk = std::clamp<int64_t>(ceil_div(axes.rows, wanted), kWarps * kUnroll, kMaxRows);
        const int64_t chunks = ceil_div(axes.rows, plan.chunk);
        plan.tiles = static_cast<unsigned>(tiles);
        plan.chunks = static_cast<unsigned>(chunks);
        A* column_means = axes.rows_are_channels ? positions : channels;
        A* row_means = axes.rows_are_channels ? channels : positions;
        if (column_means) column_means += before * axes.columns;
        if (row_means) row_means += before * axes.rows;
        A* column_parts = scratch<A>(on, column_means ? samples * chunks * axes.columns : 0);
        A* row_parts = scratch<A>(on, row_means ? samples * tiles * axes.rows : 0);
        A* max_parts = scratch<A>(on, scale ? samples * chunks * tiles : 0);
        dispatch_mask(mask, [&](auto masked) {
          constexpr bool kMasked = decltype(masked)::value;
          launch(on,
                 axes.wide ? statistics_kernel<S, kWide<S>, kMasked>
                           : statistics_kernel<S, 1, kMasked>,
                 samples * chunks * tiles, tasks, plan, column_parts, row_parts, max_parts,
                 mask.valid);
        });
        const int64_t blocks = ceil_div(axes.columns + axes.rows, kThreads);
        launch(on, finish_kernel<A>, samples * blocks, plan, static_cast<unsigned>(blocks),
               column_parts, row_parts, max_parts, column_means, row_means,
               scale ? scale + before : nullptr, static_cast<const A*>(mask.counts));
      });
}

}  // namespace

bool channels_are_adjacent(const View& view, const Shape& shape) {
  const bool positions = view.has_single_stride() && view.stride[0] == 1 && shape.positions > 1;
  return view.channel == 1 && !positions;
}

std::string why_not() {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, finish_kernel<float>);
  if (error == cudaSuccess) return "";
  cudaGetLastError();  // otherwise a later call would report it
  return cudaGetErrorString(error);
}

Mask counted_mask(const Context& on, Type type, int64_t batch, int64_t positions,
                  const unsigned char* valid) {
  Mask mask{valid, nullptr};
  if (!valid) return mask;
  dispatch_accumulation(type, [&](auto example) {
    using A = decltype(example);
    A* counts = scratch<A>(on, batch);
    launch(on, count_kernel<A>, batch, valid, positions, counts);
    mask.counts = counts;
  });
  return mask;
}

void statistics(const Context& on, Type type, const Shape& shape, const View* views,
                const Mask& mask, void* positions, void* channels, void* scale) {
  dispatch(type, [&](auto example) {
    using A = acc_t<decltype(example)>;
    run<decltype(example)>(on, shape, views, mask, static_cast<A*>(positions),
                           static_cast<A*>(channels), static_cast<A*>(scale));
  });
}

}  // namespace repmtl::cuda
