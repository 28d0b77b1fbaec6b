// Stands in for CUDA's header of this name, so that kernels run on the CPU.
#pragma once

#include <math.h>
#include <stdlib.h>

#include <cstring>
#include <type_traits>
#include <utility>

#include "emulation.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ __inline__ __attribute__((always_inline))
#define __shared__ CUDA_EMULATION_SHARED
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))

// Vectors and indices -------------------------------------------------------------------------

#define CUDA_EMULATION_VECTOR2(name, type) \
  struct alignas(2 * sizeof(type)) name {  \
    type x, y;                             \
  };                                       \
  inline name make_##name(type x, type y) { return name{x, y}; }
#define CUDA_EMULATION_VECTOR4(name, type) \
  struct alignas(4 * sizeof(type)) name {  \
    type x, y, z, w;                       \
  };                                       \
  inline name make_##name(type x, type y, type z, type w) { return name{x, y, z, w}; }

CUDA_EMULATION_VECTOR2(int2, int)
CUDA_EMULATION_VECTOR2(uint2, unsigned int)
CUDA_EMULATION_VECTOR2(float2, float)
CUDA_EMULATION_VECTOR2(double2, double)
CUDA_EMULATION_VECTOR4(int4, int)
CUDA_EMULATION_VECTOR4(uint4, unsigned int)
CUDA_EMULATION_VECTOR4(float4, float)
#undef CUDA_EMULATION_VECTOR2
#undef CUDA_EMULATION_VECTOR4

inline uint3 make_uint3(unsigned int x, unsigned int y, unsigned int z) { return uint3{x, y, z}; }

struct dim3 {
  unsigned int x, y, z;
  constexpr dim3(unsigned int vx = 1, unsigned int vy = 1, unsigned int vz = 1)
      : x(vx), y(vy), z(vz) {}
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
  constexpr operator uint3() const { return uint3{x, y, z}; }
};

inline constexpr const uint3& threadIdx = cuda_emulation::state.thread_index;
inline constexpr const uint3& blockIdx = cuda_emulation::state.block_index;
inline constexpr const uint3& blockDim = cuda_emulation::state.block_dim;
inline constexpr const uint3& gridDim = cuda_emulation::state.grid_dim;
inline constexpr int warpSize = cuda_emulation::kWarp;

// Host ----------------------------------------------------------------------------------------

enum cudaError {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719,
  cudaErrorNotSupported = 801,
};
typedef cudaError cudaError_t;
typedef struct CUstream_st* cudaStream_t;
struct cudaLaunchAttribute;

struct cudaLaunchConfig_t {
  dim3 gridDim;
  dim3 blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned int numAttrs;
};

// Where it is set, launches go to this function instead of the emulation. It gets the addresses of
// a kernel's arguments, and returns why the launch failed, or null.
extern "C" {
typedef const char* (*CudaEmulationRunner)(const void* kernel, const uint3* grid,
                                           const uint3* block, const void* const* arguments);
inline CudaEmulationRunner cuda_emulation_runner = nullptr;
}

namespace cuda_emulation {
inline const char* launch_failure = "unspecified launch failure";
}

inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorLaunchFailure: return cuda_emulation::launch_failure;
    case cudaErrorNotSupported: return "operation not supported";
  }
  return "unrecognized error code";
}

inline cudaError_t cudaGetLastError() {
  return static_cast<cudaError_t>(
      std::exchange(cuda_emulation::last_error, static_cast<int>(cudaSuccess)));
}

struct cudaFuncAttributes {};

template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel*) {
  return cudaSuccess;
}

namespace cuda_emulation {

inline cudaError_t remember(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

// Limits of compute capability 3.0 and later.
inline cudaError_t check(const cudaLaunchConfig_t& config) {
  const dim3 &grid = config.gridDim, &block = config.blockDim;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7FFFFFFFu || grid.y > 65535 ||
      grid.z > 65535) {
    return cudaErrorInvalidConfiguration;
  }
  if (block.x == 0 || block.y == 0 || block.z == 0 || block.x > kMaxThreads ||
      block.y > kMaxThreads || block.z > 64 || block.x * block.y * block.z > kMaxThreads) {
    return cudaErrorInvalidConfiguration;
  }
  if (config.dynamicSmemBytes > 0 || config.numAttrs > 0) return cudaErrorNotSupported;
  return cudaSuccess;
}

}  // namespace cuda_emulation

