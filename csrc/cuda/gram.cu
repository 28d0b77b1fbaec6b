// Stage `gram`.
#include <type_traits>

#include "tile.cuh"

namespace repmtl::cuda {
namespace {

constexpr int kDepth = 32;  // channels of one step

// Computes similarity, the inverse of its divisor, and slope, from `square`, the squared norm of
// the scaled Gram matrix, and `positive`, the similarity of scaled operands before the division.
template <typename A>
struct Finish {
  const A* scale;  // (T, B), like the outputs
  double eps;
  A *similarity, *inverse, *slope;

  __device__ void operator()(int64_t sample, A square, A positive) const {
    const Guarded<A> guarded = guarded_inverse(sqrt(square), scale[sample], eps);
    const A s = positive * guarded.inverse;
    similarity[sample] = s;
    inverse[sample] = guarded.inverse;
    slope[sample] = guarded.clamped ? A(0) : -s * guarded.inverse;
  }
};

template <typename A>
Finish<A> finish_of(const void* scale, double eps, const Similarities& out) {
  return {static_cast<const A*>(scale), eps, static_cast<A*>(out.similarity),
          static_cast<A*>(out.inverse), static_cast<A*>(out.slope)};
}

// A block for each task and sample: N <= 16 kTiles.
template <typename S, int kTiles, bool kMasked>
__global__ void __launch_bounds__(kThreads, std::is_same_v<S, double> ? 1 : 2)
    small_gram_kernel(const __grid_constant__ Tasks views, const __grid_constant__ Axes axes,
                      int64_t first, int64_t tasks, int64_t batch,
                      const acc_t<S>* u,  // (T, B, C)
                      acc_t<S> multiple, const __grid_constant__ Finish<acc_t<S>> finish,
                      acc_t<S>* projection,          // (T, B, T, N) or null
                      S* matrix,                     // (T, B, N, N) or null
                      const unsigned char* valid) {  // (B, N)
  using A = acc_t<S>;
  using Operand = std::conditional_t<kIs16Bit<S>, S, A>;
  constexpr int kSize = kSide * kTiles, kStride = kSize + 8;
  constexpr int kLoads = kDepth * kSize / kThreads;
  constexpr int kVectors = kThreads / kSize;  // anchors at a time
  constexpr int kPasses = (static_cast<int>(kSmallTasks) + kVectors - 1) / kVectors;
  __shared__ __align__(32) Operand panel[kDepth * kStride];
  __shared__ A anchors[kSmallTasks][kDepth];
  __shared__ A reduced[kWarps];
  const int64_t channels = axes.rows_are_channels ? axes.rows : axes.columns;
  const int64_t positions = axes.rows_are_channels ? axes.columns : axes.rows;
  const int64_t sample = first * batch + blockIdx.x, b = sample % batch;
  const View& view = views.views[blockIdx.x / batch];
  const S* base = static_cast<const S*>(view.data) + b * view.batch;
  const A scale = finish.scale[sample];

  // Neighbouring threads read neighbouring elements: channel c + i dc at position n + i dn.
  const int thread = threadIdx.x;
  const int c = axes.rows_are_channels ? thread / kSize : thread % kDepth;
  const int n = axes.rows_are_channels ? thread % kSize : thread / kDepth;
  const int dc = axes.rows_are_channels ? kThreads / kSize : 0;
  const int dn = axes.rows_are_channels ? 0 : kThreads / kDepth;
  unsigned bits = ~0u;  // bit i: whether position n + i dn is present
  if constexpr (kMasked) {
    bits = 0;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int m = n + i * dn;
      if (m < positions && valid[b * positions + m]) bits |= 1u << i;
    }
  }
  const auto load = [&](int64_t step, A(&x)[kLoads]) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int64_t channel = step + c + i * dc;
      x[i] = 0;
      if (n + i * dn < positions && channel < channels && (!kMasked || (bits >> i & 1))) {
        x[i] = widen(base[channel * view.channel + position_offset(view, n + i * dn)]) * scale;
      }
    }
  };

  Elements<A, kTiles, kTiles> g{};
  MatrixUnits<std::conditional_t<kIs16Bit<S>, S, float16>, kTiles, kTiles> units;
  if constexpr (kIs16Bit<S>) units.clear();
  A v[kPasses] = {};
  A x[kLoads];
  load(0, x);
  for (int64_t step = 0; step < channels; step += kDepth) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) narrow(x[i], panel[(c + i * dc) * kStride + n + i * dn]);
    for (int i = threadIdx.x; i < tasks * kDepth; i += kThreads) {
      const int64_t t = i / kDepth, k = step + i % kDepth;
      anchors[t][i % kDepth] = k < channels ? u[(t * batch + b) * channels + k] : A(0);
    }
    __syncthreads();
    if (step + kDepth < channels) load(step + kDepth, x);
    if constexpr (kIs16Bit<S>) {
      units.template multiply<kDepth, kStride, kStride>(panel, panel);
    } else {
      multiply<kDepth, kStride, kStride>(panel, panel, g);
    }
