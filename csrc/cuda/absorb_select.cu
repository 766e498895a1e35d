// Which tokens are kept, and which of those each of the others goes into: the patch of the greatest
// cosine. Every block of an image finds the kept ones for itself, and then does its own rows.

#include "cuda/absorb.h"
#include "cuda/choosing.h"
#include "cuda/ops.h"

namespace slimvit {
namespace {

constexpr int kRowsOfWarp = 4;

__device__ inline float lowest() { return __int_as_float(0xff800000); }

// The kept patch of the greatest cosine, among equals the first; NaN is the lowest. A warp's work.
__device__ int nearest_of(const Choosing& choosing, const float* cosine, int prefix) {
  const int none = choosing.m;
  float best = lowest();
  int found = none;
  for (int token = threadIdx.x % 32; token < choosing.m; token += 32) {
    if (token < prefix || !choosing.kept.at(token)) continue;
    const float value = cosine[token];
    if (found == none || value > best) {
      best = value == value ? value : lowest();
      found = token;
    }
  }
  float most = best;
  for (int far = 16; far > 0; far /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, far));
  if (best != most) found = none;
  for (int far = 16; far > 0; far /= 2) found = min(found, __shfl_xor_sync(~0u, found, far));
  return found;
}

__global__ void __launch_bounds__(kMostThreads) absorb_select_kernel(AbsorbSelect p) {
  Shared<unsigned char> memory = shared_memory();
  Choosing choosing(memory, p.m);
  const std::int64_t image = blockIdx.y;
  for (int token = threadIdx.x; token < p.m; token += blockDim.x) {
    choosing.take(token, p.prefix, p.score[image * p.m + token]);
  }
  choosing.choose(p.n);
  if (blockIdx.x == 0) choosing.write(p.index + image * p.n);

  const int warps = blockDim.x / 32;
  const int first = (blockIdx.x * warps + threadIdx.x / 32) * kRowsOfWarp;
  for (int token = first; token < min(first + kRowsOfWarp, p.m); ++token) {
    const std::int64_t at = image * p.m + token;
    int target = token;
    if (!choosing.kept.at(token)) {
      target = nearest_of(choosing, p.cosine + at * p.m, p.prefix);
    }
    const int place = choosing.kept.before(target);
    if (threadIdx.x % 32 == 0) p.into[at] = place;
  }
}

}  // namespace

void absorb_select(const AbsorbSelect& p, void* stream) {
  const int threads = choosing_threads(p.m);
  const dim3 grid(ceil_div(p.m, threads / 32 * kRowsOfWarp), p.batch);
  launch("absorb_select", absorb_select_kernel, grid, threads, choosing_bytes(p.m), stream, p);
}

}  // namespace slimvit
