// Number types, places of elements, reductions and launches, for all kernels.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "../common/numbers.h"
#include "kernels.h"

namespace repmtl::cuda {

using bfloat16 = __nv_bfloat16;
using float16 = __half;

template <typename S>
constexpr bool kIs16Bit = sizeof(S) == 2;

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(float16 x) { return __half2float(x); }

__device__ __forceinline__ void narrow(float x, float& to) { to = x; }
__device__ __forceinline__ void narrow(double x, double& to) { to = x; }
__device__ __forceinline__ void narrow(float x, bfloat16& to) { to = __float2bfloat16(x); }
__device__ __forceinline__ void narrow(float x, float16& to) { to = __float2half(x); }

// Calls f(S{}) for the type of saliencies.
template <typename F>
void dispatch(Type type, const F& f) {
  switch (type) {
    case Type::kDouble: return f(double{});
    case Type::kFloat: return f(float{});
    case Type::kBFloat16: return f(bfloat16{});
    case Type::kHalf: return f(float16{});
  }
}

// Calls f(A{}) for the type of accumulators.
template <typename F>
void dispatch_accumulation(Type type, const F& f) {
  if (type == Type::kDouble) return f(double{});
  f(float{});
}

constexpr int kWarp = 32;
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
// Without the number of blocks, ptxas spills a few registers of some kernels, to fit more blocks.
#define REPMTL_KERNEL __global__ void __launch_bounds__(kThreads, 1)

// The elements of one load of 16 bytes.
template <typename S>
constexpr int kWide = 16 / static_cast<int>(sizeof(S));

template <typename S, int kCount>
struct alignas(kCount * sizeof(S)) Pack {
  S x[kCount];
};

// Writes a pack to memory that is aligned as the pack. Otherwise the compiler stores 4
// bytes at a time.
template <typename S, int kCount>
__device__ __forceinline__ void store(const Pack<S, kCount>& pack, S* to) {
  if constexpr (sizeof pack == 16) {
    uint4 bits;
    memcpy(&bits, &pack, sizeof bits);
    __stwb(reinterpret_cast<uint4*>(to), bits);
  } else {
    *reinterpret_cast<Pack<S, kCount>*>(to) = pack;
  }
}

// Reads `kCount` adjacent accumulators. The address is a multiple of 16 bytes if kCount > 1.
template <int kCount, typename A>
__device__ __forceinline__ void load(const A* from, A (&to)[kCount]) {
  constexpr int kStep = kCount < kWide<A> ? kCount : kWide<A>;
#pragma unroll
  for (int i = 0; i < kCount; i += kStep) {
    const auto pack = *reinterpret_cast<const Pack<A, kStep>*>(from + i);
#pragma unroll
    for (int j = 0; j < kStep; ++j) to[i + j] = pack.x[j];
  }
}

// The blocks that fill a large GPU: eight for each multiprocessor.
constexpr int64_t kFill = 1056;

// The largest number of tasks of one launch.
constexpr int kTasks = 8;

struct Tasks {
  View views[kTasks];
};

__device__ __forceinline__ int64_t position_offset(const View& view, int64_t n) {
  if (view.size[0] == 1 && view.size[1] == 1) return n * view.stride[0];
  const int64_t row = n / view.size[1];
  return row / view.size[0] * view.stride[0] + row % view.size[0] * view.stride[1] +
         n % view.size[1] * view.stride[2];
}

// Saliencies of one task and sample as a matrix whose columns lie along memory, if either channels
// or positions do. Rows are channels and columns positions, or the reverse.
struct Axes {
  bool rows_are_channels;
  bool wide;  // columns may be read 16 bytes at a time
  int64_t rows, columns;
};

__device__ __forceinline__ int64_t row_offset(const View& view, const Axes& axes, int64_t row) {
  return axes.rows_are_channels ? row * view.channel : position_offset(view, row);
}
__device__ __forceinline__ int64_t column_offset(const View& view, const Axes& axes,
                                                 int64_t column) {
  return axes.rows_are_channels ? position_offset(view, column) : column * view.channel;
}

template <typename S>
Axes axes_of(const View& view, const Shape& shape, bool rows_are_channels) {
  Axes axes{};
  axes.rows_are_channels = rows_are_channels;
  axes.rows = axes.rows_are_channels ? shape.channels : shape.positions;
  axes.columns = axes.rows_are_channels ? shape.positions : shape.channels;
  const auto is_multiple = [](int64_t stride) { return stride % kWide<S> == 0; };
  const int64_t step = axes.rows_are_channels ? view.stride[0] : view.channel;
  const bool unit = step == 1 && (view.has_single_stride() || !axes.rows_are_channels);
  const bool rows = axes.rows_are_channels
                        ? is_multiple(view.channel)
                        : is_multiple(view.stride[0]) && is_multiple(view.stride[1]) &&
                              is_multiple(view.stride[2]);
  axes.wide = unit && rows && is_multiple(view.batch) && is_multiple(axes.columns) &&
              reinterpret_cast<std::uintptr_t>(view.data) % 16 == 0;
  return axes;
}

template <typename S>
Axes axes_of(const View& view, const Shape& shape) {
  return axes_of<S>(view, shape, !channels_are_adjacent(view, shape));
}

// Calls f(std::true_type{}) with a mask, and f(std::false_type{}) without one, so that loops
// without a mask don't pay for it.
template <typename F>
void dispatch_mask(const Mask& mask, const F& f) {
  if (mask.valid) return f(std::true_type{});
  f(std::false_type{});
}

// Returns bits: bit j says whether position j of `kVector` is present.
template <int kVector>
__device__ __forceinline__ unsigned present_bits(const unsigned char* valid) {
  unsigned bits = 0;
#pragma unroll
  for (int j = 0; j < kVector; ++j) bits |= (valid[j] ? 1u : 0u) << j;
  return bits;
}

// The same for elements (row, column + j) of a sample with the mask `valid` (N).
template <int kVector>
__device__ __forceinline__ unsigned present_bits(const unsigned char* valid, const Axes& axes,
                                                 int64_t row, int64_t column) {
  return axes.rows_are_channels ? present_bits<kVector>(valid + column) : valid[row] ? ~0u : 0u;
}

// Sets elements without a bit to 0, even NaN.
template <typename S, int kVector>
__device__ __forceinline__ void keep(Pack<S, kVector>& pack, unsigned bits) {
#pragma unroll
  for (int j = 0; j < kVector; ++j) {
    if (!(bits >> j & 1)) pack.x[j] = S{};
  }
}

__device__ __forceinline__ int64_t positions_of(const Axes& axes) {
  return axes.rows_are_channels ? axes.columns : axes.rows;
}

// Calls f(first, count, tasks, axes) for each run of tasks that one launch takes.
template <typename S, typename F>
void for_runs_of_tasks(const Shape& shape, const View* views, const F& f) {
  for (int64_t first = 0; first < shape.tasks;) {
    const Axes axes = axes_of<S>(views[first], shape);
    Tasks tasks{};
    int64_t count = 0;
    for (; count < kTasks && first + count < shape.tasks; ++count) {
      const View& view = views[first + count];
      const Axes other = axes_of<S>(view, shape);
      if (other.rows_are_channels != axes.rows_are_channels || other.wide != axes.wide) break;
      tasks.views[count] = view;
    }
    f(first, count, tasks, axes);
    first += count;
  }
}

// The maximum ignores NaN.
__device__ __forceinline__ float larger(float a, float b) { return fmaxf(a, b); }
__device__ __forceinline__ double larger(double a, double b) { return fmax(a, b); }
__device__ __forceinline__ float magnitude(float x) { return fabsf(x); }
__device__ __forceinline__ double magnitude(double x) { return fabs(x); }

template <typename A>
__device__ __forceinline__ A warp_sum(A x) {
  for (int i = kWarp / 2; i > 0; i /= 2) x += __shfl_xor_sync(~0u, x, i);
  return x;
}
template <typename A>
__device__ __forceinline__ A warp_max(A x) {
  for (int i = kWarp / 2; i > 0; i /= 2) x = larger(x, __shfl_xor_sync(~0u, x, i));
  return x;
}

// Reduces one value of each thread, and returns the result to all threads. `shared` (kWarps) may be
// used again afterwards.
template <typename A>
__device__ A block_sum(A x, A* shared) {
  x = warp_sum(x);
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = x;
  __syncthreads();
  A sum = 0;
  for (int i = 0; i < kWarps; ++i) sum += shared[i];
  __syncthreads();
  return sum;
}
template <typename A>
__device__ A block_max(A x, A* shared) {
  x = warp_max(x);
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = x;
  __syncthreads();
  A top = shared[0];
  for (int i = 1; i < kWarps; ++i) top = larger(top, shared[i]);
  __syncthreads();
  return top;
}

// Returns the sum of `count` values to all threads. The order of additions is fixed.
template <typename A>
__device__ A sum_of(const A* values, int64_t count, A* shared) {
  A sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) sum += values[i];
  return block_sum(sum, shared);
}