#pragma unroll
    for (int p = 0; p < kPasses; ++p) {
      const int t = p * kVectors + thread / kSize;
      if (t >= tasks) break;
      for (int k = 0; k < kDepth; ++k) {
        v[p] += anchors[t][k] * widen(panel[k * kStride + thread % kSize]);
      }
    }
    __syncthreads();
  }
  if constexpr (kIs16Bit<S>) {
    __shared__ __align__(32) float products[kSize * kStride];
    units.template elements<kStride>(products, g);
  }

  A square = 0, positive = 0;
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      const int64_t m = i * kSide + threadIdx.x / kSide, n = j * kSide + threadIdx.x % kSide;
      square += g.x[i][j] * g.x[i][j];
      if (matrix && m < positions && n < positions) {
        narrow(g.x[i][j] * multiple, matrix[(sample * positions + m) * positions + n]);
      }
    }
  }
#pragma unroll
  for (int p = 0; p < kPasses; ++p) {
    const int64_t t = p * kVectors + threadIdx.x / kSize, n = threadIdx.x % kSize;
    if (t >= tasks) break;
    positive += v[p] * v[p];
    if (projection && n < positions) projection[(sample * tasks + t) * positions + n] = v[p];
  }
  square = block_sum(square, reduced);
  positive = block_sum(positive, reduced);
  if (threadIdx.x == 0) finish(sample, square, positive);
}

// scale (B) or null, to (B, rows, columns). Grid: (sample, tile of rows and columns). Each thread
// copies a vector of elements.
template <typename S, int kVector, bool kMasked>
REPMTL_KERNEL scaled_copy_kernel(const __grid_constant__ View view,
                                 const __grid_constant__ Axes axes, unsigned blocks,
                                 const acc_t<S>* scale, S* to,
                                 const unsigned char* valid) {  // (B, N)
  const int64_t b = blockIdx.x / blocks;
  const int64_t i = (blockIdx.x % blocks * static_cast<int64_t>(kThreads) + threadIdx.x) * kVector;
  if (i >= axes.rows * axes.columns) return;
  const int64_t row = i / axes.columns, column = i % axes.columns;
  const S* from = static_cast<const S*>(view.data) + b * view.batch + row_offset(view, axes, row) +
                  column_offset(view, axes, column);
  Pack<S, kVector> pack = *reinterpret_cast<const Pack<S, kVector>*>(from);
  if constexpr (kMasked) {
    keep(pack, present_bits<kVector>(valid + b * positions_of(axes), axes, row, column));
  }
  if (!kMasked || scale) {
#pragma unroll
    for (int j = 0; j < kVector; ++j) narrow(widen(pack.x[j]) * scale[b], pack.x[j]);
  }
  store(pack, to + b * axes.rows * axes.columns + i);
}

// Grid: (sample, tile of rows, tile of columns). See gram_block.
template <typename S>
REPMTL_KERNEL gram_block_kernel(const acc_t<S>* block,  // (B, rows, columns)
                                int64_t side, int64_t first, int64_t rows, unsigned row_tiles,
                                unsigned column_tiles, acc_t<S> multiple,
                                S* matrix,          // (B, R, R) or null
                                acc_t<S>* squares,  // (B, parts), from the first part on
                                int64_t parts) {
  using A = acc_t<S>;
  constexpr int kTile = static_cast<int>(kGramTile);
  __shared__ A tile[kTile][kTile + 1];
  __shared__ A reduced[kWarps];
  const int64_t columns = first + rows;
  const int64_t b = blockIdx.x / column_tiles / row_tiles;
  const int64_t m0 = static_cast<int64_t>(blockIdx.x / column_tiles % row_tiles) * kTile;
  const int64_t n0 = static_cast<int64_t>(blockIdx.x % column_tiles) * kTile;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const bool has_image = n0 < first;
  if (matrix) matrix += b * side * side;
  A square = 0;
  for (int i = warp; i < kTile; i += kWarps) {
    const int64_t m = m0 + i, n = n0 + lane;
    A x = 0;
    if (m < rows && n < columns) {
      x = block[(b * rows + m) * columns + n];
      if (matrix) narrow(x * multiple, matrix[(first + m) * side + n]);
    }
    tile[i][lane] = x;
    square += x * x;
  }
  if (matrix && has_image) {
    __syncthreads();
    for (int i = warp; i < kTile; i += kWarps) {
      const int64_t m = m0 + lane, n = n0 + i;
      if (m < rows) narrow(tile[lane][i] * multiple, matrix[n * side + first + m]);
    }
  }
  square = block_sum(square, reduced);
  if (threadIdx.x == 0) {
    const int64_t part = blockIdx.x - b * row_tiles * column_tiles;
    squares[b * parts + part] = has_image ? 2 * square : square;
  }
}

