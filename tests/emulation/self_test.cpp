// Tests of the emulation itself. Returns 0, or prints what failed. `self_test time` also measures.
#include "self_test.h"

#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <mma.h>

#include <chrono>
#include <functional>
#include <string>
#include <thread>
#include <vector>

namespace {

namespace wmma = nvcuda::wmma;

// Indices -------------------------------------------------------------------------------------

__global__ void indices_kernel(int* out) {
  const size_t block = blockIdx.x + gridDim.x * (blockIdx.y + size_t(gridDim.y) * blockIdx.z);
  out[block * (blockDim.x * blockDim.y * blockDim.z) + linear_thread()] += 1 + linear_thread();
}

void test_indices() {
  const dim3 grid(3, 4, 5), block(7, 5, 3);
  const int threads = 7 * 5 * 3, blocks = 3 * 4 * 5;
  std::vector<int> out(threads * blocks, 0);
  EXPECT(launch(grid, block, indices_kernel, out.data()) == cudaSuccess);
  for (int i = 0; i < threads * blocks; ++i) EXPECT(out[i] == 1 + i % threads);
}

// Barriers ------------------------------------------------------------------------------------

// Every thread reads the values that all others wrote in the step before.
template <int size>
__global__ void __launch_bounds__(size) sums_kernel(int* out, int steps) {
  __shared__ int values[2][size];
  const int t = threadIdx.x, n = blockDim.x;
  values[0][t] = t + blockIdx.x;
  __syncthreads();
  for (int step = 0; step < steps; ++step) {
    int sum = 0;
    for (int i = 0; i < n; ++i) sum += values[step & 1][i] % 1000;
    values[~step & 1][t] = sum + t;
    __syncthreads();
  }
  out[blockIdx.x * n + t] = values[steps & 1][(t + 1) % n];
}

void test_barriers() {
  for (const int n : {1, 31, 32, 33, 100, 256}) {
    const int blocks = 3, steps = 3;
    std::vector<int> out(n * blocks);
    EXPECT(launch(blocks, n, sums_kernel<256>, out.data(), steps) == cudaSuccess);
    for (int b = 0; b < blocks; ++b) {
      std::vector<int> values(n);
      for (int t = 0; t < n; ++t) values[t] = t + b;
      for (int step = 0; step < steps; ++step) {
        int sum = 0;
        for (const int value : values) sum += value % 1000;
        for (int t = 0; t < n; ++t) values[t] = sum + t;
      }
      for (int t = 0; t < n; ++t) EXPECT(out[b * n + t] == values[(t + 1) % n]);
    }
  }
}

// A thread returns after as many barriers as its index says.
__global__ void early_return_kernel(int* out) {
  __shared__ int steps;
  const int t = threadIdx.x, n = blockDim.x;
  if (t == n - 1) steps = 0;
  __syncthreads();
  for (int i = 0; i < t; ++i) {
    if (t == n - 1) ++steps;
    __syncthreads();
    out[t] += steps == i + 1;
    __syncthreads();
  }
}

void test_early_return() {
  for (const int n : {1, 32, 75}) {
    std::vector<int> out(n);
    EXPECT(launch(1, n, early_return_kernel, out.data()) == cudaSuccess);
    for (int t = 0; t < n; ++t) EXPECT(out[t] == t);
  }
}

// Order and shared memory ---------------------------------------------------------------------

__global__ void order_kernel(int* out, int* count) {
  __shared__ int arrivals;
  if (threadIdx.x == 0) arrivals = 0;
  __syncthreads();
  const int first = arrivals++;
  __syncthreads();
  const int second = arrivals++;
  int* const mine = out + 3 * (blockIdx.x * blockDim.x + threadIdx.x);
  mine[0] = first;
  mine[1] = second - blockDim.x;
  mine[2] = (*count)++ / blockDim.x;  // blocks before this one
}

void test_order() {
  const int n = 64, blocks = 50;
  std::vector<int> out(3 * n * blocks);
  int count = 0;
  EXPECT(launch(blocks, n, order_kernel, out.data(), &count) == cudaSuccess);
  int forward[3] = {}, reverse[3] = {}, same = 0;
  for (int b = 0; b < blocks; ++b) {
    for (int t = 0; t < n; ++t) {
      const int* mine = out.data() + 3 * (b * n + t);
      for (int i = 0; i < 3; ++i) {
        const int size = i == 2 ? blocks : n, index = i == 2 ? b : t;
        forward[i] += mine[i] == index;
        reverse[i] += mine[i] == size - 1 - index;
      }
      same += mine[0] == mine[1];
    }
  }
  for (int i = 0; i < 3; ++i) {
    EXPECT((forward[i] == n * blocks) == (orders() == Orders::forward));
    EXPECT((reverse[i] == n * blocks) == (orders() == Orders::reverse));
  }
  EXPECT((same == n * blocks) == (orders() != Orders::random));  // drawn anew at a barrier
}

template <typename T>
__global__ void stale_kernel(int* fresh, int step) {
  __shared__ __align__(32) T values[100];
  __shared__ T value;
  unsigned char bytes[sizeof(T)];
  int poisoned = 0;
  for (const T& v : values) {
    std::memcpy(bytes, &v, sizeof(T));
    for (const unsigned char byte : bytes) poisoned += byte == 0xFF;
  }
  std::memcpy(bytes, &value, sizeof(T));
  for (const unsigned char byte : bytes) poisoned += byte == 0xFF;
  fresh[blockIdx.x] = poisoned == 101 * sizeof(T) && reinterpret_cast<uintptr_t>(values) % 32 == 0;
  value = T(blockIdx.x);
  for (int i = 0; i < 100; i += step) values[i] = T(1);
}

void test_poison() {
#ifdef CUDA_EMULATION_POISON
  const int blocks = 40;
  for (const int step : {1, 7, 99}) {
    std::vector<int> fresh(2 * blocks);
    EXPECT(launch(blocks, 1, stale_kernel<float>, fresh.data(), step) == cudaSuccess);
    EXPECT(launch(blocks, 1, stale_kernel<double>, fresh.data() + blocks, step) == cudaSuccess);
    for (const int f : fresh) EXPECT(f);
  }
#endif
}

// Warps ---------------------------------------------------------------------------------------

template <typename T>
struct Shuffled {
  T from, xored, down, up, half;
};

// The threads from `live` on return first.
template <typename T>
__global__ void shuffle_kernel(Shuffled<T>* out, T scale, int live) {
  const int t = linear_thread();
  if (t >= live) return;
  const T mine = scale * T(t + 1);
  out[t].from = __shfl_sync(0xFFFFFFFFu, mine, 3);
  out[t].xored = __shfl_xor_sync(0xFFFFFFFFu, mine, 5);
  out[t].down = __shfl_down_sync(0xFFFFFFFFu, mine, 2);
  out[t].up = __shfl_up_sync(0xFFFFFFFFu, mine, 4);
  out[t].half = __shfl_down_sync(0xFFFFFFFFu, mine, 6, 16);
}

template <typename T>
void test_shuffles(T scale) {
  T missing;
  std::memset(&missing, 0xFF, sizeof(T));
  const auto same = [](T a, T b) { return std::memcmp(&a, &b, sizeof(T)) == 0; };
  for (const int threads : {1, 20, 32, 70, 96}) {
    for (const int live : {threads, threads - threads / 4}) {
      std::vector<Shuffled<T>> out(threads);
      const dim3 block(1, threads);
      EXPECT(launch(2, block, shuffle_kernel<T>, out.data(), scale, live) == cudaSuccess);
      for (int t = 0; t < live; ++t) {
        const int lane = t % 32, first = t - lane;
        const auto of = [&](int lane) {
          return first + lane < live ? scale * T(first + lane + 1) : missing;
        };
        EXPECT(same(out[t].from, of(3)));
        EXPECT(same(out[t].xored, of(lane ^ 5)));
        EXPECT(same(out[t].down, of(lane + 2 < 32 ? lane + 2 : lane)));
        EXPECT(same(out[t].up, of(lane >= 4 ? lane - 4 : lane)));
        EXPECT(same(out[t].half, of(lane % 16 + 6 < 16 ? lane + 6 : lane)));
      }
    }
  }
}

__global__ void vote_kernel(unsigned* out, int live) {
  const int t = threadIdx.x;
  if (t >= live) return;
  out[4 * t] = __ballot_sync(~0u, t % 3 == 0);
  out[4 * t + 1] = __any_sync(~0u, t == 1);
  out[4 * t + 2] = __all_sync(~0u, t < 32);
  __shared__ int order[64];
  order[t] = t;
  __syncwarp();
  out[4 * t + 3] = order[t ^ 1];
}

void test_votes() {
  for (const int live : {64, 40}) {
    std::vector<unsigned> out(4 * 64);
    EXPECT(launch(1, 64, vote_kernel, out.data(), live) == cudaSuccess);
    for (int t = 0; t < live; ++t) {
      const int first = t & ~31;
      unsigned ballot = 0;
      for (int i = 0; i < 32 && first + i < live; ++i) {
        ballot |= unsigned((first + i) % 3 == 0) << i;
      }
      EXPECT(out[4 * t] == ballot);
      EXPECT(out[4 * t + 1] == (first == 0));
      EXPECT(out[4 * t + 2] == (first == 0));
      EXPECT(out[4 * t + 3] == unsigned(t ^ 1));
    }
  }
}

// Host ----------------------------------------------------------------------------------------

__global__ void nothing_kernel() {}

struct Big {
  int values[100];
};
__global__ void argument_kernel(Big big, long long scale, const float* null, int* out) {
  big.values[threadIdx.x] *= static_cast<int>(scale);  // a copy of this thread
  int sum = 0;
  for (const int value : big.values) sum += value;
  out[threadIdx.x] = null == nullptr ? sum : 0;
}

void test_launches() {
  EXPECT(launch(1, 1024, nothing_kernel) == cudaSuccess);
  EXPECT(launch(dim3(1, 2, 65535), 1, nothing_kernel) == cudaSuccess);
  for (const dim3 grid :
       {dim3(0), dim3(1, 0), dim3(1, 1, 0), dim3(1, 65536), dim3(1, 1, 65536), dim3(0x80000000u)}) {
    EXPECT(launch(grid, 1, nothing_kernel) == cudaErrorInvalidConfiguration);
  }
  for (const dim3 block : {dim3(0), dim3(1, 0), dim3(1, 1, 0), dim3(1025), dim3(32, 33),
                           dim3(1, 1, 65), dim3(1u << 31, 2)}) {
    EXPECT(launch(1, block, nothing_kernel) == cudaErrorInvalidConfiguration);
  }
  EXPECT(launch(1, 1, nothing_kernel) == cudaSuccess);  // does not hide the error before
  EXPECT(cudaGetLastError() == cudaErrorInvalidConfiguration);
  EXPECT(cudaGetLastError() == cudaSuccess);
  EXPECT(std::string(cudaGetErrorString(cudaSuccess)) == "no error");

  Big big;
  for (int& value : big.values) value = 1;
  int out[100];
  EXPECT(launch(1, 100, argument_kernel, big, 3, nullptr, out) == cudaSuccess);
  for (const int value : out) EXPECT(value == 102);
  EXPECT(cudaMemsetAsync(out, 0, sizeof(out), nullptr) == cudaSuccess && out[99] == 0);
}

const char* only_three(const void* kernel, const uint3* grid, const uint3* block,
                       const void* const* arguments) {
  const bool right = kernel == reinterpret_cast<const void*>(&argument_kernel) && grid->y == 2 &&
                     block->x == 100 && static_cast<const Big*>(arguments[0])->values[3] == 7;
  EXPECT(right && arguments[4] == nullptr);
  return *static_cast<const long long*>(arguments[1]) == 3 ? nullptr : "not 3";
}

void test_another_runner() {
  Big big;
  big.values[3] = 7;
  int out[100] = {5};
  cuda_emulation_runner = only_three;
  EXPECT(launch(dim3(1, 2), 100, argument_kernel, big, 3, nullptr, out) == cudaSuccess);
  EXPECT(out[0] == 5 && cudaGetLastError() == cudaSuccess);
  const cudaError_t error = launch(dim3(1, 2), 100, argument_kernel, big, 4, nullptr, out);
  EXPECT(error == cudaErrorLaunchFailure && cudaGetLastError() == error);
  EXPECT(std::string(cudaGetErrorString(error)) == "not 3");
  EXPECT(launch(0, 1, nothing_kernel) == cudaErrorInvalidConfiguration);
  EXPECT(cudaGetLastError() == cudaErrorInvalidConfiguration);
  cuda_emulation_runner = nullptr;
}

void test_threads_of_the_system() {
  std::vector<std::vector<int>> outs(3, std::vector<int>(300));
  std::vector<std::thread> threads;
  for (auto& out : outs) {
    threads.emplace_back([&out] {
      for (int i = 0; i < 20; ++i) {
        launch(3, 100, sums_kernel<100>, out.data(), 5);
        launch(0, 1, nothing_kernel);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT(outs[0] == outs[1] && outs[0] == outs[2]);
  EXPECT(cudaGetLastError() == cudaSuccess);  // theirs, not of this thread
}

// Speed ---------------------------------------------------------------------------------------

__global__ void barriers_kernel(int count, float* out) {
  __shared__ float values[256];
  for (int i = 0; i < count; ++i) {
    values[threadIdx.x] = i;
    __syncthreads();
  }
  out[threadIdx.x] = values[threadIdx.x ^ 1];
}

__global__ void warp_sum_kernel(float* out) {
  float sum = threadIdx.x;
  for (int i = 16; i > 0; i /= 2) sum += __shfl_xor_sync(~0u, sum, i);
  out[threadIdx.x] = sum;
}

__global__ void products_kernel(const __half* a, float* c, int count) {
  wmma::fragment<wmma::matrix_a, 16, 16, 16, __half, wmma::row_major> left;
  wmma::fragment<wmma::matrix_b, 16, 16, 16, __half, wmma::row_major> right;
  wmma::fragment<wmma::accumulator, 16, 16, 16, float> sum;
  wmma::fill_fragment(sum, 0.0f);
  for (int i = 0; i < count; ++i) {
    wmma::load_matrix_sync(left, a, 16);
    wmma::load_matrix_sync(right, a, 16);
    wmma::mma_sync(sum, left, right, sum);
  }
  wmma::store_matrix_sync(c, sum, 16, wmma::mem_row_major);
}

void measure(const char* what, const std::function<void()>& run) {
  run();
  const auto start = std::chrono::steady_clock::now();
  run();
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  std::printf("%s: %.1f ms\n", what, seconds.count() * 1e3);
}

void measure_all() {
  alignas(32) static float out[1024];
  alignas(32) static __half tile[256];
  measure("1000 blocks of 256 threads, no barrier",
          [] { launch(1000, 256, barriers_kernel, 0, out); });
  measure("1000 blocks of 256 threads, 4 barriers",
          [] { launch(1000, 256, barriers_kernel, 4, out); });
  measure("1000 blocks of 256 threads, 5 shuffles",
          [] { launch(1000, 256, warp_sum_kernel, out); });
  measure("1000 blocks of 32 threads, 10 products of tiles",
          [] { launch(1000, 32, products_kernel, tile, out, 10); });
}

}  // namespace

int main(int count, char** arguments) {
  test_indices();
  test_barriers();
  test_early_return();
  test_order();
  test_poison();
  test_shuffles<float>(0.5f);
  test_shuffles<double>(0.1);
  test_shuffles<int>(-3);
  test_shuffles<unsigned>(3000000000u);
  test_shuffles<int64_t>(-5000000000);
  test_votes();
  test_numbers();
  test_launches();
  test_another_runner();
  test_threads_of_the_system();
  if (count > 1 && std::string(arguments[1]) == "time") measure_all();
  test_deaths();
  std::printf(failures == 0 ? "all passed\n" : "%d failed\n", failures);
  return failures == 0 ? 0 : 1;
}
