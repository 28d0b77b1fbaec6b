// Stage `entropy`.
#include "device.cuh"

namespace repmtl::cuda {
namespace {

// Parts of a sum over all elements of x. Every block adds up all parts.
constexpr int64_t kParts = 256;

// The smallest normal number.
__device__ __forceinline__ float tiny(float) { return 1.17549435e-38f; }
__device__ __forceinline__ double tiny(double) { return 2.2250738585072014e-308; }

// The distribution softmax or |x| / (sum |x| + eps), over values that are visited in three passes.
// A probability of 0 adds 0 to entropy and gradient, though its logarithm may be -inf.
template <typename A>
struct Distribution {
  A temperature, eps;
  bool softmax;
  A center, total, log_total;  // softmax: the largest value, and the sum relative to it

  __device__ void set_sum(A largest, A sum) {
    center = softmax ? largest : A(0);
    total = softmax ? sum : sum + eps;
    if (total == 0) total = 1;
    log_total = log(total);
  }
  // One term of the sum, relative to the largest value.
  __device__ A term(A x, A largest) const {
    return softmax ? exp(x / temperature - largest) : magnitude(x);
  }
  // Returns -p log p.
  __device__ A surprise(A x) const {
    A log_p;
    const A p = share(x, log_p);
    return p == 0 ? A(0) : -p * log_p;
  }
  // Returns p and writes log p.
  __device__ A share(A x, A& log_p) const {
    if (softmax) {
      log_p = x / temperature - center - log_total;
      return exp(log_p);
    }
    const A m = magnitude(x), p = m / total;
    // Computed from p unless p underflows: the logarithms of tiny saliencies nearly cancel.
    log_p = p >= tiny(p) ? log(p) : (m == 0 ? log_total : log(m)) - log_total;
    return p;
  }
  // Returns d h / d x, where |x| sums to total - eps. The sign of 0 is 0, and that of NaN is NaN.
  __device__ A slope(A x, A h) const {
    A log_p;
    const A p = share(x, log_p);
    if (softmax) return p == 0 ? A(0) : p * (-h - log_p) / temperature;
    const A sign = x > 0 ? A(1) : x < 0 ? A(-1) : x;
    return (-h - log_p - eps / total) * sign / total;
  }
};

// Which positions of x are present, and how many.
template <typename A>
struct Positions {
  const unsigned char* valid;  // (B, N), or null: all are present
  const A* counts;             // (B), with `valid`
  int64_t batch, length;       // length: B N

  __device__ bool has(int64_t i) const { return !valid || valid[i]; }
  // Returns the number of present positions of all samples to all threads, but at least 1, since it
  // divides a sum.
  __device__ A count(A* shared) const {
    return valid ? larger(sum_of(counts, batch, shared), A(1)) : static_cast<A>(length);
  }
};

// The input x, or |x| + floor mean |x| if `parts` is not null: at most kParts sums of |x|.
template <typename A>
struct Input {
  const A* x;
  const A* parts;
  int64_t count, tasks;  // the number of parts, and of tasks
  A floor;
  Positions<A> positions;

