// Saliencies as matrices whose rows lie along memory, and copies of their rows.
#pragma once

#include <algorithm>
#include <type_traits>

#include "stage.h"

namespace repmtl {

// Copies `count` numbers as float.
void widen_row(const bfloat16* from, int64_t count, float* to);
void widen_row(const float16* from, int64_t count, float* to);

// Writes zeros where the mask is zero, even over NaN.
void keep(const unsigned char* mask, int64_t count, float* row);
void keep(const unsigned char* mask, int64_t count, double* row);

// Copies `count` numbers, and zeros where the mask is zero.
void copy_present(const float* from, const unsigned char* mask, int64_t count, float* to);
void copy_present(const double* from, const unsigned char* mask, int64_t count, double* to);

// Returns sum x y.
float dot(const float* x, const float* y, int64_t count);
double dot(const double* x, const double* y, int64_t count);

// to (count) += weight * row (count)
void add_row(const float* row, float weight, int64_t count, float* to);
void add_row(const double* row, double weight, int64_t count, double* to);

// Saliencies of one task and sample as a matrix. Rows are channels or positions.
template <typename S>
struct Rows {
  const S* data;
  int64_t row_stride, stride;            // between rows, and between the elements of a row
  const int64_t *row_offsets, *offsets;  // replace a stride, unless null
  const unsigned char *row_mask,
      *mask;  // which rows, and which elements of a row, are present; or null

  // Returns whether the elements of a row are adjacent, and all of them are present.
  bool complete() const { return stride == 1 && !row_offsets && !offsets && !row_mask && !mask; }

  // Returns whether rows can be read in place.
  bool direct() const { return std::is_same_v<S, acc_t<S>> && complete(); }

  // Copies `count` elements of row r from `begin` on.
  void copy(int64_t r, int64_t begin, int64_t count, acc_t<S>* to) const {
    if (row_mask && !row_mask[r]) {
      std::fill_n(to, count, acc_t<S>(0));
      return;
    }
    const S* from = data + (row_offsets ? row_offsets[r] : r * row_stride);
    if (offsets) {
      for (int64_t i = 0; i < count; ++i) to[i] = static_cast<acc_t<S>>(from[offsets[begin + i]]);
    } else if (stride != 1) {
      from += begin * stride;
      for (int64_t i = 0; i < count; ++i) to[i] = static_cast<acc_t<S>>(from[i * stride]);
    } else if constexpr (std::is_same_v<S, acc_t<S>>) {
      if (mask) return copy_present(from + begin, mask + begin, count, to);
      std::copy_n(from + begin, count, to);
    } else {
      widen_row(from + begin, count, to);
    }
    if (mask) keep(mask + begin, count, to);
  }
};

// Returns whether the positions of a channel lie along memory, not the channels of a position.
template <typename S>
bool channels_are_rows(const View<const S>& view, int64_t positions) {
  return view.channel_stride != 1 || (view.position_stride == 1 && positions > 1);
}

// Returns sample b of a view, with the mask (N) of that sample or null.
template <typename S>
Rows<S> rows_of(const View<const S>& view, int64_t b, bool by_channel, const unsigned char* mask) {
  const S* data = view.data + b * view.batch_stride;
  const int64_t* offsets = view.offsets.empty() ? nullptr : view.offsets.data();
  if (by_channel) {
    return {data, view.channel_stride, view.position_stride, nullptr, offsets, nullptr, mask};
  }
  return {data, view.position_stride, view.channel_stride, offsets, nullptr, mask, nullptr};
}

}  // namespace repmtl
