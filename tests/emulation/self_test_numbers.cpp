// Tests of matrices, 16-bit numbers and arithmetic.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <mma.h>

#include <cmath>
#include <limits>
#include <random>

#include "self_test.h"

namespace {

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

// Returns the nearest of all 16-bit values, by search. Even bits win a tie.
template <typename F>
unsigned nearest(float x, unsigned infinity, const F& value) {
  unsigned low = 0, high = infinity;  // ascending in the bits
  const double magnitude = fabs(static_cast<double>(x));
  while (high - low > 1) {
    const unsigned middle = (low + high) / 2;
    (value(middle) <= magnitude ? low : high) = middle;
  }
  // The number after the largest one would be a step further; from there on values are infinity.
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
    // In the range of half, where many numbers lie on or beside a tie.
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

}  // namespace

void test_numbers() {
  test_products<__half, __half, 16>();
  test_products<__nv_bfloat16, __nv_bfloat16, 16>();
  test_products<wmma::precision::tf32, float, 8>();
  test_conversions();
  test_arithmetic();
}
