#include <algorithm>
#include <cmath>
#include <vector>

#include "rows.h"
#include "small_products.h"

namespace repmtl {
namespace {

// Channels at a time: a row of them for each task stays in the first cache.
constexpr int64_t kBlock = 512;

// Writes `count` scaled channels of sample b, from channel `begin` on; zeros if it is absent.
void scaled_row(const View<const float>& view, int64_t b, const unsigned char* mask, float scale,
                int64_t begin, int64_t count, float* to) {
  rows_of(view, b, false, mask).copy(0, begin, count, to);
  for (int64_t c = 0; c < count; ++c) to[c] *= scale;
}

}  // namespace

void pooled_gram(const Shape& shape, const View<const float>* views, const float* scale,
                 const float* anchors, const unsigned char* mask, float* norm, float* positive,
                 float* projection, float* matrix, const ParallelFor& parallel_for) {
  const int64_t tasks = shape.tasks, batch = shape.batch, C = shape.channels;
  parallel_for(batch, grain_of(tasks * tasks * C), [&](int64_t begin, int64_t end) {
    std::vector<float> row(C);
    for (int64_t b = begin; b < end; ++b) {
      for (int64_t t = 0; t < tasks; ++t) {
        const int64_t i = t * batch + b;
        scaled_row(views[t], b, mask ? mask + b : nullptr, scale[i], 0, C, row.data());
        norm[i] = dot(row.data(), row.data(), C);
        if (matrix) matrix[i] = norm[i];
        double sum = 0;
        for (int64_t k = 0; k < tasks; ++k) {
          const float x = dot(anchors + (k * batch + b) * C, row.data(), C);
          sum += static_cast<double>(x) * x;
          if (projection) projection[i * tasks + k] = x;
        }
        positive[i] = static_cast<float>(sum);
      }
    }
  });
}

void pooled_gradient(const Shape& shape, const View<const float>* views, const SmallGradient& g,
                     const std::vector<int64_t>& wanted, const View<float>* outputs,
                     const ParallelFor& parallel_for) {
  const int64_t tasks = shape.tasks, batch = shape.batch, C = shape.channels;
  parallel_for(batch, grain_of(tasks * tasks * C), [&](int64_t begin, int64_t end) {
    std::vector<float> rows(tasks * kBlock), sum(kBlock);
    for (int64_t b = begin; b < end; ++b) {
      const unsigned char* mask = g.mask ? g.mask + b : nullptr;
      for (int64_t c = 0; c < C; c += kBlock) {
        const int64_t count = std::min(kBlock, C - c);
        for (int64_t t = 0; t < tasks; ++t) {
          scaled_row(views[t], b, mask, g.scale[t * batch + b], c, count, &rows[t * kBlock]);
        }
        for (size_t k = 0; k < wanted.size(); ++k) {
          const int64_t t = wanted[k], i = t * batch + b, at = i * C + c;
          // through the means over positions, which are the saliencies themselves
          std::fill(sum.begin(), sum.end(), g.position_grad ? g.position_grad[i] : 0.0f);
          add_row(g.contrast_grad + at, *g.negatives, count, sum.data());
          add_row(g.radial + at, -g.factor[b] * g.radial_weight[b], count, sum.data());
          for (int64_t v = 0; v < tasks; ++v) {
            const int64_t j = v * batch + b;
            float weight = g.factor[b] * g.anchor_weight[j] * g.projection[j * tasks + t];
            if (v == t) weight += g.affinity_weight[i] * g.scale[i] * g.matrix[i];
            add_row(&rows[v * kBlock], weight, count, sum.data());
            add_row(g.anchors + j * C + c,
                    g.anchor_weight[i] * g.scale[i] * g.projection[i * tasks + v], count,
                    sum.data());
          }
          if (mask && !*mask) std::fill(sum.begin(), sum.end(), 0.0f);
          for (int64_t r = 0; r < count; ++r) *outputs[k].at(b, c + r, 0) = sum[r];
        }
      }
    }
  });
}

}  // namespace repmtl
