// Stages `anchors` and `contrast`, and the value of CSA.
#include "device.cuh"

namespace repmtl::cuda {
namespace {

// A block for each sample.
template <typename A>
REPMTL_KERNEL unit_anchors_kernel(const A* a,  // (T, B, C)
                                  int64_t tasks, int64_t batch, int64_t channels, double eps,
                                  A* products,  // (B, T, T): scratch
                                  A* u,         // (T, B, C)
                                  A* factor,    // (B)
                                  A* radial) {  // (T, B, C) or null
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
  for (int64_t pair = warp; pair < tasks * tasks; pair += kWarps) {
    const A *x = row(a, pair / tasks), *y = row(a, pair % tasks);
    A dot = 0;
    for (int64_t c = lane; c < channels; c += kWarp) dot += x[c] * scale * (y[c] * scale);
    dot = warp_sum(dot);
    if (lane == 0) products[pair] = dot;
  }
  __syncthreads();
  A square = 0;
  for (int64_t pair = threadIdx.x; pair < tasks * tasks; pair += kThreads) {
    square += products[pair] * products[pair];
  }
  const A norm = sqrt(block_sum(square, shared));
  const Guarded<A> guarded = guarded_inverse(norm, scale, eps);
  const A root = sqrt(guarded.inverse);
  if (threadIdx.x == 0) factor[b] = scale * root;
  const A share = guarded.clamped ? A(0) : guarded.inverse;
  for (int64_t t = 0; t < tasks; ++t) {
    for (int64_t c = threadIdx.x; c < channels; c += kThreads) {
      row(u, t)[c] = row(a, t)[c] * scale * root;
      if (!radial) continue;
      A sum = 0;
      for (int64_t v = 0; v < tasks; ++v) {
        sum += products[t * tasks + v] * share * (row(a, v)[c] * scale * root);
      }
      row(radial, t)[c] = sum;
    }
  }
}

// Returns r_mk = sum_tv dots^2 for sample m of a block and sample k. The error of each addition is
// taken from the next term (Kahan's sum), since T^2 errors would add up.
// dots (T, M, T, B).
template <typename A>
__device__ A similarity(const A* dots, int64_t tasks, int64_t batch, int64_t samples, int64_t m,
                        int64_t k) {
  A r = 0, excess = 0;
  for (int64_t t = 0; t < tasks; ++t) {
    for (int64_t v = 0; v < tasks; ++v) {
      const A d = dots[((t * samples + m) * tasks + v) * batch + k];
      const A term = d * d - excess, sum = r + term;
      excess = (sum - r) - term;
      r = sum;
    }
  }
  return r;
}

// The largest similarity r, and the sum of exp((r - largest) / temperature). Similarities are not
// negative, so 0 is a finite lower bound of the largest.
template <typename A>
struct Peaks {
  A largest, sum;

