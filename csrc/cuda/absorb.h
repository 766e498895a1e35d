// What absorb weighs tokens by: the rule's formulas, which the kernels of absorb_*.cu share.
#pragma once

#include "cuda/device.h"

namespace slimvit {

// What a token is kept for. `nearest` is its greatest cosine to a more important patch.
__device__ inline float score_of(float importance, float nearest) {
  return sqrtf(importance) * (1.0f - nearest);
}

// Where no patch is more important.
constexpr float kFarthest = -1.0f;

// The score of a token that is no candidate.
__device__ inline float never_pruned() { return __int_as_float(0x7f800000); }

// Whether another patch is ahead of a token in importance; NaN is least.
__device__ inline bool is_ahead(float theirs, float mine, bool earlier) {
  const float least = -never_pruned();
  theirs = theirs == theirs ? theirs : least;
  mine = mine == mine ? mine : least;
  return theirs > mine || (theirs == mine && earlier);
}

// How much a token counts in the mean that it goes into: a mean needs a weight.
__device__ inline float weight_of(float importance) { return fmaxf(importance, 1e-20f); }

// The least norm, as of torch's normalize.
constexpr float kLeastNorm = 1e-12f;

}  // namespace slimvit
