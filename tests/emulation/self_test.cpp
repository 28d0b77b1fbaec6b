// Tests of the emulation itself. Returns 0, or prints what failed. `self_test time` also measures.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <mma.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <vector>

namespace {

int failures = 0;

void expect(bool holds, const char* what, int line) {
  if (holds) return;
  ++failures;
  std::printf("line %d: %s\n", line, what);
}
#define EXPECT(...) expect((__VA_ARGS__), #__VA_ARGS__, __LINE__)

template <typename... Parameters, typename... Arguments>
cudaError_t launch(dim3 grid, dim3 block, void (*kernel)(Parameters...), Arguments&&... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  return cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
}

__host__ __device__ inline int linear_thread() {
  return static_cast<int>(threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z));
}

enum class Orders { forward, reverse, random };
Orders orders() {
  const char* text = std::getenv("CUDA_EMULATION_ORDER");
  const std::string order = text == nullptr ? "forward" : text;
  return order == "forward"   ? Orders::forward
         : order == "reverse" ? Orders::reverse
                              : Orders::random;
}

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

// Every thread reads what all others wrote in the step before.
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
  mine[2] = (*count)++ / blockDim.x;  // of blocks
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

// Matrices ------------------------------------------------------------------------------------

namespace wmma = nvcuda::wmma;

// c = 3 a b, a tile for each warp. The first product is doubled in shared memory.
template <typename T, typename Memory, int k, typename A, typename B>
__global__ void product_kernel(const Memory* a, const Memory* b, float* c, unsigned ld,
                               wmma::layout_t layout) {
  __shared__ __align__(32) float staged[2][16 * 24];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  wmma::fragment<wmma::matrix_a, 16, 16, k, T, A> left;
  wmma::fragment<wmma::matrix_b, 16, 16, k, T, B> right;
  wmma::fragment<wmma::accumulator, 16, 16, k, float> sum, twice;
  wmma::fill_fragment(sum, 0.0f);
  wmma::load_matrix_sync(left, a + warp * 1024, ld);
  wmma::load_matrix_sync(right, b, ld);
  wmma::mma_sync(sum, left, right, sum);
  wmma::store_matrix_sync(staged[warp], sum, 24, layout);
  __syncwarp();
  for (int i = lane; i < 16 * 24; i += 32) staged[warp][i] *= 2;
  __syncwarp();
  wmma::load_matrix_sync(twice, staged[warp], 24, layout);
  wmma::mma_sync(twice, left, right, twice);
  wmma::store_matrix_sync(c + warp * 1024, twice, 32, layout);
}

template <typename T, typename Memory, int k, typename A, typename B>
void test_product() {
  const unsigned ld = 40;
  alignas(32) static Memory a[2048], b[1024];
  alignas(32) static float c[2048];
  std::mt19937 random(1);
  for (Memory& x : a) x = Memory(float(random() % 64) / 16 - 2);
  for (Memory& x : b) x = Memory(float(random() % 64) / 16 - 2);
  const auto at = [](const Memory* p, bool by_rows, int row, int column) {
    return static_cast<float>(p[by_rows ? row * ld + column : column * ld + row]);
  };
  for (const bool by_rows : {true, false}) {
    EXPECT(launch(1, 64, product_kernel<T, Memory, k, A, B>, a, b, c, ld,
                  by_rows ? wmma::mem_row_major : wmma::mem_col_major) == cudaSuccess);
    for (int i = 0; i < 2 * 16 * 16; ++i) {
      const int warp = i / 256, row = i / 16 % 16, column = i % 16;
      float sum = 0;  // exact
      for (int q = 0; q < k; ++q) {
        sum += at(a + warp * 1024, std::is_same_v<A, wmma::row_major>, row, q) *
               at(b, std::is_same_v<B, wmma::row_major>, q, column);
      }
      EXPECT(c[warp * 1024 + (by_rows ? row * 32 + column : column * 32 + row)] == 3 * sum);
    }
  }
}

template <typename T, typename Memory, int k>
void test_products() {
  test_product<T, Memory, k, wmma::row_major, wmma::row_major>();
  test_product<T, Memory, k, wmma::row_major, wmma::col_major>();
  test_product<T, Memory, k, wmma::col_major, wmma::row_major>();
  test_product<T, Memory, k, wmma::col_major, wmma::col_major>();
}

// Numbers -------------------------------------------------------------------------------------

float half_value(unsigned bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const float sign = bits & 0x8000 ? -1 : 1;
  if (exponent == 31) return mantissa ? NAN : sign * INFINITY;
  return sign * (exponent == 0 ? ldexpf(mantissa, -24) : ldexpf(1024 + mantissa, exponent - 25));
}

