#pragma once

#include "cpu/numbers.h"

namespace slimvit {
namespace {

// kRows rows at a time, so that the sums across one row's lanes overlap with another's.
template <class S, int kRows, typename Out>
SLIMVIT_INLINE void layer_norm_rows(const float* x, long ldx, long width, const float* weight,
                                    const float* bias, float eps, Out* y, long ldy) {
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
    scale[r] = S::set(1.0f / __builtin_sqrtf(variance + eps));
  }
  for (long c = 0; c < width; c += S::kLanes) {
    const auto w = S::load(weight + c), b = S::load(bias + c);
    for (int r = 0; r < kRows; ++r) {
      const auto normal = S::mul(S::sub(S::load(x + r * ldx + c), mean[r]), scale[r]);
      S::store(y + r * ldy + c, S::fma(normal, w, b));
    }
  }
}

// y = (x - mean) / sqrt(variance + eps) · weight + bias for rows of float32; T or float32 comes
// out, also in place. `width` is a multiple of the lanes.
template <class S, typename Out>
void layer_norm(const float* x, long ldx, long rows, long width, const float* weight,
                const float* bias, float eps, Out* y, long ldy) {
  long r = 0;
  for (; r + 4 <= rows; r += 4)
    layer_norm_rows<S, 4>(x + r * ldx, ldx, width, weight, bias, eps, y + r * ldy, ldy);
  for (; r < rows; ++r)
    layer_norm_rows<S, 1>(x + r * ldx, ldx, width, weight, bias, eps, y + r * ldy, ldy);
}

}  // namespace
}  // namespace slimvit
