// Attention of the one or two tokens that the head reads, in the last block, without keys and
// values: see kernels/last_attention.py for why none are needed.
//
//   z = Σ_j softmax_j(u · ŷ_j · scale + bias_j) ŷ_j,   ŷ = (x - mean) · rstd

#include "cuda/device.h"
#include "cuda/ops.h"
#include "cuda/row_stats.h"

namespace slimvit {
namespace {

constexpr int kWarps = 16;
constexpr int kRows = 16;     // in shared memory at a time
constexpr int kChannels = 4;  // vectors of eight that a lane holds: rows of at most 1024
constexpr float kLog2e = 1.4426950408889634f;

// A warp a query, a block sixteen of an image: rows are normalised once and then read by all.
template <class T>
__global__ void __launch_bounds__(32 * kWarps) last_attention_kernel(LastAttention p) {
  const int image = blockIdx.x;
  const int lane = threadIdx.x % 32;
  const int number = blockIdx.y * kWarps + threadIdx.x / 32;
  const bool live = number < p.queries;
  const int vectors = p.width / 8;
  Shared<unsigned char> memory = shared_memory();
  Shared<float> mean = carve<float>(memory, kRows);
  Shared<float> rstd = carve<float>(memory, kRows);
  Shared<T> rows = carve<T>(memory, kRows * p.width);
  const T* x = static_cast<const T*>(p.x) + std::int64_t(image) * p.m * p.width;
  const std::int64_t query = (std::int64_t(image) * p.queries + (live ? number : 0)) * p.width;

  float u[kChannels][8], z[kChannels][8];
#pragma unroll
  for (int c = 0; c < kChannels; ++c) {
    const int vector = lane + 32 * c;
#pragma unroll
    for (int i = 0; i < 8; ++i) u[c][i] = z[c][i] = 0;
    if (vector < vectors) unpack<T>(load16(static_cast<const T*>(p.u) + query + 8 * vector), u[c]);
  }
  // Zero rows are ŷ = 0: a logit of its bias alone, and nothing for the sum.
  const float infinity = __int_as_float(0x7f800000);
  float top = p.has_zero ? p.zero_bias * kLog2e : -infinity;
  float total = p.has_zero ? 1.0f : 0.0f;
  const float* bias =
      p.key_bias == nullptr ? nullptr : p.key_bias + std::int64_t(image) * p.bias_image;

  for (int first = 0; first < p.m; first += kRows) {
    const int count = min(kRows, p.m - first);
    for (int row = threadIdx.x; row < count; row += blockDim.x) {
      const std::int64_t at = std::int64_t(image) * p.m + first + row;
      const Norm norm = norm_of(p.stats + at * p.parts * 2, p.parts, p.width, p.eps);
      mean[row] = norm.mean;
      rstd[row] = norm.rstd;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < count * vectors; i += blockDim.x) {
      const int row = i / vectors;
      float values[8];
      unpack<T>(load16(x + std::int64_t(first) * p.width + 8 * i), values);
      for (float& value : values) value = (value - mean[row]) * rstd[row];
      store16(rows + 8 * i, pack<T>(values));
    }
    __syncthreads();
    for (int row = 0; row < count; ++row) {
      float y[kChannels][8];
      float sum = 0;
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        const int vector = lane + 32 * c;
        if (vector >= vectors) break;
        unpack<T>(load16(rows + row * p.width + 8 * vector), y[c]);
#pragma unroll
        for (int i = 0; i < 8; ++i) sum += u[c][i] * y[c][i];
      }
      for (int far = 16; far > 0; far /= 2) sum += __shfl_xor_sync(~0u, sum, far);
      float logit = sum * p.scale * kLog2e;
      if (bias != nullptr) logit += bias[first + row] * kLog2e;
      const float higher = fmaxf(top, logit);
      const float base = higher == -infinity ? 0.0f : higher;
      const float shrink = exp2f(top - base), weight = exp2f(logit - base);
      top = higher;
      total = total * shrink + weight;
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        if (lane + 32 * c >= vectors) break;
#pragma unroll
        for (int i = 0; i < 8; ++i) z[c][i] = z[c][i] * shrink + weight * y[c][i];
      }
    }
  }
#pragma unroll
  for (int c = 0; c < kChannels; ++c) {
    const int vector = lane + 32 * c;
    if (vector >= vectors || !live) break;
    for (float& value : z[c]) value /= total;
    store16(static_cast<T*>(p.out) + query + 8 * vector, pack<T>(z[c]));
  }
}

}  // namespace

void last_attention(const LastAttention& p, Type type, void* stream) {
  const auto kernel =
      type == Type::half ? last_attention_kernel<Half> : last_attention_kernel<BFloat16>;
  const int shared = 2 * kRows * sizeof(float) + kRows * p.width * 2;
  const int warps = p.queries < kWarps ? p.queries : kWarps;
  const dim3 grid(p.batch, ceil_div(p.queries, kWarps));
  launch("last_attention", kernel, grid, 32 * warps, shared, stream, p);
}

}  // namespace slimvit
