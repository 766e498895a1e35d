#pragma once

#include "cpu/alive.h"
#include "cpu/numbers.h"

namespace slimvit {
namespace {

// 1 / sqrt(square), or NaN where that has overflowed: 0 would make every such row the norm's bias,
// and the answer the same finite one whatever the image.
inline float norm_scale(float square) { return 1.0f / __builtin_sqrtf(square) + 0.0f * square; }

// A row's variance to what the norm scales it by.
struct Scale {
  float eps;

  float operator()(long, float variance) const { return norm_scale(variance + eps); }
};

// Of rows that may stand for several tokens: `spread` is the mean squared deviation of these from
// the row, per channel, and by as much is the row's variance less than theirs. `share` [rows], or
// null, is then what the spread comes to after the norm: slimvit/ops/spread.py.
struct SpreadScale {
  const Alive& alive;
  long first, per_image;  // the first row, and how many an image has
  float eps;
  float* share;

  float operator()(long row, float variance) const {
    const long image = (first + row) / per_image, token = (first + row) % per_image;
    const float spread = alive.of(image).spread[token];
    const float root = norm_scale(variance + spread + eps);
    if (share != nullptr) share[row] = spread * root * root;  // root² alone may overflow
    return root;
  }
};

// kRows rows at a time, so that the sums across one row's lanes overlap with another's; `row` is
// what `scale_of` calls the first of them.
template <class S, int kRows, typename Out, class ScaleOf>
SLIMVIT_INLINE void layer_norm_rows(const float* x, long ldx, long width, const float* weight,
                                    const float* bias, const ScaleOf& scale_of, long row, Out* y,
                                    long ldy) {
  typename S::F mean[kRows], scale[kRows];
  for (int r = 0; r < kRows; ++r) mean[r] = scale[r] = S::zero();
  for (long c = 0; c < width; c += S::kLanes)
    for (int r = 0; r < kRows; ++r) mean[r] = S::add(mean[r], S::load(x + r * ldx + c));
  for (int r = 0; r < kRows; ++r) mean[r] = S::set(S::sum(mean[r]) / static_cast<float>(width));
  for (long c = 0; c < width; c += S::kLanes)
    for (int r = 0; r < kRows; ++r) {
      const auto centred = S::sub(S::load(x + r * ldx + c), mean[r]);
      scale[r] = S::fma(centred, centred, scale[r]);
    }
  for (int r = 0; r < kRows; ++r) {
    const float variance = S::sum(scale[r]) / static_cast<float>(width);
    scale[r] = S::set(scale_of(row + r, variance));
  }
  for (long c = 0; c < width; c += S::kLanes) {
    const auto w = S::load(weight + c), b = S::load(bias + c);
    for (int r = 0; r < kRows; ++r) {
      const auto normal = S::mul(S::sub(S::load(x + r * ldx + c), mean[r]), scale[r]);
      S::store(y + r * ldy + c, S::fma(normal, w, b));
    }
  }
}

// y = (x - mean) · scale · weight + bias for rows of float32, scale = 1 / sqrt(variance + eps) or
// as `scale_of` says; T or float32 comes out, also in place. `width` is a multiple of the lanes.
template <class S, typename Out, class ScaleOf>
void layer_norm(const float* x, long ldx, long rows, long width, const float* weight,
                const float* bias, const ScaleOf& scale_of, Out* y, long ldy) {
  long r = 0;
  for (; r + 4 <= rows; r += 4)
    layer_norm_rows<S, 4>(x + r * ldx, ldx, width, weight, bias, scale_of, r, y + r * ldy, ldy);
  for (; r < rows; ++r)
    layer_norm_rows<S, 1>(x + r * ldx, ldx, width, weight, bias, scale_of, r, y + r * ldy, ldy);
}

}  // namespace
}  // namespace slimvit
