#include <limits>

#include "device.cuh"

namespace repmtl::cuda {
namespace {

// Parts of a sum over all of x: every block adds them up again.
constexpr int64_t kParts = 256;

// The smallest normal number.
__device__ __forceinline__ float tiny(float) { return 1.17549435e-38f; }
__device__ __forceinline__ double tiny(double) { return 2.2250738585072014e-308; }

// Softmax or |x| / (sum |x| + eps) over values that are visited in three passes.
template <typename A>
struct Distribution {
  A temperature, eps;
  bool softmax;
  A center, total, log_total;  // of softmax: the largest and the sum relative to it

  __device__ void of_sum(A largest, A sum) {
    center = softmax ? largest : A(0);
    total = softmax ? sum : sum + eps;
    if (total == 0) total = 1;
    log_total = log(total);
  }
  // What is summed, relative to the largest value.
  __device__ A term(A x, A largest) const {
    return softmax ? exp(x / temperature - largest) : magnitude(x);
  }
  // p and log p
  __device__ A share(A x, A& log_p) const {
    if (softmax) {
      log_p = x / temperature - center - log_total;
      return exp(log_p);
    }
    const A m = magnitude(x), p = m / total;
    // From p unless that underflows: the logarithms of tiny saliencies nearly cancel.
    log_p = p >= tiny(p) ? log(p) : (m == 0 ? log_total : log(m)) - log_total;
    return p;
  }
  // d h / d x, where |x| sums to total - eps; the sign of 0 is 0, that of NaN is NaN
  __device__ A slope(A x, A h) const {
    A log_p;
    const A p = share(x, log_p);
    if (softmax) return p * (-h - log_p) / temperature;
    const A sign = x > 0 ? A(1) : x < 0 ? A(-1) : x;
    return (-h - log_p - eps / total) * sign / total;
  }
};

// x as it is, or |x| + floor mean |x|: parts (kParts or fewer) are sums of |x|, or null.
template <typename A>
struct Input {
  const A* x;
  const A* parts;
  int64_t count, size;  // parts, numbers
  A floor;

