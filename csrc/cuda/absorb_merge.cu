// The kept tokens, each averaged with those that go into it: over the i that go into k,
//
//   x'_k = Σ w_i x_i / Σ w_i,   w_i = importance_i;   size'_k = Σ size_i
//   spread'_k = Σ w_i (var(x_i) + spread_i) / Σ w_i - var(x'_k)
//
// Statistics have the spread in them, so var(x_i) + spread_i is what they say. A kept token that
// nothing goes into stays exactly as it is.

#include "cuda/absorb.h"
#include "cuda/ops.h"
#include "cuda/row_stats.h"

namespace slimvit {
namespace {

constexpr int kWarps = 4;
constexpr int kChannels = 6;  // vectors of eight that a lane holds: rows of at most 1536

// A lane's share of a row in the making.
template <class T>
struct Mean {
  float sum[kChannels][8];

  __device__ Mean() {
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
#pragma unroll
      for (int i = 0; i < 8; ++i) sum[c][i] = 0;
    }
  }

  __device__ void add(const T* row, int vectors, float weight) {
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      const int vector = threadIdx.x % 32 + 32 * c;
      if (vector >= vectors) continue;
      float values[8];
      unpack<T>(load16(row + 8 * vector), values);
#pragma unroll
      for (int i = 0; i < 8; ++i) sum[c][i] += weight * values[i];
    }
  }

  // Writes the average, and holds it as rounded from now on; returns the variance of its channels.
  __device__ float finish(T* out, int vectors, float total) {
    float mean = 0;
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
#pragma unroll
      for (int i = 0; i < 8; ++i) sum[c][i] /= total;
      const uint4 packed = pack<T>(sum[c]);
      const int vector = threadIdx.x % 32 + 32 * c;
      if (vector < vectors) store16(out + 8 * vector, packed);
      unpack<T>(packed, sum[c]);  // zeros beyond the row
#pragma unroll
      for (int i = 0; i < 8; ++i) mean += sum[c][i];
    }
    mean = over_warp(mean) / (8 * vectors);
    float square = 0;
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      if (int(threadIdx.x % 32) + 32 * c >= vectors) continue;
#pragma unroll
      for (int i = 0; i < 8; ++i) square += (sum[c][i] - mean) * (sum[c][i] - mean);
    }
    return over_warp(square) / (8 * vectors);
  }
};

// A kept token a warp. It looks through all tokens of the image, so nothing is scattered.
template <class T>
__global__ void __launch_bounds__(32 * kWarps) absorb_merge_kernel(AbsorbMerge p) {
  const int lane = threadIdx.x % 32, place = blockIdx.x * kWarps + threadIdx.x / 32;
  if (place >= p.n) return;
  const std::int64_t image = blockIdx.y, to = image * p.n + place;
  const int vectors = p.width / 8, parts = p.width / p.part;
  const T* x = static_cast<const T*>(p.x) + image * p.m * p.width;

  Mean<T> mean;
  float total = 0, variance = 0, size = 0;  // of the tokens that this lane looks at
  int count = 0;
  for (int first = 0; first < p.m; first += 32) {
    const int token = first + lane;
    const bool here = token < p.m && p.into[image * p.m + token] == place;
    if (here) {
      const std::int64_t at = image * p.m + token;
      const float weight = weight_of(p.importance[at]);
      total += weight;
      variance += weight * moments_of(p.stats + at * parts * 2, parts, p.width).variance;
      size += p.size == nullptr ? 1.0f : p.size[at];
    }
    unsigned mine = __ballot_sync(~0u, here);
    count += __popc(mine);
    for (; mine != 0; mine &= mine - 1) {
      const int next = first + __ffs(mine) - 1;
      mean.add(x + std::int64_t(next) * p.width, vectors,
               weight_of(p.importance[image * p.m + next]));
    }
  }
  size = over_warp(size);

  T* out = static_cast<T*>(p.out) + to * p.width;
  float* stats = p.out_stats + to * parts * 2;
  float spread = 0;
  if (count == 1) {
    const std::int64_t own = image * p.m + p.index[to];
    const T* from = static_cast<const T*>(p.x) + own * p.width;
    for (int i = lane; i < vectors; i += 32) store16(out + 8 * i, load16(from + 8 * i));
    for (int i = lane; i < 2 * parts; i += 32) stats[i] = p.stats[own * parts * 2 + i];
    if (p.spread != nullptr) spread = p.spread[own];
  } else {
    total = over_warp(total);
    spread = fmaxf(over_warp(variance) / total - mean.finish(out, vectors, total), 0.0f);
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      if (32 * c >= vectors) continue;
      const int vector = lane + 32 * c, part = 8 * vector / p.part;
      const float more = part == 0 ? p.width * spread : 0.0f;
      store_stats(stats + 2 * part, mean.sum[c], p.part / 8, vector < vectors, more);
    }
  }
  if (lane == 0) {
    p.out_size[to] = size;
    p.out_bias[to] = logf(size);
    p.out_spread[to] = spread;
  }
}

}  // namespace

void absorb_merge(const AbsorbMerge& p, Type type, void* stream) {
  const auto kernel =
      type == Type::half ? absorb_merge_kernel<Half> : absorb_merge_kernel<BFloat16>;
  launch("absorb_merge", kernel, dim3(ceil_div(p.n, kWarps), p.batch), 32 * kWarps, 0, stream, p);
}

}  // namespace slimvit
