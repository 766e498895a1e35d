// The kept tokens, each averaged with those that go into it:
//
//   x'_k = mean of the x_i that go into k, weighted by importance, with the mean of their lengths
//          for a length;   size'_k = Σ gain_i
//
// A kept token that nothing goes into stays exactly as it is.

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
  float total = 0, lengths = 0, size = 0;
  int count = 0;

  __device__ Mean() {
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
#pragma unroll
      for (int i = 0; i < 8; ++i) sum[c][i] = 0;
    }
  }

  __device__ void add(const T* row, int vectors, float importance, float gain) {
    const float weight = weight_of(importance);
    float square = 0;
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      const int vector = threadIdx.x % 32 + 32 * c;
      if (vector >= vectors) continue;
      float values[8];
      unpack<T>(load16(row + 8 * vector), values);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        sum[c][i] += weight * values[i];
        square += values[i] * values[i];
      }
    }
    lengths += weight * sqrtf(over_warp(square));
    total += weight;
    size += gain;
    ++count;
  }

  __device__ void finish() {
    float square = 0;
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        sum[c][i] /= total;
        square += sum[c][i] * sum[c][i];
      }
    }
    const float longer = lengths / total / fmaxf(sqrtf(over_warp(square)), kLeastNorm);
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
#pragma unroll
      for (int i = 0; i < 8; ++i) sum[c][i] *= longer;
    }
  }
};

// A kept token a warp. It looks through all tokens of the image, so nothing is scattered.
template <class T>
__global__ void __launch_bounds__(32 * kWarps) absorb_merge_kernel(AbsorbMerge p) {
  const int lane = threadIdx.x % 32, place = blockIdx.x * kWarps + threadIdx.x / 32;
  if (place >= p.n) return;
  const std::int64_t image = blockIdx.y, to = image * p.n + place;
  const int vectors = p.width / 8;
  const T* x = static_cast<const T*>(p.x) + image * p.m * p.width;

  Mean<T> mean;
  for (int first = 0; first < p.m; first += 32) {
    const int token = first + lane;
    unsigned mine = __ballot_sync(~0u, token < p.m && p.into[image * p.m + token] == place);
    for (; mine != 0; mine &= mine - 1) {
      const int next = first + __ffs(mine) - 1;
      const std::int64_t at = image * p.m + next;
      mean.add(x + std::int64_t(next) * p.width, vectors, p.importance[at], p.gain[at]);
    }
  }
  const bool alone = mean.count == 1;
  if (!alone) mean.finish();
  const T* own = x + p.index[to] * p.width;
  T* out = static_cast<T*>(p.out) + to * p.width;
#pragma unroll
  for (int c = 0; c < kChannels; ++c) {
    if (32 * c >= vectors) continue;
    const int vector = lane + 32 * c;
    const bool live = vector < vectors;
    uint4 packed = pack<T>(mean.sum[c]);
    if (alone && live) packed = load16(own + 8 * vector);
    if (live) store16(out + 8 * vector, packed);
    float values[8];
    unpack<T>(packed, values);  // of what the next norm will read
    float* stats = p.out_stats + (to * (p.width / p.part) + 8 * vector / p.part) * 2;
    store_stats(stats, values, p.part / 8, live);
  }
  if (lane == 0) {
    p.out_size[to] = mean.size;
    p.out_bias[to] = logf(mean.size);
  }
}

}  // namespace

void absorb_merge(const AbsorbMerge& p, Type type, void* stream) {
  const auto kernel =
      type == Type::half ? absorb_merge_kernel<Half> : absorb_merge_kernel<BFloat16>;
  launch("absorb_merge", kernel, dim3(ceil_div(p.n, kWarps), p.batch), 32 * kWarps, 0, stream, p);
}

}  // namespace slimvit
