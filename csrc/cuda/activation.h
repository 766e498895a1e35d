#pragma once

#include "cuda/device.h"
#include "cuda/ops.h"

namespace slimvit {

__device__ inline float sigmoid(float x) { return 1.0f / (1.0f + __expf(-x)); }

// x Φ(x): Φ(x) - 1/2 = x P(x²) within 3e-5 on |x| ≤ 4 and exactly 1/2 at 4, well under a rounding
// to half precision, at a third of the instructions of erf.
__device__ inline float gelu(float x) {
  const float c = fminf(fmaxf(x, -4.0f), 4.0f);
  const float t = c * c;
  float p = -1.2769983959159958e-09f;
  p = fmaf(p, t, 1.0438540698487486e-07f);
  p = fmaf(p, t, -3.7082920698594535e-06f);
  p = fmaf(p, t, 7.617470691911876e-05f);
  p = fmaf(p, t, -0.0010209493339061737f);
  p = fmaf(p, t, 0.009581082500517368f);
  p = fmaf(p, t, -0.06606367230415344f);
  p = fmaf(p, t, 0.3988053798675537f);
  return x * fmaf(c, p, 0.5f);
}

// Of eight values at a time, so that the choice is made once for them.
__device__ inline void activate(float (&x)[8], Activation activation) {
  switch (activation) {
    case Activation::gelu:
#pragma unroll
      for (float& value : x) value = gelu(value);
      break;
    case Activation::gelu_tanh:  // 0.5 (1 + tanh(u)) = sigmoid(2 u)
#pragma unroll
      for (float& value : x) {
        value *= sigmoid(1.5957691216057308f * (value + 0.044715f * value * value * value));
      }
      break;
    case Activation::quick_gelu:
#pragma unroll
      for (float& value : x) value *= sigmoid(1.702f * value);
      break;
    case Activation::none:
      break;
  }
}

// The mean of act(x + sqrt(s) g) over normal g: exactly for GELU, of which the others are
// approximations. With r = 1 / sqrt(1 + s) and z = r x it is (act(z) + (1 - r²) φ(z)) / r.
__device__ inline void activate(float (&x)[8], const float (&s)[8], Activation activation) {
  if (activation == Activation::none) return;
  float bump[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    x[i] *= rsqrtf(1.0f + s[i]);
    bump[i] = s[i] * 0.3989422804014327f * __expf(-0.5f * x[i] * x[i]);
  }
  activate(x, activation);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    x[i] = rsqrtf(1.0f + s[i]) * fmaf(1.0f + s[i], x[i], bump[i]);
  }
}

}  // namespace slimvit
