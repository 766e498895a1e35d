#pragma once

#include "cpu/numbers.h"

namespace slimvit {
namespace {

// y = (x - mean) / sqrt(variance + eps) · weight + bias for rows of float32; T or float32 comes out,
// also in place. `width` is a multiple of the lanes.
template <class S, typename Out>
void layer_norm(const float* x, long ldx, long rows, long width, const float* weight,
                const float* bias, float eps, Out* y, long ldy) {
  for (long r = 0; r < rows; ++r, x += ldx, y += ldy) {
    auto sum = S::zero();
    for (long c = 0; c < width; c += S::kLanes) sum = S::add(sum, S::load(x + c));
    const auto mean = S::set(S::sum(sum) / static_cast<float>(width));
    auto squares = S::zero();
    for (long c = 0; c < width; c += S::kLanes) {
      const auto centred = S::sub(S::load(x + c), mean);
      squares = S::fma(centred, centred, squares);
    }
    const float variance = S::sum(squares) / static_cast<float>(width);
    const auto scale = S::set(1.0f / __builtin_sqrtf(variance + eps));
    for (long c = 0; c < width; c += S::kLanes) {
      const auto normal = S::mul(S::sub(S::load(x + c), mean), scale);
      S::store(y + c, S::fma(normal, S::load(weight + c), S::load(bias + c)));
    }
  }
}

}  // namespace
}  // namespace slimvit
