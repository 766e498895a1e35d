// What absorb_scores needs of each token before it compares them: how much it matters in each head,
// and its row after the norm.
//
//   of_heads_h,i = mean_t softmax_j(q_t,h · k_j,h · scale + bias_j)_i ‖v_i,h‖

#include "cuda/absorb.h"
#include "cuda/ops.h"
#include "cuda/row_stats.h"

namespace slimvit {
namespace {

constexpr float kLog2e = 1.4426950408889634f;
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kRows = 16;               // that a block normalises
constexpr float kLeastRead = 2.4e-38f;  // attention below it is none

// Of all threads' values, the same for every thread. `scratch` must not be under other use.
template <class F>
__device__ float over_block(float value, Shared<float> scratch, F combine) {
  for (int far = 16; far > 0; far /= 2) value = combine(value, __shfl_xor_sync(~0u, value, far));
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  value = scratch[0];
  for (int warp = 1; warp < kWarps; ++warp) value = combine(value, scratch[warp]);
  return value;
}

// A key a thread.
template <class T>
__device__ void importance_in_head(const AbsorbScores& p, int image, int head) {
  Shared<unsigned char> memory = shared_memory();
  Shared<float> q = carve<float>(memory, p.d);
  Shared<float> tops = carve<float>(memory, kWarps), totals = carve<float>(memory, kWarps);
  Shared<float> weights = carve<float>(memory, p.m), attention = carve<float>(memory, p.m);
  const int inner = p.heads * p.d;
  const T* queries = static_cast<const T*>(p.q) + std::int64_t(image) * p.tokens * inner;
  const T* keys = static_cast<const T*>(p.kv) + std::int64_t(image) * p.m * 2 * inner + head * p.d;
  const float* bias = p.key_bias == nullptr ? nullptr : p.key_bias + std::int64_t(image) * p.m;
  for (int t = 0; t < p.tokens; ++t) {
    __syncthreads();
    for (int i = threadIdx.x; i < p.d; i += kThreads) {
      q[i] = to_float(queries[t * inner + head * p.d + i]) * p.scale * kLog2e;
    }
    __syncthreads();
    float top = __int_as_float(0xff800000);
    for (int j = threadIdx.x; j < p.m; j += kThreads) {
      float logit = bias == nullptr ? 0.0f : bias[j] * kLog2e;
      for (int c = 0; c < p.d; c += 8) {
        float values[8];
        unpack<T>(load16(keys + std::int64_t(j) * 2 * inner + c), values);
#pragma unroll
        for (int i = 0; i < 8; ++i) logit += q[c + i] * values[i];
      }
      weights[j] = logit;
      top = fmaxf(top, logit);
    }
    top = over_block(top, tops, [](float a, float b) { return fmaxf(a, b); });
    float total = 0;
    for (int j = threadIdx.x; j < p.m; j += kThreads) {
      const float weight = exp2f(weights[j] - top);
      weights[j] = weight;
      total += weight;
    }
    total = over_block(total, totals, [](float a, float b) { return a + b; });
    for (int j = threadIdx.x; j < p.m; j += kThreads) {
      attention[j] = (t == 0 ? 0.0f : float(attention[j])) + weights[j] / total;
    }
  }
  float* out = p.of_heads + (std::int64_t(image) * p.heads + head) * p.m;
  for (int j = threadIdx.x; j < p.m; j += kThreads) {
    float square = 0;
    for (int c = 0; c < p.d; c += 8) {
      float values[8];
      unpack<T>(load16(keys + std::int64_t(j) * 2 * inner + inner + c), values);
#pragma unroll
      for (int i = 0; i < 8; ++i) square += values[i] * values[i];
    }
    const float read = attention[j] / p.tokens;
    out[j] = (read < kLeastRead ? 0.0f : read) * sqrtf(square);
  }
}

// A row a warp at a time.
template <class T>
__device__ void normalise_rows(const AbsorbScores& p, int image, int first) {
  const int lane = threadIdx.x % 32;
  const int end = min(first + kRows, p.m);
  for (int row = first + threadIdx.x / 32; row < end; row += kWarps) {
    const std::int64_t at = std::int64_t(image) * p.m + row;
    const Norm norm = norm_of(p.stats + at * p.x_parts * 2, p.x_parts, p.width, p.eps);
    float square = 0;
    for (int i = 8 * lane; i < p.width; i += 256) {
      float values[8];
      unpack<T>(load16(static_cast<const T*>(p.x) + at * p.width + i), values);
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        values[k] = (values[k] - norm.mean) * norm.rstd * p.norm_weight[i + k] + p.norm_bias[i + k];
      }
      const uint4 packed = pack<T>(values);
      store16(static_cast<T*>(p.normed) + at * p.width + i, packed);
      unpack<T>(packed, values);
#pragma unroll
      for (int k = 0; k < 8; ++k) square += values[k] * values[k];
    }
    for (int far = 16; far > 0; far /= 2) square += __shfl_xor_sync(~0u, square, far);
    if (lane == 0) p.shrink[at] = 1.0f / fmaxf(sqrtf(square), kLeastNorm);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) absorb_importance_kernel(AbsorbScores p) {
  const int block = blockIdx.x, image = blockIdx.y;
  if (block < p.heads) {
    importance_in_head<T>(p, image, block);
  } else {
    normalise_rows<T>(p, image, (block - p.heads) * kRows);
  }
}

}  // namespace

void absorb_importance(const AbsorbScores& p, Type type, void* stream) {
  const auto kernel =
      type == Type::half ? absorb_importance_kernel<Half> : absorb_importance_kernel<BFloat16>;
  const int shared = ceil_div(p.d * 4, 32) * 32 + 2 * kWarps * 4 + 2 * ceil_div(p.m * 4, 32) * 32;
  const dim3 grid(p.heads + ceil_div(p.m, kRows), p.batch);
  launch("absorb_importance", kernel, grid, kThreads, shared, stream, p);
}

}  // namespace slimvit
