#include "device.cuh"

namespace repmtl::cuda {
namespace {

// A block for each sample.
template <typename A>
REPMTL_KERNEL unit_anchors_kernel(
    const A* a,  // (T, B, C)
    int64_t tasks, int64_t batch, int64_t channels, A eps,
    A* products,  // (B, T, T): scratch
    A* u,  // (T, B, C)
    A* factor,  // (B)
    A* pull) {  // (T, B, C) or null
  __shared__ A shared[kWarps];
  const int64_t b = blockIdx.x;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const auto row = [&](auto* x, int64_t t) { return x + (t * batch + b) * channels; };
  products += b * tasks * tasks;
  A largest = 0;
  for (int64_t t = 0; t < tasks; ++t) {
    for (int64_t c = threadIdx.x; c < channels; c += kThreads) {
      largest = larger(largest, magnitude(row(a, t)[c]));
    }
  }
  const A scale = power_of_two(block_max(largest, shared));
  A square = 0;
  for (int64_t pair = warp; pair < tasks * tasks; pair += kWarps) {
    const A *x = row(a, pair / tasks), *y = row(a, pair % tasks);
    A dot = 0;
    for (int64_t c = lane; c < channels; c += kWarp) dot += x[c] * scale * (y[c] * scale);
    dot = warp_sum(dot);
    if (lane != 0) continue;
    products[pair] = dot;
    square += dot * dot;
  }
  // Its barriers also let all threads see the products.
  const A norm = sqrt(block_sum(square, shared));
  const Guarded<A> guarded = guarded_inverse(norm, scale, eps);
  const A root = sqrt(guarded.inverse);
  if (threadIdx.x == 0) factor[b] = scale * root;
  const A share = guarded.clamped ? A(0) : guarded.inverse;
  for (int64_t t = 0; t < tasks; ++t) {
    for (int64_t c = threadIdx.x; c < channels; c += kThreads) {
      row(u, t)[c] = row(a, t)[c] * scale * root;
      if (!pull) continue;
      A sum = 0;
      for (int64_t v = 0; v < tasks; ++v) {
        sum += products[t * tasks + v] * share * (row(a, v)[c] * scale * root);
      }
      row(pull, t)[c] = sum;
    }
  }
}

// r_k = sum_tv dots^2 / temperature of sample m of a block and sample k.
template <typename A>
__device__ A similarity(const A* dots, int64_t tasks, int64_t batch, int64_t samples, int64_t m,
                        int64_t k, A temperature) {
  A r = 0;
  for (int64_t t = 0; t < tasks; ++t) {
    for (int64_t v = 0; v < tasks; ++v) {
      const A d = dots[((t * samples + m) * tasks + v) * batch + k];
      r += d * d;
    }
  }
  return r / temperature;
}

// A block for each sample of dots.
template <typename A>
REPMTL_KERNEL log_sum_exp_kernel(
    const A* dots,  // (T, M, T, B)
    int64_t tasks, int64_t batch, int64_t first, A temperature,
    A* logsumexp) {  // (M)
  __shared__ A shared[kWarps];
  const int64_t m = blockIdx.x, samples = gridDim.x;
  // Online: the sum so far is relative to the largest value so far. Similarities are not negative, so
  // 0 is a lower bound of their maximum, and finite.
  A largest = 0, sum = 0;
  for (int64_t k = threadIdx.x; k < batch; k += kThreads) {
    if (k == first + m) continue;
    const A r = similarity(dots, tasks, batch, samples, m, k, temperature);
    const A raised = larger(r, largest);
    sum = sum * exp(largest - raised) + exp(r - raised);
    largest = raised;
  }
  const A center = block_max(largest, shared);
  sum = block_sum(sum * exp(largest - center), shared);
  if (threadIdx.x == 0) logsumexp[m] = center + log(sum);
}

// A thread for each pair of samples: m of dots and k of all.
template <typename A>
REPMTL_KERNEL weigh_dots_kernel(
    A* dots,  // (T, M, T, B)
    const A* logsumexp,  // (B)
    int64_t tasks, int64_t batch, int64_t first, int64_t samples, A temperature) {
  const int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (i >= samples * batch) return;
  const int64_t m = i / batch, k = i % batch;
  A weight = 0;
  if (k != first + m) {
    const A r = similarity(dots, tasks, batch, samples, m, k, temperature);
    weight = (exp(r - logsumexp[first + m]) + exp(r - logsumexp[k])) * 2 /
             (temperature * static_cast<A>(batch));
  }
  for (int64_t t = 0; t < tasks; ++t) {
    for (int64_t v = 0; v < tasks; ++v) {
      dots[((t * samples + m) * tasks + v) * batch + k] *= weight;
    }
  }
}

// A block for each sample.
template <typename A>
REPMTL_KERNEL through_normalisation_kernel(
    const A* u,  // (T, B, C), as pull and du
    const A* factor,  // (B)
    const A* pull, int64_t tasks, int64_t batch, int64_t channels, A* du) {
  __shared__ A shared[kWarps];
  const int64_t b = blockIdx.x;
  A tug = 0;
  for (int64_t t = 0; t < tasks; ++t) {
    const int64_t row = (t * batch + b) * channels;
    for (int64_t c = row + threadIdx.x; c < row + channels; c += kThreads) tug += du[c] * u[c];
  }
  tug = block_sum(tug, shared);
  for (int64_t t = 0; t < tasks; ++t) {
    const int64_t row = (t * batch + b) * channels;
    for (int64_t c = row + threadIdx.x; c < row + channels; c += kThreads) {
      du[c] = factor[b] * (du[c] - tug * pull[c]);
    }
  }
}

// One block: weights and the loss.
template <typename A>
REPMTL_KERNEL csa_value_kernel(
    const A* logsumexp,  // (B)
    const A* similarity,  // (T, B)
    const unsigned char* present, int64_t tasks, int64_t batch, A temperature,
    A* weight, A* value) {
  __shared__ A shared[kWarps];
  A negatives = 0, positives = 0;
  for (int64_t b = threadIdx.x; b < batch; b += kThreads) {
    negatives += logsumexp[b];
    int64_t count = tasks;
    if (present) {
      count = 0;
      for (int64_t t = 0; t < tasks; ++t) count += present[t * batch + b] != 0;
      if (count == 0) count = 1;
    }
    for (int64_t t = 0; t < tasks; ++t) {
      const bool counts = !present || present[t * batch + b] != 0;
      const A share = counts ? -1 / (static_cast<A>(count * batch) * temperature) : A(0);
      weight[t * batch + b] = share;
      positives += share * similarity[t * batch + b];
    }
  }
  negatives = block_sum(negatives, shared);
  positives = block_sum(positives, shared);
  if (threadIdx.x == 0) *value = negatives / static_cast<A>(batch) + positives;
}

}  // namespace

void unit_anchors(const Context& on, Type type, int64_t tasks, int64_t batch, int64_t channels,
                  const void* a, double eps, void* u, void* factor, void* pull) {
  dispatch_accumulation(type, [&](auto example) {
    using A = decltype(example);
    launch(on, unit_anchors_kernel<A>, batch, static_cast<const A*>(a), tasks, batch, channels,
           static_cast<A>(eps), scratch<A>(on, batch * tasks * tasks), static_cast<A*>(u),
           static_cast<A*>(factor), static_cast<A*>(pull));
  });
}

void log_sum_exp(const Context& on, Type type, int64_t tasks, int64_t batch, int64_t first,
                 int64_t samples, const void* dots, double temperature, void* logsumexp) {
  dispatch_accumulation(type, [&](auto example) {
    using A = decltype(example);
    launch(on, log_sum_exp_kernel<A>, samples, static_cast<const A*>(dots), tasks, batch, first,
           static_cast<A>(temperature), static_cast<A*>(logsumexp));
  });
}

void weigh_dots(const Context& on, Type type, int64_t tasks, int64_t batch, int64_t first,
                int64_t samples, void* dots, const void* logsumexp, double temperature) {
  dispatch_accumulation(type, [&](auto example) {
    using A = decltype(example);
    launch(on, weigh_dots_kernel<A>, ceil_div(samples * batch, kThreads), static_cast<A*>(dots),
           static_cast<const A*>(logsumexp), tasks, batch, first, samples,
           static_cast<A>(temperature));
  });
}

void through_normalisation(const Context& on, Type type, int64_t tasks, int64_t batch,
                           int64_t channels, const void* u, const void* factor, const void* pull,
                           void* du) {
  dispatch_accumulation(type, [&](auto example) {
    using A = decltype(example);
    launch(on, through_normalisation_kernel<A>, batch, static_cast<const A*>(u),
           static_cast<const A*>(factor), static_cast<const A*>(pull), tasks, batch, channels,
           static_cast<A*>(du));
  });
}

void csa_value(const Context& on, Type type, int64_t tasks, int64_t batch, const void* logsumexp,
               const void* similarity, const unsigned char* present, double temperature,
               void* weight, void* value) {
  dispatch_accumulation(type, [&](auto example) {
    using A = decltype(example);
    launch(on, csa_value_kernel<A>, 1, static_cast<const A*>(logsumexp),
           static_cast<const A*>(similarity), present, tasks, batch, static_cast<A>(temperature),
           static_cast<A*>(weight), static_cast<A*>(value));
  });
}

}  // namespace repmtl::cuda
