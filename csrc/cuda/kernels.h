// What the CUDA kernels compute, and what they are given: pointers, strides and a stream; nothing of
// PyTorch. Accumulators, means and everything made of them are double for double, else float.
#pragma once

#include <cstdint>
#include <string>

#include "../shape.h"

namespace repmtl::cuda {

enum class Type { kDouble, kFloat, kBFloat16, kHalf };

// One task's saliencies or their gradient (B, C, N): position n is at place (n / (size[0] size[1]),
// n / size[1] % size[0], n % size[1]) of a grid with strides. All strides count elements.
struct View {
  void* data;
  int64_t batch, channel;
  int64_t stride[3];
  int64_t size[2];

  bool has_single_stride() const { return size[0] * size[1] == 1; }
};

// Scratch memory: of one call, aligned for any type, released by whoever made this.
struct Workspace {
  virtual void* take(int64_t bytes) = 0;

 protected:
  ~Workspace() = default;
};

struct Context {
  void* stream;
  Workspace* workspace;
};

// Which positions are there, in all tasks. Whatever the saliencies hold at others counts as 0.
struct Mask {
  const unsigned char* valid;  // (B, N) of bytes, 1 or 0; null: all are there
  const void* counts;          // (B), accumulators: how many of a sample are
};

// What makes S^ of S and the gradient of the scaled products; of CSAGradient.
struct Coefficients {
  const void *scale, *anchor_weight, *affinity_weight;  // (T, B)
};

// Why the current device can't run the kernels, or an empty string.
std::string why_not();

// The mask with its counts, which lie in scratch memory; null has none.
Mask counted_mask(const Context& on, Type type, int64_t batch, int64_t positions,
                  const unsigned char* valid);

// Stage `statistics`. positions (T, B, N), channels (T, B, C), scale (T, B); each may be null.
void statistics(const Context& on, Type type, const Shape& shape, const View* views,
                const Mask& mask, void* positions, void* channels, void* scale);

struct EntropyOptions {
  bool over_tasks;  // else over the positions of a sample
  bool softmax;     // else |x| / (sum |x| + eps)
  double temperature, floor, eps;
};

// Stage `entropy`, of |x| + floor mean |x| where there is a floor, at the positions that are there: x
// is 0 at others, and so is its gradient, unless it is NaN. x, grad (T, B, N); value (); grad may be
// null. `type` is that of x.
void entropy(const Context& on, Type type, int64_t tasks, int64_t batch, int64_t positions,
             const void* x, const Mask& mask, const EntropyOptions& options, void* value,
             void* grad);

// Stage `anchors`: u (T, B, C) = factor (B) a (T, B, C), radial (T, B, C) or null.
void unit_anchors(const Context& on, Type type, int64_t tasks, int64_t batch, int64_t channels,
                  const void* a, double eps, void* u, void* factor, void* radial);

// Stage `contrast`, between the products of anchors. dots (T, M, T, B): products u_t,first+m . u_vk,
// with r_mk = sum_tv dots^2. The peaks of a set of r are two numbers: the largest, at least 0, and the
// sum of exp((r - largest) / temperature). logsumexp (M): of r_mk / temperature over k != first + m;
// rows (2, M): the peaks of the same. columns (2, B) or null: peaks over m, of the samples before,
// become those with these samples too.
void log_sum_exp(const Context& on, Type type, int64_t tasks, int64_t batch, int64_t first,
                 int64_t samples, const void* dots, double temperature, void* logsumexp, void* rows,
                 void* columns);

// Multiplies dots with 2 / (temperature B) (softmax_m[k] + softmax_k[m]), both taken from r_mk.
void weigh_dots(const Context& on, Type type, int64_t tasks, int64_t batch, int64_t first,
                int64_t samples, void* dots, const void* rows, const void* columns,
                double temperature);

// du (T, B, C), the gradient at u, becomes that at a: factor (du - (sum_t du . u) radial).
void through_normalisation(const Context& on, Type type, int64_t tasks, int64_t batch,
                           int64_t channels, const void* u, const void* factor, const void* radial,
                           void* du);

// CSA (): mean of logsumexp (B) plus sum of weight (T, B) similarity (T, B). weight, written: minus
// the mean over (present) tasks and the batch, over temperature. present (T, B), of bytes, or null.
void csa_value(const Context& on, Type type, int64_t tasks, int64_t batch, const void* logsumexp,
               const void* similarity, const unsigned char* present, double temperature,
               void* weight, void* value);

// The largest Gram matrix of `small_gram`, and the most tasks.
constexpr int64_t kSmallPositions = 64;
constexpr int64_t kSmallTasks = 8;

// What `gram` gives of each task and sample (T, B).
struct Similarities {
  void *similarity, *inverse, *slope;
};

// Stage `gram` in one pass, for N <= kSmallPositions, N <= C. u (T, B, C); projection (T, B, T, N)
// and matrix (T, B, N, N) of `type`, `multiple` times the Gram matrix of S^; either may be null.
void small_gram(const Context& on, Type type, const Shape& shape, const View* views,
                const Mask& mask, const void* scale, const void* u, double eps, double multiple,
                const Similarities& out, void* projection, void* matrix);

// to, of one task, dense, = scale (B) S: (B, C, N), or (B, N, C) where `channels_are_adjacent`. With a
// mask `scale` may be null: 1.
void scaled_copy(const Context& on, Type type, const Shape& shape, const View& view,
                 const Mask& mask, const void* scale, void* to);

// Whether the channels of a position lie side by side, and not the positions of a channel.
bool channels_are_adjacent(const View& view, const Shape& shape);

// block (B, rows, columns), rows `first` to `first + rows` of the lower half of symmetric matrices
// (B, R, R) with columns = first + rows: writes them and their images, times `multiple`, into matrix,
// unless null; and sums of their squares, upper half included, into squares (B, gram_parts), from
// `part` on. `first` is a multiple of kGramTile.
constexpr int64_t kGramTile = 32;
int64_t gram_parts(int64_t rows, int64_t columns);
void gram_block(const Context& on, Type type, int64_t batch, int64_t side, int64_t first,
                int64_t rows, const void* block, double multiple, void* matrix, void* squares,
                int64_t part, int64_t parts);

// From squares (T, B, parts) and w (T, B, length) = S^^T u.
void gram_finish(const Context& on, Type type, int64_t tasks, int64_t batch, const void* squares,
                 int64_t parts, const void* w, int64_t length, const void* scale, double eps,
                 const Similarities& out);

// Products of saliencies with a vector for each of `columns` columns v (such as anchors), scaled:
// out (T, B, columns, N) = scale sum_c S v, or over positions (T, B, columns, C). v: of task t,
// sample b and column k at t * task + b * batch + k * column, adjacent elements.
struct Vectors {
  const void* data;
  int64_t count, task, batch, column;
};
void products(const Context& on, Type type, const Shape& shape, const View* views,
              const Mask& mask, bool over_channels, const Vectors& vectors, const void* scale, void* out);

// Of the backward: anchor_weight, affinity_weight (T, B) and radial_weight (B), see CSAGradient. grad () is that of the loss.
void coefficients(const Context& on, Type type, int64_t tasks, int64_t batch, const void* grad,
                  const void* weight, const void* similarity, const void* inverse,
                  const void* slope, void* anchor_weight, void* affinity_weight, void* radial_weight);

// da (T, B, C), over the number of a sample's positions: negatives () grad + factor (sum_t anchor_weight_t y_t - radial_weight radial). y
// (T, B, T, C) = S^_t S^_t^T u_v; factor, radial_weight (B); grad, radial (T, B, C).
struct AnchorGradient {
  const void *negatives, *grad, *factor, *anchor_weight, *y, *radial_weight, *radial;
};
void anchor_gradient(const Context& on, Type type, const Shape& shape, const Mask& mask,
                     const AnchorGradient& terms, void* da);

// What is added to the product with the Gram matrix, of all tasks: da (T, B, C) 1^T, 1 dx^T with dx
// (T, B, N) or null, and anchor_weight scale left (K, B, C) right^T (T, B, K, N).
struct Outer {
  const void *da, *dx;
  int64_t vectors;
  const void *left, *right;
};

// Stage `saliency_grad` in one pass over all tasks, for N <= kSmallPositions: outputs[i], of task
// tasks[i], = scale (affinity_weight S^ matrix / multiple + outer products) + the rest of `outer`; 0 at
// positions that are not there.
void small_gradient(const Context& on, Type type, const Shape& shape, int64_t count,
                    const int64_t* tasks, const View* views, const View* outputs,
                    const Mask& mask, const void* matrix, double multiple, const Coefficients& coefficients,
                    const Outer& outer);

// The same of one task from product = S matrix: (B, C, N), or (B, N, C) where `channels_are_adjacent`.
void add_outer(const Context& on, Type type, const Shape& shape, int64_t task, const View& output,
               const Mask& mask, const void* product, double multiple, const Coefficients& coefficients,
               const Outer& outer);

}  // namespace repmtl::cuda