  // Returns floor times the mean of the values that `parts` are sums of.
  __device__ A share_of(const A* parts, A* shared) const {
    const A numbers = static_cast<A>(tasks) * positions.count(shared);
    return floor * sum_of(parts, count, shared) / numbers;
  }
  __device__ A offset(A* shared) const { return parts ? share_of(parts, shared) : A(0); }
  __device__ A at(int64_t i, A offset) const { return parts ? magnitude(x[i]) + offset : x[i]; }
};

// parts (blocks): sums of x (size), or of |x| if `absolute`.
template <typename A>
REPMTL_KERNEL sum_kernel(const A* x, int64_t size, bool absolute, A* parts) {
  __shared__ A shared[kWarps];
  A sum = 0;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x; i < size;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    sum += absolute ? magnitude(x[i]) : x[i];
  }
  sum = block_sum(sum, shared);
  if (threadIdx.x == 0) parts[blockIdx.x] = sum;
}

// A thread for each position of each sample, `length` in all. Its T values lie `length` apart.
template <typename A>
REPMTL_KERNEL over_tasks_kernel(Input<A> input, Distribution<A> distribution,
                                A* grad,     // (T, B, N) or null
                                A* parts) {  // (blocks): sums of entropies
  __shared__ A shared[kWarps];
  const A offset = input.offset(shared);
  const A count = input.positions.count(shared);
  const int64_t tasks = input.tasks, length = input.positions.length;
  const int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  const bool is_present = i < length && input.positions.has(i);
  A h = 0;
  if (is_present) {
    A largest = input.at(i, offset) / distribution.temperature, sum = 0;
    for (int64_t t = 1; t < tasks; ++t) {
      largest = larger(input.at(t * length + i, offset) / distribution.temperature, largest);
    }
    for (int64_t t = 0; t < tasks; ++t) {
      sum += distribution.term(input.at(t * length + i, offset), largest);
    }
    distribution.set_sum(largest, sum);
    for (int64_t t = 0; t < tasks; ++t) {
      h += distribution.surprise(input.at(t * length + i, offset));
    }
  }
  for (int64_t t = 0; grad && i < length && t < tasks; ++t) {
    const int64_t at = t * length + i;
    grad[at] = is_present ? distribution.slope(input.at(at, offset), h) / count : A(0);
  }
  h = block_sum(h, shared);
  if (threadIdx.x == 0) parts[blockIdx.x] = h;
}

// A block for each task and sample, which has N adjacent values. grad (T, B, N) or null; parts
// (blocks): entropies.
template <typename A>
REPMTL_KERNEL over_space_kernel(Input<A> input, Distribution<A> distribution, int64_t N, A* grad,
                                A* parts) {
  __shared__ A shared[kWarps];
  const A offset = input.offset(shared);
  const int64_t before = blockIdx.x * N, b = blockIdx.x % input.positions.batch;
  const auto has = [&](int64_t n) { return input.positions.has(b * N + n); };
  A largest = -INFINITY, sum = 0, h = 0;
  for (int64_t n = threadIdx.x; n < N; n += kThreads) {
    if (!has(n)) continue;
    largest = larger(input.at(before + n, offset) / distribution.temperature, largest);
  }
  largest = block_max(largest, shared);
  for (int64_t n = threadIdx.x; n < N; n += kThreads) {
    if (!has(n)) continue;
    sum += distribution.term(input.at(before + n, offset), largest);
  }
  distribution.set_sum(largest, block_sum(sum, shared));
  for (int64_t n = threadIdx.x; n < N; n += kThreads) {
    if (has(n)) h += distribution.surprise(input.at(before + n, offset));
  }
  h = block_sum(h, shared);
  for (int64_t n = threadIdx.x; grad && n < N; n += kThreads) {
    const A slope = has(n) ? distribution.slope(input.at(before + n, offset), h) : A(0);
    grad[before + n] = slope / static_cast<A>(gridDim.x);
  }
  if (threadIdx.x == 0) parts[blockIdx.x] = h;
}

// value () = the sum of parts (blocks), divided by the number of blocks or of present positions.
template <typename A>
REPMTL_KERNEL mean_kernel(const A* parts, int64_t blocks, bool over_tasks, Positions<A> positions,
                          A* value) {
  __shared__ A shared[kWarps];
  const A sum = sum_of(parts, blocks, shared);
  const A count = over_tasks ? positions.count(shared) : static_cast<A>(blocks);
  if (threadIdx.x == 0) *value = sum / count;
}

// Turns the gradient at |x| + floor mean |x| into the gradient at x, in place. parts: sums of the
// former.
template <typename A>
REPMTL_KERNEL through_floor_kernel(Input<A> input, int64_t size, const A* parts, A* grad) {
  __shared__ A shared[kWarps];
  const A rest = input.share_of(parts, shared);
  const int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (i >= size) return;
  const A x = input.x[i];
  grad[i] = (grad[i] + rest) * (x > 0 ? A(1) : x < 0 ? A(-1) : x);
}

template <typename A>
void run(const Context& on, int64_t tasks, int64_t batch, int64_t positions, const A* x,
         const Mask& mask, const EntropyOptions& options, A* value, A* grad) {
  const int64_t size = tasks * batch * positions, length = batch * positions;
  const int64_t parts = std::min(kParts, ceil_div(size, kThreads));
  const A floor = static_cast<A>(options.floor);
  Input<A> input{x,     nullptr, parts,
                 tasks, floor,   {mask.valid, static_cast<const A*>(mask.counts), batch, length}};
  if (floor != 0) {
    A* sums = scratch<A>(on, parts);
    launch(on, sum_kernel<A>, parts, x, size, true, sums);
    input.parts = sums;
  }
  const Distribution<A> distribution{
      static_cast<A>(options.temperature), static_cast<A>(options.eps), options.softmax, 0, 0, 0};
  const int64_t blocks = options.over_tasks ? ceil_div(length, kThreads) : tasks * batch;
  A* entropies = scratch<A>(on, blocks);
  if (options.over_tasks) {
    launch(on, over_tasks_kernel<A>, blocks, input, distribution, grad, entropies);
  } else {
    launch(on, over_space_kernel<A>, blocks, input, distribution, positions, grad, entropies);
  }
  launch(on, mean_kernel<A>, 1, entropies, blocks, options.over_tasks, input.positions, value);
  if (floor != 0 && grad) {
    A* sums = scratch<A>(on, parts);
    launch(on, sum_kernel<A>, parts, grad, size, false, sums);
    launch(on, through_floor_kernel<A>, ceil_div(size, kThreads), input, size, sums, grad);
  }
}

}  // namespace

void entropy(const Context& on, Type type, int64_t tasks, int64_t batch, int64_t positions,
             const void* x, const Mask& mask, const EntropyOptions& options, void* value,
             void* grad) {
  dispatch_accumulation(type, [&](auto example) {
    using A = decltype(example);
    run(on, tasks, batch, positions, static_cast<const A*>(x), mask, options,
        static_cast<A*>(value), static_cast<A*>(grad));
  });
}

}  // namespace repmtl::cuda
