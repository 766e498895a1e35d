// Which tokens of each image are kept, by scores that are given or that a last layer makes.

#include "cuda/choosing.h"
#include "cuda/ops.h"

namespace slimvit {
namespace {

template <class T>
__device__ float score_at(const TopTokens& p, std::int64_t row) {
  if (p.weight == nullptr) return static_cast<const float*>(p.scores)[row];
  const T* hidden = static_cast<const T*>(p.scores) + row * p.channels;
  float score = 0;
  for (int c = 0; c < p.channels; c += 8) {
    float values[8];
    unpack<T>(load16(hidden + c), values);
#pragma unroll
    for (int i = 0; i < 8; ++i) score += values[i] * p.weight[c + i];
  }
  return score;
}

// An image a block.
template <class T>
__global__ void __launch_bounds__(kMostThreads) top_tokens_kernel(TopTokens p) {
  Shared<unsigned char> memory = shared_memory();
  Choosing choosing(memory, p.m);
  const std::int64_t image = blockIdx.x;
  for (int token = threadIdx.x; token < p.m; token += blockDim.x) {
    choosing.take(token, p.prefix, score_at<T>(p, image * p.m + token));
  }
  choosing.choose(p.n);
  choosing.write(p.index + image * p.n);
}

}  // namespace

void top_tokens(const TopTokens& p, Type type, void* stream) {
  const auto kernel = type == Type::half ? top_tokens_kernel<Half> : top_tokens_kernel<BFloat16>;
  launch("top_tokens", kernel, dim3(p.batch), choosing_threads(p.m), choosing_bytes(p.m), stream,
         p);
}

}  // namespace slimvit
