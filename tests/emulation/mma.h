// Stands in for CUDA's header of this name. Lane 0 of a warp holds a complete tile and computes
// with it; the other lanes only wait for it. Kernels can't access the elements of a fragment.
#pragma once

#include "cuda_bf16.h"
#include "cuda_fp16.h"

namespace nvcuda {
namespace wmma {

struct matrix_a {};
struct matrix_b {};
struct accumulator {};
struct row_major {};
struct col_major {};
namespace precision {
struct tf32 {};
}  // namespace precision

enum layout_t { mem_row_major, mem_col_major };

// Rounds to nearest, ties away from zero.
inline float __float_to_tf32(float x) {
  if (!isfinite(x)) return x;
  return __uint_as_float((__float_as_uint(x) + 0x1000) & ~0x1FFFu);
}

}  // namespace wmma
}  // namespace nvcuda

namespace cuda_emulation {

namespace wmma = nvcuda::wmma;

// How elements of a type are stored in memory, and their values as operands.
template <typename T>
struct Element {
  using memory = T;
  static float operand(T x) { return static_cast<float>(x); }
};
template <>
struct Element<wmma::precision::tf32> {
  using memory = float;
  static float operand(float x) { return __uint_as_float(__float_as_uint(x) & ~0x1FFFu); }
};

template <typename Use, int m, int n, int k>
struct TileShape {  // the shape of an accumulator
  static constexpr int rows = m, columns = n;
};
template <int m, int n, int k>
struct TileShape<wmma::matrix_a, m, n, k> {
  static constexpr int rows = m, columns = k;
};
template <int m, int n, int k>
struct TileShape<wmma::matrix_b, m, n, k> {
  static constexpr int rows = k, columns = n;
};

template <typename Use, int m, int n, int k, typename T, typename Layout>
constexpr bool is_supported() {
  constexpr bool sum = std::is_same_v<Use, wmma::accumulator>;
  constexpr bool laid_out =
      std::is_same_v<Layout, wmma::row_major> || std::is_same_v<Layout, wmma::col_major>;
  if (m != 16 || n != 16 || sum == laid_out) return false;
  if (sum) return std::is_same_v<T, float> && (k == 8 || k == 16);
  if (std::is_same_v<T, wmma::precision::tf32>) return k == 8;
  return (std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>) && k == 16;
}

}  // namespace cuda_emulation

namespace nvcuda {
namespace wmma {

template <typename Use, int m, int n, int k, typename T, typename Layout = void>
struct fragment {
  static_assert(cuda_emulation::is_supported<Use, m, n, k, T, Layout>(),
                "this kind of fragment is not emulated");
  using Shape = cuda_emulation::TileShape<Use, m, n, k>;
  using Elements = cuda_emulation::Element<T>;

  float values[Shape::rows][Shape::columns];
  bool has_values = false;
};

}  // namespace wmma
}  // namespace nvcuda

namespace cuda_emulation {

// Half of the work is done before the lanes wait for each other, and half after. So a missing
// barrier before or after shows in one order of threads or the other.
template <typename T, typename F>
void move_tile(const T* memory, unsigned leading, int lines, const Site& site, const F& line) {
  if (reinterpret_cast<uintptr_t>(memory) % 32 != 0) {
    fail(site, "the tile is not aligned to 32 bytes");
  }
  if (leading % (16 / sizeof(T)) != 0) {
    fail(site, "the leading dimension is not a multiple of 16 bytes");
  }
  const bool works = lane() == 0;
  for (int i = 0; works && i < lines / 2; ++i) line(i);
  const uint64_t tile = reinterpret_cast<uintptr_t>(memory) ^ uint64_t(leading) << 48;
  const Exchange all = exchange(tile, site);
  if (!works) return;
  for (int i = 0; i < kWarp; ++i) {
    if (!all.has(i)) fail(site, "the warp lacks lanes");
    if (all.bits(i) != all.bits(0)) fail(site, "the lanes give different tiles");
  }
  for (int i = lines / 2; i < lines; ++i) line(i);
}

template <typename Fragment, typename T>
void load(Fragment& to, const T* from, unsigned leading, bool by_rows, const Site& site) {
  using Shape = typename Fragment::Shape;
  const int lines = by_rows ? Shape::rows : Shape::columns;
  const int length = by_rows ? Shape::columns : Shape::rows;
  move_tile(from, leading, lines, site, [&](int i) {
    for (int j = 0; j < length; ++j) {
      (by_rows ? to.values[i][j] : to.values[j][i]) =
          Fragment::Elements::operand(from[static_cast<size_t>(i) * leading + j]);
    }
  });
  to.has_values = true;
}

}  // namespace cuda_emulation