// The nearest of all 16-bit values, by search: even bits win a tie.
template <typename F>
unsigned nearest(float x, unsigned infinity, const F& value) {
  unsigned low = 0, high = infinity;  // ascending in the bits
  const double magnitude = fabs(static_cast<double>(x));
  while (high - low > 1) {
    const unsigned middle = (low + high) / 2;
    (value(middle) <= magnitude ? low : high) = middle;
  }
  // What follows the largest number would be a step further; from there on it is infinity.
  const double below = value(low);
  const double above = high == infinity ? 2 * below - value(low - 1) : value(high);
  const double down = magnitude - below, up = above - magnitude;
  const bool rounds_up = isinf(x) || up < down || (up == down && low % 2 == 1);
  return (rounds_up ? high : low) | (std::signbit(x) ? 0x8000 : 0);
}

void test_conversions() {
  const auto bfloat_value = [](unsigned bits) { return __uint_as_float(bits << 16); };
  for (unsigned bits = 0; bits < 65536; ++bits) {
    const float half = __half2float(__ushort_as_half(bits));
    const float bfloat = __bfloat162float(__ushort_as_bfloat16(bits));
    if (isnan(half_value(bits))) {
      EXPECT(isnan(half) && isnan(__half2float(__float2half(half))));
    } else {
      EXPECT(half == half_value(bits) && std::signbit(half) == bits >> 15);
      EXPECT(__half_as_ushort(__float2half(half)) == bits);
    }
    if ((bits & 0x7FFF) > 0x7F80) {
      EXPECT(isnan(bfloat) && isnan(__bfloat162float(__float2bfloat16(bfloat))));
    } else {
      EXPECT(bfloat == bfloat_value(bits));
      EXPECT(__bfloat16_as_ushort(__float2bfloat16(bfloat)) == bits);
    }
  }
  const auto check = [&](float x) {
    if (isnan(x)) {
      EXPECT(isnan(__half2float(__float2half(x))));
      EXPECT(isnan(__bfloat162float(__float2bfloat16(x))));
      return;
    }
    EXPECT(__half_as_ushort(__float2half(x)) == nearest(x, 0x7C00, half_value));
    EXPECT(__bfloat16_as_ushort(__float2bfloat16(x)) == nearest(x, 0x7F80, bfloat_value));
  };
  std::mt19937 random(2);
  for (int i = 0; i < 200000; ++i) {
    const unsigned bits = random();
    check(__uint_as_float(bits));
    // In the range of half, where many lie on or beside a tie.
    const int exponent = 100 + static_cast<int>(random() % 45);
    const unsigned tie = (bits & 0x807FE000) + 0x1000 + random() % 3 - 1;
    check(__uint_as_float((tie & 0x807FFFFF) | exponent << 23));
    check(__uint_as_float((bits & 0xFFFF0000) + 0x8000 + random() % 3 - 1));
  }
  for (const float x : {0.0f, -0.0f, 65504.0f, 65519.99f, 65520.0f, -65520.0f, INFINITY, -INFINITY,
                        NAN, 0x1p-24f, 0x1p-25f, 0x1.8p-25f, 0x1p-14f, 0x1.ffcp-15f, 0x1.ffep-15f,
                        1e-45f, std::numeric_limits<float>::max()}) {
    check(x);
  }
  const float2 h = __half22float2(__floats2half2_rn(1.5f, -2));
  const float2 b = __bfloat1622float2(__floats2bfloat162_rn(1.5f, -2));
  EXPECT(h.x == 1.5f && h.y == -2 && b.x == 1.5f && b.y == -2);
  EXPECT(sizeof(__half) == 2 && sizeof(__nv_bfloat162) == 4 && alignof(__half2) == 4);

  const float one = 1, step = 0x1p-10f;
  EXPECT(wmma::__float_to_tf32(one + step / 2) == one + step);  // a tie goes away from zero
  EXPECT(wmma::__float_to_tf32(-one - step / 2) == -one - step);
  EXPECT(wmma::__float_to_tf32(one + step * 0.4999f) == one);
  EXPECT(wmma::__float_to_tf32(-INFINITY) == -INFINITY && isnan(wmma::__float_to_tf32(NAN)));
}