// Returns 2^e such that |largest| * 2^e is in [0.5, 1), or as near as normal numbers come. Returns
// 1 for 0, and the least power where `largest` is not finite.
__device__ __forceinline__ float power_of_two(float largest) {
  const int exponent = __float_as_int(largest) >> 23 & 255;
  return largest == 0 ? 1.0f : __int_as_float(min(max(253 - exponent, 1), 253) << 23);
}
__device__ __forceinline__ double power_of_two(double largest) {
  const long long exponent = __double_as_longlong(largest) >> 52 & 2047;
  return largest == 0 ? 1.0 : __longlong_as_double(min(max(2045 - exponent, 1ll), 2045ll) << 52);
}

inline void check(cudaError_t error) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("a CUDA kernel could not be launched: ") +
                             cudaGetErrorString(error));
  }
}

// Launches a kernel on blocks of kThreads threads, if there are any blocks.
template <typename... P, typename... X>
void launch(const Context& on, void (*kernel)(P...), int64_t blocks, X... arguments) {
  if (blocks == 0) return;
  if (blocks > 0x7fffffff)
    throw std::runtime_error("a CUDA kernel needs more than 2^31 - 1 blocks");
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kThreads);
  config.stream = static_cast<cudaStream_t>(on.stream);
  check(cudaLaunchKernelEx(&config, kernel, static_cast<P>(arguments)...));
}

template <typename A>
A* scratch(const Context& on, int64_t count) {
  return count == 0 ? nullptr : static_cast<A*>(on.workspace->take(count * sizeof(A)));
}

}  // namespace repmtl::cuda