inline cudaError_t cudaMemsetAsync(void* data, int value, size_t count, cudaStream_t = nullptr) {
  std::memset(data, value, count);
  return cudaSuccess;
}

template <typename... ExpTypes, typename... ActTypes>
inline cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(ExpTypes...),
                                      ActTypes&&... args) {
  if (const cudaError_t error = cuda_emulation::check(*config)) {
    return cuda_emulation::remember(error);
  }
  return [&](ExpTypes... converted) {
    if (cuda_emulation_runner != nullptr) {
      const void* const arguments[] = {&converted..., nullptr};
      const uint3 grid = config->gridDim, block = config->blockDim;
      const char* const failure =
          cuda_emulation_runner(reinterpret_cast<const void*>(kernel), &grid, &block, arguments);
      if (failure == nullptr) return cudaSuccess;
      cuda_emulation::launch_failure = failure;
      return cuda_emulation::remember(cudaErrorLaunchFailure);
    }
    auto call = [&] { kernel(converted...); };  // a thread has its own copy of every argument
    cuda_emulation::launch(
        config->gridDim, config->blockDim,
        [](void* context) { (*static_cast<decltype(call)*>(context))(); }, &call);
    return cudaSuccess;
  }(std::forward<ActTypes>(args)...);
}

// Barriers and warps --------------------------------------------------------------------------

// The place of a call. All threads at a barrier have to come from the same place.
#define CUDA_EMULATION_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(CUDA_EMULATION_SITE) {
  cuda_emulation::wait(cuda_emulation::state.block,
                       {cuda_emulation::Operation::syncthreads, file, line});
}

inline void __syncwarp(unsigned mask = ~0u, CUDA_EMULATION_SITE) {
  const cuda_emulation::Site site{cuda_emulation::Operation::syncwarp, file, line};
  cuda_emulation::check_mask(mask, site);
  cuda_emulation::exchange(0, site);
}

namespace cuda_emulation {

// source(lane, first, last) returns one of the lanes that `width` puts together, or the lane
// itself.
template <typename T, typename F>
T shuffle(unsigned mask, T value, int width, const Site& site, const F& source) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8),
                "CUDA shuffles numbers of 32 and 64 bits");
  check_mask(mask, site);
  if (width < 1 || width > kWarp || (width & (width - 1)) != 0) fail(site, "width");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  const Exchange all = exchange(bits, site);
  const int first = lane() & ~(width - 1);
  bits = all.bits(source(lane(), first, first + width - 1));
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace cuda_emulation

template <typename T>
inline T __shfl_sync(unsigned mask, T value, int source, int width = 32, CUDA_EMULATION_SITE) {
  return cuda_emulation::shuffle(
      mask, value, width, {cuda_emulation::Operation::shuffle, file, line},
      [=](int, int first, int) { return first + (source & (width - 1)); });
}

template <typename T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                        CUDA_EMULATION_SITE) {
  return cuda_emulation::shuffle(
      mask, value, width, {cuda_emulation::Operation::shuffle, file, line},
      [=](int lane, int first, int) {
        return delta <= static_cast<unsigned>(lane - first) ? lane - static_cast<int>(delta) : lane;
      });
}

template <typename T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                          CUDA_EMULATION_SITE) {
  return cuda_emulation::shuffle(
      mask, value, width, {cuda_emulation::Operation::shuffle, file, line},
      [=](int lane, int, int last) {
        return delta <= static_cast<unsigned>(last - lane) ? lane + static_cast<int>(delta) : lane;
      });
}

template <typename T>
inline T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, CUDA_EMULATION_SITE) {
  return cuda_emulation::shuffle(mask, value, width,
                                 {cuda_emulation::Operation::shuffle, file, line},
                                 [=](int lane, int, int last) {
                                   const int other = lane ^ lanes;
                                   return other >= 0 && other <= last ? other : lane;
                                 });
}