void test_arithmetic() {
  EXPECT(min(3, 4) == 3 && max(int64_t(3), int64_t(4)) == 4 && min(3.0f, 4.0f) == 3);
  EXPECT(max(NAN, 1.0f) == 1 && min(2.0, 1.0) == 1 && max(1u, 2) == 2u && min(1.0, 2.0f) == 1);
  static_assert(std::is_same_v<decltype(exp(1.0f)), float>);
  static_assert(std::is_same_v<decltype(sqrt(1.0f)), float>);
  static_assert(std::is_same_v<decltype(fabs(1.0f)), float>);
  static_assert(std::is_same_v<decltype(ldexp(1.0f, 2)), float>);
  static_assert(std::is_same_v<decltype(exp(1.0)), double>);
  EXPECT(fabsf(__expf(3.0f) / expf(3.0f) - 1) < 1e-6f && fabsf(__logf(3.0f) - logf(3.0f)) < 1e-6f);
  EXPECT(rsqrtf(4.0f) == 0.5f && rsqrt(4.0) == 0.5 && scalbn(1.0f, 3) == 8 && isfinite(1.0));
  int exponent;
  EXPECT(frexp(12.0f, &exponent) == 0.75f && exponent == 4);
  EXPECT(__int_as_float(__float_as_int(1.5f)) == 1.5f && __float_as_uint(-0.0f) == 0x80000000u);
  EXPECT(__longlong_as_double(__double_as_longlong(-2.5)) == -2.5);
  const float value = 3;
  EXPECT(__ldg(&value) == 3 && alignof(float4) == 16 && make_uint4(1, 2, 3, 4).w == 4);
  EXPECT(alignof(float2) == 8 && alignof(double2) == 16 && make_int2(1, 2).y == 2);
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
  for (const dim3 grid : {dim3(0), dim3(1, 0), dim3(1, 1, 0), dim3(1, 65536), dim3(1, 1, 65536),
                          dim3(0x80000000u)}) {
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

// What has to end the process -----------------------------------------------------------------

__global__ void wait_for_ever_kernel() {
  if (blockIdx.x == 1 && threadIdx.x < 5) {
    __syncwarp();
  } else {
    __syncthreads();
  }
}

__global__ void two_places_kernel() {
  if (threadIdx.x == 3) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void part_of_warp_kernel() {
  if (threadIdx.x < 16) __syncwarp(0xFFFFu);
}

__global__ void tile_kernel(float* p, unsigned ld, int lanes, int shift) {
  if (static_cast<int>(threadIdx.x) >= lanes) return;
  wmma::fragment<wmma::accumulator, 16, 16, 16, float> tile;
  wmma::load_matrix_sync(tile, p + shift * threadIdx.x, ld, wmma::mem_row_major);
}

__global__ void empty_fragment_kernel(float* p) {
  wmma::fragment<wmma::accumulator, 16, 16, 16, float> tile;
  wmma::store_matrix_sync(p, tile, 16, wmma::mem_row_major);
}

void expect_death(const std::function<void()>& run, const char* message, int line) {
  int ends[2];
  std::fflush(stdout);
  if (pipe(ends) != 0) std::abort();
  const pid_t child = fork();
  if (child == 0) {
    dup2(ends[1], 2);
    run();
    _exit(0);
  }
  close(ends[1]);
  std::string text;
  char buffer[512];
  for (ssize_t n; (n = read(ends[0], buffer, sizeof(buffer))) > 0;) text.append(buffer, n);
  close(ends[0]);
  int status;
  waitpid(child, &status, 0);
  if (WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT &&
      text.find(message) != std::string::npos) {
    return;
  }
  ++failures;
  std::printf("line %d: no abort with \"%s\", but: %s\n", line, message, text.c_str());
}
#define EXPECT_DEATH(message, ...) expect_death([&] { __VA_ARGS__; }, message, __LINE__)

void test_deaths() {
  alignas(32) static float tiles[2048];
  EXPECT_DEATH("block (1, 0, 0) of grid (2, 1, 1), 64x1x1 threads: deadlock",
               launch(2, 64, wait_for_ever_kernel));
  EXPECT_DEATH("threads 0 to 31: 5 wait at __syncwarp", launch(2, 64, wait_for_ever_kernel));
  EXPECT_DEATH("threads 0 to 63: 59 wait at __syncthreads", launch(2, 64, wait_for_ever_kernel));
  EXPECT_DEATH("waits at another barrier than other threads", launch(1, 64, two_places_kernel));
  EXPECT_DEATH("only masks of the whole warp", launch(1, 32, part_of_warp_kernel));
  EXPECT_DEATH("not aligned to 32 bytes", launch(1, 32, tile_kernel, tiles + 4, 16, 32, 0));
  EXPECT_DEATH("not a multiple of 16 bytes", launch(1, 32, tile_kernel, tiles, 18, 32, 0));
  EXPECT_DEATH("the warp lacks lanes", launch(1, 32, tile_kernel, tiles, 16, 31, 0));
  EXPECT_DEATH("the lanes give different tiles", launch(1, 32, tile_kernel, tiles, 16, 32, 8));
  EXPECT_DEATH("the fragment has no values", launch(1, 32, empty_fragment_kernel, tiles));
  setenv("CUDA_EMULATION_ORDER", "backwards", 1);
  EXPECT_DEATH("not \"backwards\"", launch(1, 1, nothing_kernel));
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
  test_products<__half, __half, 16>();
  test_products<__nv_bfloat16, __nv_bfloat16, 16>();
  test_products<wmma::precision::tf32, float, 8>();
  test_conversions();
  test_arithmetic();
  test_launches();
  test_threads_of_the_system();
  if (count > 1 && std::string(arguments[1]) == "time") measure_all();
  test_deaths();
  std::printf(failures == 0 ? "all passed\n" : "%d failed\n", failures);
  return failures == 0 ? 0 : 1;
}