// A block for each task and sample.
template <typename A>
REPMTL_KERNEL gram_finish_kernel(const A* squares,  // (T, B, parts)
                                 int64_t parts,
                                 const A* w,  // (T, B, length)
                                 int64_t length, const __grid_constant__ Finish<A> finish) {
  __shared__ A reduced[kWarps];
  const int64_t sample = blockIdx.x;
  const A square = sum_of(squares + sample * parts, parts, reduced);
  A positive = 0;
  for (int64_t i = threadIdx.x; i < length; i += kThreads) {
    positive += w[sample * length + i] * w[sample * length + i];
  }
  positive = block_sum(positive, reduced);
  if (threadIdx.x == 0) finish(sample, square, positive);
}

}  // namespace

void small_gram(const Context& on, Type type, const Shape& shape, const View* views,
                const Mask& mask, const void* scale, const void* u, double eps, double multiple,
                const Similarities& out, void* projection, void* matrix) {
  dispatch(type, [&](auto example) {
    using S = decltype(example);
    using A = acc_t<S>;
    dispatch_mask(mask, [&](auto masked) {
      constexpr bool kMasked = decltype(masked)::value;
      const auto kernel = shape.positions <= kSide ? small_gram_kernel<S, 1, kMasked>
                                                   : small_gram_kernel<S, 4, kMasked>;
      for_runs_of_tasks<S>(
          shape, views, [&](int64_t first, int64_t count, const Tasks& tasks, const Axes& axes) {
            launch(on, kernel, count * shape.batch, tasks, axes, first, shape.tasks, shape.batch,
                   static_cast<const A*>(u), static_cast<A>(multiple),
                   finish_of<A>(scale, eps, out), static_cast<A*>(projection),
                   static_cast<S*>(matrix), mask.valid);
          });
    });
  });
}

void scaled_copy(const Context& on, Type type, const Shape& shape, const View& view,
                 const Mask& mask, const void* scale, void* to) {
  dispatch(type, [&](auto example) {
    using S = decltype(example);
    const Axes axes = axes_of<S>(view, shape);
    const int64_t vector = axes.wide ? kWide<S> : 1;
    const int64_t blocks = ceil_div(axes.rows * axes.columns / vector, kThreads);
    dispatch_mask(mask, [&](auto masked) {
      constexpr bool kMasked = decltype(masked)::value;
      launch(
          on,
          axes.wide ? scaled_copy_kernel<S, kWide<S>, kMasked> : scaled_copy_kernel<S, 1, kMasked>,
          shape.batch * blocks, view, axes, static_cast<unsigned>(blocks),
          static_cast<const acc_t<S>*>(scale), static_cast<S*>(to), mask.valid);
    });
  });
}

int64_t gram_parts(int64_t rows, int64_t columns) {
  return ceil_div(rows, kGramTile) * ceil_div(columns, kGramTile);
}

void gram_block(const Context& on, Type type, int64_t batch, int64_t side, int64_t first,
                int64_t rows, const void* block, double multiple, void* matrix, void* squares,
                int64_t part, int64_t parts) {
  dispatch(type, [&](auto example) {
    using S = decltype(example);
    using A = acc_t<S>;
    const int64_t row_tiles = ceil_div(rows, kGramTile);
    const int64_t column_tiles = ceil_div(first + rows, kGramTile);
    launch(on, gram_block_kernel<S>, batch * row_tiles * column_tiles, static_cast<const A*>(block),
           side, first, rows, static_cast<unsigned>(row_tiles), static_cast<unsigned>(column_tiles),
           static_cast<A>(multiple), static_cast<S*>(matrix), static_cast<A*>(squares) + part,
           parts);
  });
}

void gram_finish(const Context& on, Type type, int64_t tasks, int64_t batch, const void* squares,
                 int64_t parts, const void* w, int64_t length, const void* scale, double eps,
                 const Similarities& out) {
  dispatch_accumulation(type, [&](auto example) {
    using A = decltype(example);
    launch(on, gram_finish_kernel<A>, tasks * batch, static_cast<const A*>(squares), parts,
           static_cast<const A*>(w), length, finish_of<A>(scale, eps, out));
  });
}

}  // namespace repmtl::cuda