namespace cuda_emulation {

struct Votes {
  unsigned present, yes;
};

inline Votes vote(unsigned mask, int predicate, const Site& site) {
  check_mask(mask, site);
  const Exchange all = exchange(predicate != 0, site);
  Votes votes{};
  for (int i = 0; i < kWarp; ++i) {
    if (!all.has(i)) continue;
    votes.present |= 1u << i;
    if (all.bits(i)) votes.yes |= 1u << i;
  }
  return votes;
}

}  // namespace cuda_emulation

inline unsigned __ballot_sync(unsigned mask, int predicate, CUDA_EMULATION_SITE) {
  return cuda_emulation::vote(mask, predicate, {cuda_emulation::Operation::vote, file, line}).yes;
}

inline int __any_sync(unsigned mask, int predicate, CUDA_EMULATION_SITE) {
  return cuda_emulation::vote(mask, predicate, {cuda_emulation::Operation::vote, file, line}).yes !=
         0;
}

inline int __all_sync(unsigned mask, int predicate, CUDA_EMULATION_SITE) {
  const cuda_emulation::Votes votes =
      cuda_emulation::vote(mask, predicate, {cuda_emulation::Operation::vote, file, line});
  return votes.yes == votes.present;
}

// Arithmetic ----------------------------------------------------------------------------------

namespace cuda_emulation {

template <typename To, typename From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

// Like the hardware's: the error grows with the argument, or where the logarithm is close to 0.
inline float fast_exp(float x) { return exp2f(x * 1.44269504f); }
inline float fast_log(float x) { return log2f(x) * 0.693147181f; }

}  // namespace cuda_emulation

// glibc declares functions of these names, but does not define them.
#define __expf(x) ::cuda_emulation::fast_exp(x)
#define __logf(x) ::cuda_emulation::fast_log(x)

#if !defined(__GLIBC__) || !__GLIBC_PREREQ(2, 42)  // which has them, as C23 wants
inline float rsqrtf(float x) { return 1 / sqrtf(x); }
inline double rsqrt(double x) { return 1 / sqrt(x); }
#endif
inline float rsqrt(float x) { return rsqrtf(x); }

inline float __int_as_float(int x) { return cuda_emulation::bits_as<float>(x); }
inline int __float_as_int(float x) { return cuda_emulation::bits_as<int>(x); }
inline float __uint_as_float(unsigned x) { return cuda_emulation::bits_as<float>(x); }
inline unsigned __float_as_uint(float x) { return cuda_emulation::bits_as<unsigned>(x); }
inline double __longlong_as_double(long long x) { return cuda_emulation::bits_as<double>(x); }
inline long long __double_as_longlong(double x) { return cuda_emulation::bits_as<long long>(x); }

template <typename T>
inline T __ldg(const T* p) {
  return *p;
}
template <typename T>
inline void __stwb(T* p, T x) {
  *p = x;
}

// CUDA's overloads, so that a call is ambiguous here if it is ambiguous there.
#define CUDA_EMULATION_MIN_MAX(type, a_type, b_type)               \
  inline type min(a_type a, b_type b) {                            \
    const type c = static_cast<type>(a), d = static_cast<type>(b); \
    return d < c ? d : c;                                          \
  }                                                                \
  inline type max(a_type a, b_type b) {                            \
    const type c = static_cast<type>(a), d = static_cast<type>(b); \
    return c < d ? d : c;                                          \
  }
#define CUDA_EMULATION_MIN_MAX_SIGNS(type)                            \
  CUDA_EMULATION_MIN_MAX(type, type, type)                            \
  CUDA_EMULATION_MIN_MAX(unsigned type, unsigned type, unsigned type) \
  CUDA_EMULATION_MIN_MAX(unsigned type, type, unsigned type)          \
  CUDA_EMULATION_MIN_MAX(unsigned type, unsigned type, type)
CUDA_EMULATION_MIN_MAX_SIGNS(int)
CUDA_EMULATION_MIN_MAX_SIGNS(long)
CUDA_EMULATION_MIN_MAX_SIGNS(long long)
#undef CUDA_EMULATION_MIN_MAX_SIGNS
#undef CUDA_EMULATION_MIN_MAX

inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }
inline double min(float a, double b) { return fmin(a, b); }
inline double max(float a, double b) { return fmax(a, b); }
inline double min(double a, float b) { return fmin(a, b); }
inline double max(double a, float b) { return fmax(a, b); }