  __device__ A offset(A* shared) const {
    return parts ? floor * sum_of(parts, count, shared) / static_cast<A>(size) : A(0);
  }
  __device__ A at(int64_t i, A offset) const { return parts ? magnitude(x[i]) + offset : x[i]; }
};

template <typename A>
REPMTL_KERNEL sum_kernel(
    const A* x, int64_t size, bool absolute, A* parts) {
  __shared__ A shared[kWarps];
  A sum = 0;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x; i < size;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    sum += absolute ? magnitude(x[i]) : x[i];
  }
  sum = block_sum(sum, shared);
  if (threadIdx.x == 0) parts[blockIdx.x] = sum;
}

// A thread for each position of each sample: `length` of them, T values `length` apart.
template <typename A>
REPMTL_KERNEL over_tasks_kernel(
    Input<A> input, Distribution<A> distribution, int64_t tasks, int64_t length,
    A* grad,  // (T, B, N) or null
    A* parts) {  // (blocks): sums of entropies
  __shared__ A shared[kWarps];
  const A offset = input.offset(shared);
  const int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  A h = 0;
  if (i < length) {
    A largest = input.at(i, offset) / distribution.temperature, sum = 0, log_p;
    for (int64_t t = 1; t < tasks; ++t) {
      largest = larger(input.at(t * length + i, offset) / distribution.temperature, largest);
    }
    for (int64_t t = 0; t < tasks; ++t) {
      sum += distribution.term(input.at(t * length + i, offset), largest);
    }
    distribution.of_sum(largest, sum);
    for (int64_t t = 0; t < tasks; ++t) {
      const A p = distribution.share(input.at(t * length + i, offset), log_p);
      h -= p * log_p;
    }
    for (int64_t t = 0; grad && t < tasks; ++t) {
      grad[t * length + i] =
          distribution.slope(input.at(t * length + i, offset), h) / static_cast<A>(length);
    }
  }
  h = block_sum(h, shared);
  if (threadIdx.x == 0) parts[blockIdx.x] = h;
}

// A block for each task and sample: N adjacent values.
template <typename A>
REPMTL_KERNEL over_space_kernel(
    Input<A> input, Distribution<A> distribution, int64_t positions, A* grad, A* parts) {
  __shared__ A shared[kWarps];
  const A offset = input.offset(shared);
  const int64_t before = blockIdx.x * positions;
  A largest = input.at(before, offset) / distribution.temperature, sum = 0, h = 0, log_p;
  for (int64_t n = threadIdx.x; n < positions; n += kThreads) {
    largest = larger(input.at(before + n, offset) / distribution.temperature, largest);
  }
  largest = block_max(largest, shared);
  for (int64_t n = threadIdx.x; n < positions; n += kThreads) {
    sum += distribution.term(input.at(before + n, offset), largest);
  }
  distribution.of_sum(largest, block_sum(sum, shared));
  for (int64_t n = threadIdx.x; n < positions; n += kThreads) {
    const A p = distribution.share(input.at(before + n, offset), log_p);
    h -= p * log_p;
  }
  h = block_sum(h, shared);
  for (int64_t n = threadIdx.x; grad && n < positions; n += kThreads) {
    grad[before + n] =
        distribution.slope(input.at(before + n, offset), h) / static_cast<A>(gridDim.x);
  }
  if (threadIdx.x == 0) parts[blockIdx.x] = h;
}

// value = sum of parts over count.
template <typename A>
REPMTL_KERNEL mean_kernel(
    const A* parts, int64_t blocks, int64_t count, A* value) {
  __shared__ A shared[kWarps];
  const A sum = sum_of(parts, blocks, shared);
  if (threadIdx.x == 0) *value = sum / static_cast<A>(count);
}

// The gradient at x from that at |x| + floor mean |x|, in place. parts: sums of the latter.
template <typename A>
REPMTL_KERNEL through_floor_kernel(
    const A* x, int64_t size, const A* parts, int64_t count, A floor, A* grad) {
  __shared__ A shared[kWarps];
  const A rest = floor * sum_of(parts, count, shared) / static_cast<A>(size);
  const int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (i >= size) return;
  grad[i] = (grad[i] + rest) * (x[i] > 0 ? A(1) : x[i] < 0 ? A(-1) : x[i]);
}

template <typename A>
void run(const Context& on, int64_t tasks, int64_t batch, int64_t positions, const A* x,
         const EntropyOptions& options, A* value, A* grad) {
  const int64_t size = tasks * batch * positions, length = batch * positions;
  const int64_t parts = std::min(kParts, ceil_div(size, kThreads));
  const A floor = static_cast<A>(options.floor);
  Input<A> input{x, nullptr, parts, size, floor};
  if (floor != 0) {
    A* sums = scratch<A>(on, parts);
    launch(on, sum_kernel<A>, parts, x, size, true, sums);
    input.parts = sums;
  }
  const Distribution<A> distribution{static_cast<A>(options.temperature), static_cast<A>(options.eps),
                              options.softmax, 0, 0, 0};
  const int64_t blocks = options.over_tasks ? ceil_div(length, kThreads) : tasks * batch;
  A* entropies = scratch<A>(on, blocks);
  if (options.over_tasks) {
    launch(on, over_tasks_kernel<A>, blocks, input, distribution, tasks, length, grad, entropies);
  } else {
    launch(on, over_space_kernel<A>, blocks, input, distribution, positions, grad, entropies);
  }
  const int64_t count = options.over_tasks ? length : tasks * batch;
  launch(on, mean_kernel<A>, 1, entropies, blocks, count, value);
  if (floor != 0 && grad) {
    A* sums = scratch<A>(on, parts);
    launch(on, sum_kernel<A>, parts, grad, size, false, sums);
    launch(on, through_floor_kernel<A>, ceil_div(size, kThreads), x, size, sums, parts, floor,
           grad);
  }
}

}  // namespace

void entropy(const Context& on, Type type, int64_t tasks, int64_t batch, int64_t positions,
             const void* x, const EntropyOptions& options, void* value, void* grad) {
  dispatch_accumulation(type, [&](auto example) {
    using A = decltype(example);
    run(on, tasks, batch, positions, static_cast<const A*>(x), options, static_cast<A*>(value),
        static_cast<A*>(grad));
  });
}

}  // namespace repmtl::cuda
