// Tests of errors that have to end the process.
#include <cuda_runtime.h>
#include <mma.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <functional>
#include <string>

#include "self_test.h"

namespace {

namespace wmma = nvcuda::wmma;

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

}  // namespace

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
  EXPECT_DEATH("not \"backwards\"", launch(1, 1, two_places_kernel));
}
