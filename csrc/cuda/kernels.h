// The CUDA kernels as functions of pointers, strides and a stream, without PyTorch. Accumulators,
// means and everything computed from them are double for double saliencies, otherwise float.
#pragma once

#include <cstdint>
#include <string>

#include "../common/shape.h"

namespace repmtl::cuda {

enum class Type { kDouble, kFloat, kBFloat16, kHalf };

// One task's saliencies or their gradient (B, C, N). Position n is at place (n / (size[0] size[1]),
// n / size[1] % size[0], n % size[1]) of a grid with strides. All strides count elements.
struct View {
  void* data;
  int64_t batch, channel;
  int64_t stride[3];
  int64_t size[2];

  bool has_single_stride() const { return size[0] * size[1] == 1; }
};

// Scratch memory of one call, aligned for any type. Its maker releases it.
struct Workspace {
  virtual void* take(int64_t bytes) = 0;

 protected:
  ~Workspace() = default;
};

struct Context {
  void* stream;
  Workspace* workspace;
};

// Which positions are present, in all tasks. Saliencies count as 0 at the others, even NaN.
struct Mask {
  const unsigned char* valid;  // (B, N), 1 or 0; null: all are present
  const void* counts;          // (B), accumulators: the number of present positions of a sample
};

// The scales that turn S into S^, and the weights of the gradient of the scaled products; from
// CSAGradient.
struct Coefficients {
  const void *scale, *anchor_weight, *affinity_weight;  // (T, B)
};

// Returns why the current device can't run the kernels, or an empty string.
std::string why_not();

// Returns the mask `valid` (B, N) with its counts, which lie in scratch memory. Null has none.
Mask counted_mask(const Context& on, Type type, int64_t batch, int64_t positions,
                  const unsigned char* valid);

// Stage `statistics`: writes the means over channels to positions (T, B, N), the means over
// positions to channels (T, B, C), and scale (T, B). Each may be null.
void statistics(const Context& on, Type type, const Shape& shape, const View* views,
                const Mask& mask, void* positions, void* channels, void* scale);

// Stage `affinity`: writes products (B, T, T), double: the sums of S_bt S_bu over channels and
// positions. valid (B, N), 1 or 0, says which positions are present; null: all are.
void affinity(const Context& on, Type type, const Shape& shape, const View* views,
              const unsigned char* valid, double* products);

struct EntropyOptions {
  bool over_tasks;  // otherwise over the positions of a sample
  bool softmax;     // otherwise |x| / (sum |x| + eps)
  double temperature, floor, eps;
};

// Stage `entropy` of x, or of |x| + floor mean |x| with a floor, at the positions that are present.
// At the others x is 0, and so is its gradient, unless it is NaN.
// x (T, B, N) of `type`; value (); grad (T, B, N) or null.
void entropy(const Context& on, Type type, int64_t tasks, int64_t batch, int64_t positions,
             const void* x, const Mask& mask, const EntropyOptions& options, void* value,
             void* grad);

// Stage `anchors`: u (T, B, C) = factor (B) a (T, B, C). radial (T, B, C) or null is the part that
// normalisation takes out of a gradient.
void unit_anchors(const Context& on, Type type, int64_t tasks, int64_t batch, int64_t channels,
                  const void* a, double eps, void* u, void* factor, void* radial);

// Stage `contrast`, between the products of anchors. Similarities are r_mk = sum_tv dots^2, where
// dots (T, M, T, B) holds the products u_t,first+m . u_vk. The peaks of a set of similarities are
// two numbers: the largest, at least 0, and the sum of exp((r - largest) / temperature).
// Writes logsumexp (M) of r_mk / temperature over k != first + m, and rows (2, M), the peaks of the
// same sets. columns (2, B) or null holds the peaks over the samples of earlier blocks; this block
// is added to them.
void log_sum_exp(const Context& on, Type type, int64_t tasks, int64_t batch, int64_t first,
                 int64_t samples, const void* dots, double temperature, void* logsumexp, void* rows,
                 void* columns);

// Multiplies dots (T, M, T, B) with 2 / (temperature B) (softmax_m[k] + softmax_k[m]), both
// computed from r_mk. rows (2, M) and columns (2, B) are the peaks of `log_sum_exp`.
void weigh_dots(const Context& on, Type type, int64_t tasks, int64_t batch, int64_t first,
                int64_t samples, void* dots, const void* rows, const void* columns,
                double temperature);

// Turns du (T, B, C), the gradient at u, into the gradient at a:
// factor (du - (sum_t du . u) radial). u, radial (T, B, C); factor (B).
void through_normalisation(const Context& on, Type type, int64_t tasks, int64_t batch,
                           int64_t channels, const void* u, const void* factor, const void* radial,
                           void* du);

// Writes CSA to value (): the mean of logsumexp (B) plus the sum of weight similarity, both (T, B).
// Also writes weight: minus the share of a task in the mean over (present) tasks and the batch,
// divided by the temperature. present (T, B) of bytes, or null.
void csa_value(const Context& on, Type type, int64_t tasks, int64_t batch, const void* logsumexp,
               const void* similarity, const unsigned char* present, double temperature,
               void* weight, void* value);

// The largest Gram matrix of `small_gram`, and its largest number of tasks.
constexpr int64_t kSmallPositions = 64;
constexpr int64_t kSmallTasks = 8;

// The results of `gram` for each task and sample (T, B).
struct Similarities {
  void *similarity, *inverse, *slope;
};

// Stage `gram` in one pass, for N <= kSmallPositions and N <= C. scale (T, B), u (T, B, C).
// Writes projection (T, B, T, N) = S^^T u, and matrix (T, B, N, N) of `type`, `multiple` times the
// Gram matrix of S^. Either may be null.
void small_gram(const Context& on, Type type, const Shape& shape, const View* views,
                const Mask& mask, const void* scale, const void* u, double eps, double multiple,
                const Similarities& out, void* projection, void* matrix);

// Writes the dense product scale (B) S of one task: (B, C, N), or (B, N, C) if
// `channels_are_adjacent`. With a mask `scale` may be null, which means 1.
void scaled_copy(const Context& on, Type type, const Shape& shape, const View& view,
                 const Mask& mask, const void* scale, void* to);

// Returns whether the channels of a position lie side by side, and not the positions of a channel.
bool channels_are_adjacent(const View& view, const Shape& shape);

// Takes block (B, rows, columns), rows `first` to `first + rows` of the lower half of symmetric
// matrices (B, R, R), where columns = first + rows and R = side. Writes them and their mirror
// images, times `multiple`, to matrix (B, R, R), unless it is null. Writes sums of their squares,
// upper half included, to squares (B, parts), from `part` on: gram_parts(rows, columns) of them.
// `first` is a multiple of kGramTile.
constexpr int64_t kGramTile = 32;
int64_t gram_parts(int64_t rows, int64_t columns);
void gram_block(const Context& on, Type type, int64_t batch, int64_t side, int64_t first,
                int64_t rows, const void* block, double multiple, void* matrix, void* squares,
                int64_t part, int64_t parts);

// Writes the similarities from squares (T, B, parts) and w (T, B, length) = S^^T u. scale (T, B).
void gram_finish(const Context& on, Type type, int64_t tasks, int64_t batch, const void* squares,
                 int64_t parts, const void* w, int64_t length, const void* scale, double eps,
                 const Similarities& out);

// `count` vectors for each task and sample, such as anchors. The elements of a vector are adjacent;
// vector k of task t and sample b starts at data + t * task + b * batch + k * column.
struct Vectors {
  const void* data;
  int64_t count, task, batch, column;
};

// Multiplies scaled saliencies with vectors v: out (T, B, count, N) = scale sum_c S v, or over
// positions out (T, B, count, C). scale (T, B).
void products(const Context& on, Type type, const Shape& shape, const View* views, const Mask& mask,
              bool over_channels, const Vectors& vectors, const void* scale, void* out);

// Writes the weights of the gradient, see CSAGradient: anchor_weight, affinity_weight (T, B) and
// radial_weight (B). grad () is the gradient of the loss; the others (T, B) come from the forward
// pass.
void coefficients(const Context& on, Type type, int64_t tasks, int64_t batch, const void* grad,
                  const void* weight, const void* similarity, const void* inverse,
                  const void* slope, void* anchor_weight, void* affinity_weight,
                  void* radial_weight);

struct AnchorGradient {
  const void* negatives;      // ()
  const void* grad;           // (T, B, C): the gradient of the negatives
  const void* factor;         // (B)
  const void* anchor_weight;  // (T, B)
  const void* y;              // (T, B, T, C): S^_t S^_t^T u_v
  const void* radial_weight;  // (B)
  const void* radial;         // (T, B, C)
};

// Writes da (T, B, C) = negatives grad + factor (sum_t anchor_weight_t y_t - radial_weight radial),
// divided by the number of a sample's positions.
void anchor_gradient(const Context& on, Type type, const Shape& shape, const Mask& mask,
                     const AnchorGradient& terms, void* da);

// The terms that are added to the product with the Gram matrix, for all tasks: da 1^T, 1 dx^T, and
// anchor_weight scale sum_k left_k right_k^T. da (T, B, C), dx (T, B, N) or null, left (K, B, C),
// right (T, B, K, N), where K = vectors.
struct Outer {
  const void *da, *dx;
  int64_t vectors;
  const void *left, *right;
};

// Stage `saliency_grad` in one pass over `count` tasks, for N <= kSmallPositions.
// Writes outputs[i], the gradient of task tasks[i] with saliencies views[i]:
// scale (affinity_weight S^ matrix / multiple + outer products) + the other terms of `outer`,
// and 0 at positions that are absent. matrix (T, B, N, N).
void small_gradient(const Context& on, Type type, const Shape& shape, int64_t count,
                    const int64_t* tasks, const View* views, const View* outputs, const Mask& mask,
                    const void* matrix, double multiple, const Coefficients& coefficients,
                    const Outer& outer);

// The same for one task, from product = S matrix: (B, C, N), or (B, N, C) if
// `channels_are_adjacent`.
void add_outer(const Context& on, Type type, const Shape& shape, int64_t task, const View& output,
               const Mask& mask, const void* product, double multiple,
               const Coefficients& coefficients, const Outer& outer);

}  // namespace repmtl::cuda