namespace nvcuda {
namespace wmma {

template <typename Use, int m, int n, int k, typename T, typename Layout>
inline void fill_fragment(fragment<Use, m, n, k, T, Layout>& a,
                          typename cuda_emulation::Element<T>::memory v) {
  a.has_values = true;
  if (cuda_emulation::lane() != 0) return;
  for (auto& row : a.values) {
    for (float& value : row) value = cuda_emulation::Element<T>::operand(v);
  }
}

template <typename Use, int m, int n, int k, typename T, typename Layout>
inline void load_matrix_sync(fragment<Use, m, n, k, T, Layout>& a,
                             const typename cuda_emulation::Element<T>::memory* p, unsigned ldm,
                             CUDA_EMULATION_SITE) {
  static_assert(!std::is_same_v<Use, accumulator>, "an accumulator's layout is an argument");
  cuda_emulation::load(a, p, ldm, std::is_same_v<Layout, row_major>,
                       {cuda_emulation::Operation::matrix, file, line});
}

template <int m, int n, int k>
inline void load_matrix_sync(fragment<accumulator, m, n, k, float>& a, const float* p, unsigned ldm,
                             layout_t layout, CUDA_EMULATION_SITE) {
  cuda_emulation::load(a, p, ldm, layout == mem_row_major,
                       {cuda_emulation::Operation::matrix, file, line});
}

template <int m, int n, int k>
inline void store_matrix_sync(float* p, const fragment<accumulator, m, n, k, float>& a,
                              unsigned ldm, layout_t layout, CUDA_EMULATION_SITE) {
  const cuda_emulation::Site site{cuda_emulation::Operation::matrix, file, line};
  if (!a.has_values) cuda_emulation::fail(site, "the fragment has no values");
  const bool by_rows = layout == mem_row_major;
  cuda_emulation::move_tile(p, ldm, by_rows ? m : n, site, [&](int i) {
    for (int j = 0; j < (by_rows ? n : m); ++j) {
      p[static_cast<size_t>(i) * ldm + j] = by_rows ? a.values[i][j] : a.values[j][i];
    }
  });
}

template <int m, int n, int k, typename T, typename A, typename B>
inline void mma_sync(fragment<accumulator, m, n, k, float>& d,
                     const fragment<matrix_a, m, n, k, T, A>& a,
                     const fragment<matrix_b, m, n, k, T, B>& b,
                     const fragment<accumulator, m, n, k, float>& c, CUDA_EMULATION_SITE) {
  if (!a.has_values || !b.has_values || !c.has_values) {
    cuda_emulation::fail({cuda_emulation::Operation::matrix, file, line},
                         "a fragment has no values");
  }
  d.has_values = true;
  if (cuda_emulation::lane() != 0) return;
  for (int i = 0; i < m; ++i) {
    float sums[n];
    for (int j = 0; j < n; ++j) sums[j] = c.values[i][j];
    for (int q = 0; q < k; ++q) {
      const float left = a.values[i][q];
      for (int j = 0; j < n; ++j) sums[j] += left * b.values[q][j];
    }
    for (int j = 0; j < n; ++j) d.values[i][j] = sums[j];
  }
}

}  // namespace wmma
}  // namespace nvcuda
