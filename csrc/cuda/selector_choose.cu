// Which patches a selector keeps, and how much of the package each of the others is:
//
//   score_i = Σ_h w_i^h verdict_i^h / Σ_h w_i^h,  w_i = sigmoid(weight_i)
//   share_i = P_i / Σ_pruned P_j,  P_i = sigmoid(score_i)

#include "cuda/choosing.h"
#include "cuda/ops.h"

namespace slimvit {
namespace {

// log sigmoid(score), which itself may be too small to hold.
__device__ float chance_of(float score) {
  return fminf(score, 0.0f) - logf(1.0f + expf(-fabsf(score)));
}

__device__ float score_of(const SelectorChoose& p, std::int64_t image, int patch) {
  const std::int64_t first = image * p.heads * p.p + patch, end = first + p.heads * p.p;
  float top = __int_as_float(0xff800000), score = 0, total = 0;
  for (std::int64_t at = first; at < end; at += p.p) top = fmaxf(top, p.weight[at]);
  for (std::int64_t at = first; at < end; at += p.p) {
    const float weight = expf(chance_of(p.weight[at]) - chance_of(top));
    score += weight * p.verdict[at];
    total += weight;
  }
  return score / total;
}

// Of all threads' values, the same for every thread. `scratch` must not be under other use.
template <class F>
__device__ float over_block(float value, Shared<float> scratch, F combine) {
  for (int far = 16; far > 0; far /= 2) value = combine(value, __shfl_xor_sync(~0u, value, far));
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  value = scratch[0];
  const int warps = blockDim.x / 32;
  for (int warp = 1; warp < warps; ++warp) value = combine(value, scratch[warp]);
  return value;
}

// Each thread has the same patches in every loop, and reads again what it wrote of them.
__device__ void write_shares(const SelectorChoose& p, const Choosing& choosing, std::int64_t image,
                             Shared<float> tops, Shared<float> totals) {
  const float* score = p.score + image * p.p;
  float* share = p.share + image * p.p;
  float top = __int_as_float(0xff800000), total = 0;
  for (int i = threadIdx.x; i < p.p; i += blockDim.x) {
    if (!choosing.kept.at(i)) top = fmaxf(top, chance_of(score[i]));
  }
  top = over_block(top, tops, [](float a, float b) { return fmaxf(a, b); });
  for (int i = threadIdx.x; i < p.p; i += blockDim.x) {
    share[i] = choosing.kept.at(i) ? 0.0f : expf(chance_of(score[i]) - top);
    total += share[i];
  }
  total = over_block(total, totals, [](float a, float b) { return a + b; });
  for (int i = threadIdx.x; i < p.p; i += blockDim.x) share[i] /= total;
}

// An image a block.
__global__ void __launch_bounds__(kMostThreads) selector_choose_kernel(SelectorChoose p) {
  Shared<unsigned char> memory = shared_memory();
  Choosing choosing(memory, p.p);
  Shared<float> tops = carve<float>(memory, 32), totals = carve<float>(memory, 32);
  const std::int64_t image = blockIdx.x;
  for (int i = threadIdx.x; i < p.p; i += blockDim.x) {
    const float score = score_of(p, image, i);
    p.score[image * p.p + i] = score;
    choosing.take(i, 0, score);
  }
  choosing.choose(p.n);
  write_shares(p, choosing, image, tops, totals);

  std::int64_t* index = p.index + image * (p.prefix + p.n + p.packages + 1);
  for (int i = threadIdx.x; i < p.p; i += blockDim.x) {
    if (choosing.kept.at(i)) index[p.prefix + choosing.kept.before(i)] = p.prefix + i;
  }
  for (int i = threadIdx.x; i < p.prefix; i += blockDim.x) index[i] = i;
  for (int i = threadIdx.x; i <= p.packages; i += blockDim.x) {  // the new one comes last
    index[p.prefix + p.n + i] = p.prefix + p.p + i;
  }
}

}  // namespace

void selector_choose(const SelectorChoose& p, void* stream) {
  const int shared = choosing_bytes(p.p) + 2 * 32 * 4;
  launch("selector_choose", selector_choose_kernel, dim3(p.batch), choosing_threads(p.p), shared,
         stream, p);
}

}  // namespace slimvit
