#pragma once

#include "cuda/device.h"

namespace slimvit {

struct Moments {
  float mean;
  float variance;
};

// Of a row of `width` whose `parts` equal parts have mean and squared deviations in `stats`. Each
// part's deviations are about its own mean, so nothing cancels.
__device__ inline Moments moments_of(const float* stats, int parts, int width) {
  float mean = 0;
  for (int i = 0; i < parts; ++i) mean += stats[2 * i];
  mean /= parts;
  float square = 0;
  for (int i = 0; i < parts; ++i) {
    const float apart = stats[2 * i] - mean;
    square += stats[2 * i + 1] + width / parts * apart * apart;
  }
  return {mean, square / width};
}

struct Norm {
  float mean;
  float rstd;
};

__device__ inline Norm norm_of(const float* stats, int parts, int width, float eps) {
  const Moments moments = moments_of(stats, parts, width);
  return {moments.mean, rsqrtf(moments.variance + eps)};
}

// Mean and squared deviations of the values of `lanes` neighbouring lanes, eight in each; the first
// of them writes, and adds `more` to the deviations.
__device__ inline void store_stats(float* to, const float (&values)[8], int lanes, bool live,
                                   float more = 0) {
  float sum = 0;
  for (float value : values) sum += value;
  for (int far = 1; far < lanes; far *= 2) sum += __shfl_xor_sync(~0u, sum, far);
  const float mean = sum / (8 * lanes);
  float square = 0;
  for (float value : values) square += (value - mean) * (value - mean);
  for (int far = 1; far < lanes; far *= 2) square += __shfl_xor_sync(~0u, square, far);
  if (live && threadIdx.x % lanes == 0) {
    to[0] = mean;
    to[1] = square + more;
  }
}

}  // namespace slimvit