  __device__ void add(A r, A temperature) {
    const A raised = larger(r, largest);
    sum = sum * exp((largest - raised) / temperature) + exp((r - raised) / temperature);
    largest = raised;
  }
  // Joins the peaks of all threads. Every thread gets the result.
  __device__ void join(A temperature, A* shared) {
    const A top = block_max(largest, shared);
    sum = block_sum(sum * exp((largest - top) / temperature), shared);
    largest = top;
  }
};

// A block for each sample of dots.
template <typename A>
REPMTL_KERNEL log_sum_exp_kernel(const A* dots,  // (T, M, T, B)
                                 int64_t tasks, int64_t batch, int64_t first, A temperature,
                                 A* logsumexp,       // (M)
                                 A* rows,            // (2, M)
                                 A* similarities) {  // (M, B) or null: r
  __shared__ A shared[kWarps];
  const int64_t m = blockIdx.x, samples = gridDim.x;
  Peaks<A> peaks{0, 0};
  for (int64_t k = threadIdx.x; k < batch; k += kThreads) {
    const A r = similarity(dots, tasks, batch, samples, m, k);
    if (similarities) similarities[m * batch + k] = r;
    if (k != first + m) peaks.add(r, temperature);
  }
  peaks.join(temperature, shared);
  if (threadIdx.x != 0) return;
  logsumexp[m] = peaks.largest / temperature + log(peaks.sum);
  rows[m] = peaks.largest;
  rows[samples + m] = peaks.sum;
}

// A block for each sample of the batch.
template <typename A>
REPMTL_KERNEL column_peaks_kernel(
    const A* similarities,  // (M, B)
    int64_t first, int64_t samples, A temperature,
    A* columns) {  // (2, B): peaks of earlier blocks, to which these are added
  __shared__ A shared[kWarps];
  const int64_t k = blockIdx.x, batch = gridDim.x;
  Peaks<A> peaks{0, 0};
  if (threadIdx.x == 0) peaks = {columns[k], columns[batch + k]};
  for (int64_t m = threadIdx.x; m < samples; m += kThreads) {
    if (k != first + m) peaks.add(similarities[m * batch + k], temperature);
  }
  peaks.join(temperature, shared);
  if (threadIdx.x != 0) return;
  columns[k] = peaks.largest;
  columns[batch + k] = peaks.sum;
}

// A thread for each pair of samples: m of dots and k of the batch. Both weights are computed from
// r_mk: r_km is another sum, and at low temperatures the difference in rounding would dominate.
template <typename A>
REPMTL_KERNEL weigh_dots_kernel(A* dots,           // (T, M, T, B)
                                const A* rows,     // (2, M)
                                const A* columns,  // (2, B)
                                int64_t tasks, int64_t batch, int64_t first, int64_t samples,
                                A temperature) {
  const int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (i >= samples * batch) return;
  const int64_t m = i / batch, k = i % batch;
  A weight = 0;
  if (k != first + m) {
    const A r = similarity(dots, tasks, batch, samples, m, k);
    const A row_weight = exp((r - rows[m]) / temperature) / rows[samples + m];
    const A column_weight = exp((r - columns[k]) / temperature) / columns[batch + k];
    weight = (row_weight + column_weight) * 2 / (temperature * static_cast<A>(batch));
  }
  for (int64_t t = 0; t < tasks; ++t) {
    for (int64_t v = 0; v < tasks; ++v) {
      dots[((t * samples + m) * tasks + v) * batch + k] *= weight;
    }
  }
}

// A block for each sample.
template <typename A>
REPMTL_KERNEL through_normalisation_kernel(const A* u,       // (T, B, C), as radial and du
                                           const A* factor,  // (B)
                                           const A* radial, int64_t tasks, int64_t batch,
                                           int64_t channels, A* du) {
  __shared__ A shared[kWarps];
  const int64_t b = blockIdx.x;
  A radial_weight = 0;
  for (int64_t t = 0; t < tasks; ++t) {
    const int64_t row = (t * batch + b) * channels;
    for (int64_t c = row + threadIdx.x; c < row + channels; c += kThreads) {
      radial_weight += du[c] * u[c];
    }
  }
  radial_weight = block_sum(radial_weight, shared);
  for (int64_t t = 0; t < tasks; ++t) {
    const int64_t row = (t * batch + b) * channels;
    for (int64_t c = row + threadIdx.x; c < row + channels; c += kThreads) {
      du[c] = factor[b] * (du[c] - radial_weight * radial[c]);
    }
  }
}

// One block: writes the weights and the loss.
template <typename A>
REPMTL_KERNEL csa_value_kernel(const A* logsumexp,            // (B)
                               const A* similarity,           // (T, B)
                               const unsigned char* present,  // (T, B) or null
                               int64_t tasks, int64_t batch, A temperature,
                               A* weight,   // (T, B)
                               A* value) {  // ()
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
                  const void* a, double eps, void* u, void* factor, void* radial) {
  dispatch_accumulation(type, [&](auto example) {
    using A = decltype(example);
    launch(on, unit_anchors_kernel<A>, batch, static_cast<const A*>(a), tasks, batch, channels, eps,
           scratch<A>(on, batch * tasks * tasks), static_cast<A*>(u), static_cast<A*>(factor),
           static_cast<A*>(radial));
  });
}

void log_sum_exp(const Context& on, Type type, int64_t tasks, int64_t batch, int64_t first,
                 int64_t samples, const void* dots, double temperature, void* logsumexp, void* rows,
                 void* columns) {
  dispatch_accumulation(type, [&](auto example) {
    using A = decltype(example);
    const A tau = static_cast<A>(temperature);
    A* similarities = scratch<A>(on, columns ? samples * batch : 0);
    launch(on, log_sum_exp_kernel<A>, samples, static_cast<const A*>(dots), tasks, batch, first,
           tau, static_cast<A*>(logsumexp), static_cast<A*>(rows), similarities);
    if (!columns) return;
    launch(on, column_peaks_kernel<A>, batch, similarities, first, samples, tau,
           static_cast<A*>(columns));
  });
}

void weigh_dots(const Context& on, Type type, int64_t tasks, int64_t batch, int64_t first,
                int64_t samples, void* dots, const void* rows, const void* columns,
                double temperature) {
  dispatch_accumulation(type, [&](auto example) {
    using A = decltype(example);
    launch(on, weigh_dots_kernel<A>, ceil_div(samples * batch, kThreads), static_cast<A*>(dots),
           static_cast<const A*>(rows), static_cast<const A*>(columns), tasks, batch, first,
           samples, static_cast<A>(temperature));
  });
}

void through_normalisation(const Context& on, Type type, int64_t tasks, int64_t batch,
                           int64_t channels, const void* u, const void* factor, const void* radial,
                           void* du) {
  dispatch_accumulation(type, [&](auto example) {
    using A = decltype(example);
    launch(on, through_normalisation_kernel<A>, batch, static_cast<const A*>(u),
           static_cast<const A*>(factor), static_cast<const A*>(radial), tasks, batch, channels,
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
