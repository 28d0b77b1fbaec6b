// Products of small tiles in shared memory. The matrix units multiply 16-bit operands.
#pragma once

#include <mma.h>

#include "device.cuh"

namespace repmtl::cuda {

// The threads of a block form a square of 16 x 16. Each has kRows x kColumns elements, 16 apart.
constexpr int kSide = 16;

template <typename A, int kRows, int kColumns>
struct Elements {
  A x[kRows][kColumns];
};

// Adds a^T b to elements, with a (kDepth, 16 kRows) and b (kDepth, 16 kColumns) in shared memory.
template <int kDepth, int kAStride, int kBStride, typename A, int kRows, int kColumns>
__device__ __forceinline__ void multiply(const A* a, const A* b,
                                         Elements<A, kRows, kColumns>& sums) {
  const int y = threadIdx.x / kSide, x = threadIdx.x % kSide;
#pragma unroll 4
  for (int k = 0; k < kDepth; ++k) {
    A left[kRows], right[kColumns];
#pragma unroll
    for (int i = 0; i < kRows; ++i) left[i] = a[k * kAStride + i * kSide + y];
#pragma unroll
    for (int j = 0; j < kColumns; ++j) right[j] = b[k * kBStride + j * kSide + x];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) sums.x[i][j] += left[i] * right[j];
    }
  }
}

// The same for 16-bit operands. Each warp has some of the kRows x kColumns tiles of 16 x 16.
template <typename S, int kRows, int kColumns>
struct MatrixUnits {
  static constexpr int kTiles = (kRows * kColumns + kWarps - 1) / kWarps;
  using Sums = nvcuda::wmma::fragment<nvcuda::wmma::accumulator, kSide, kSide, kSide, float>;
  Sums sums[kTiles];

  __device__ static int tile(int i) { return threadIdx.x / kWarp * kTiles + i; }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) nvcuda::wmma::fill_fragment(sums[i], 0.0f);
  }

  template <int kDepth, int kAStride, int kBStride>
  __device__ __forceinline__ void multiply(const S* a, const S* b) {
    using namespace nvcuda::wmma;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      if (tile(i) >= kRows * kColumns) break;
      const int row = tile(i) / kColumns * kSide, column = tile(i) % kColumns * kSide;
#pragma unroll
      for (int k = 0; k < kDepth; k += kSide) {
        fragment<matrix_a, kSide, kSide, kSide, S, col_major> left;
        fragment<matrix_b, kSide, kSide, kSide, S, row_major> right;
        load_matrix_sync(left, a + k * kAStride + row, kAStride);
        load_matrix_sync(right, b + k * kBStride + column, kBStride);
        mma_sync(sums[i], left, right, sums[i]);
      }
    }
  }

  // Moves the sums to elements through shared memory (16 kRows, kStride). Its use before must end
  // with a barrier.
  template <int kStride>
  __device__ __forceinline__ void elements(float* shared, Elements<float, kRows, kColumns>& to) {
    using namespace nvcuda::wmma;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      if (tile(i) >= kRows * kColumns) break;
      const int row = tile(i) / kColumns * kSide, column = tile(i) % kColumns * kSide;
      store_matrix_sync(shared + row * kStride + column, sums[i], kStride, mem_row_major);
    }
    __syncthreads();
    const int y = threadIdx.x / kSide, x = threadIdx.x % kSide;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        to.x[i][j] = shared[(i * kSide + y) * kStride + j * kSide + x];
      }
    }
    __syncthreads();
  }
};

}  // namespace repmtl::cuda
