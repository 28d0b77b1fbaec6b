// Expectations and launches, for all files of the self-test.
#pragma once

#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <string>
#include <utility>

inline int failures = 0;

inline void expect(bool holds, const char* what, int line) {
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
inline Orders orders() {
  const char* text = std::getenv("CUDA_EMULATION_ORDER");
  const std::string order = text == nullptr ? "forward" : text;
  return order == "forward"   ? Orders::forward
         : order == "reverse" ? Orders::reverse
                              : Orders::random;
}

void test_numbers();  // in self_test_numbers.cpp
void test_deaths();   // in self_test_deaths.cpp
