// What selector_judge needs of each patch before it judges: in each head
//
//   local_i, other_i = the halves of GELU(LN(x_i) E + e)
//
// and of the other halves the sums over the patches of a tile, for they count in their mean.

#include "cuda/selector.h"

namespace slimvit {
namespace {

// Rows of the tile, normalised over the head's channels, with zeros up to sixteens. A warp a row.
template <class T>
__device__ void take_rows(const SelectorJudge& p, Shared<T> rows, int first, int head,
                          std::int64_t image) {
  constexpr int kMost = kSelectorHead / 32;
  const int lane = threadIdx.x % 32, stride = stride_of(p.c);
  for (int row = threadIdx.x / 32; row < kSelectorRows; row += kSelectorThreads / 32) {
    const int patch = min(first + row, p.p - 1);
    const T* from = static_cast<const T*>(p.x) +
                    ((image * p.m + p.prefix + patch) * p.heads + head) * std::int64_t(p.c);
    float values[kMost], sum = 0, square = 0;
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
      const int channel = lane + 32 * i;
      values[i] = channel < p.c ? to_float(from[channel]) : 0.0f;
      sum += values[i];
    }
    const float mean = over_warp(sum) / p.c;
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
      values[i] = lane + 32 * i < p.c ? values[i] - mean : 0.0f;
      square += values[i] * values[i];
    }
    const float rstd = rsqrtf(over_warp(square) / p.c + p.eps);
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
      const int channel = lane + 32 * i;
      if (channel < sixteens(p.c)) rows[row * stride + channel] = from_float<T>(values[i] * rstd);
    }
    const std::int64_t to = (image * p.heads + head) * p.p + first + row;
    if (lane == 0 && first + row < p.p) p.means[to] = mean;
  }
}

template <class M>
__global__ void __launch_bounds__(kSelectorThreads) selector_embed_kernel(SelectorJudge p) {
  if constexpr (compiled_for<M>()) {
    using T = typename M::T;
    const int head = blockIdx.y, first = blockIdx.x * kSelectorRows, stride = stride_of(p.c);
    const std::int64_t image = blockIdx.z, of_head = image * p.heads + head;
    Shared<unsigned char> memory = shared_memory();
    Shared<T> rows = carve<T>(memory, kSelectorRows * stride);
    Shared<T> weight = carve<T>(memory, sixteens(p.c) * stride);
    Shared<float> out = carve<float>(memory, kSelectorRows * stride);
    take_matrix(weight, static_cast<const T*>(p.embed) + head * p.c * p.c, p.c, p.c, sixteens(p.c));
    take_rows(p, rows, first, head, image);
    __syncthreads();
    product<M>(out, rows, weight, p.c, p.c);
    __syncthreads();

    const int local = local_of(p.c), others = p.c - local, tiles = tiles_of(p.p);
    const int end = min(kSelectorRows, p.p - first);
    for (int i = threadIdx.x; i < end * p.c; i += kSelectorThreads) {
      const int row = i / p.c, channel = i % p.c;
      const float value = gelu(out[row * stride + channel] + p.embed_bias[head * p.c + channel]);
      out[row * stride + channel] = value;
      if (channel >= local) continue;
      T* to = static_cast<T*>(p.local) + (of_head * p.p + first + row) * local;
      to[channel] = from_float<T>(value);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < others; i += kSelectorThreads) {
      float sum = 0;
      for (int row = 0; row < end; ++row) sum += out[row * stride + local + i];
      p.sums[(of_head * tiles + blockIdx.x) * others + i] = sum;
    }
  }
}

template <class M>
void launch_embed(const SelectorJudge& p, void* stream) {
  const int lines = 3 * kSelectorRows + sixteens(p.c);  // float32 counts twice
  const int shared = bytes_of(lines, p.c);
  const dim3 grid(tiles_of(p.p), p.heads, p.batch);
  launch("selector_embed", selector_embed_kernel<M>, grid, kSelectorThreads, shared, stream, p);
}

}  // namespace

void selector_embed(const SelectorJudge& p, Type type, void* stream) {
  if (architecture() < 80) return launch_embed<Volta>(p, stream);
  if (type == Type::half) return launch_embed<Ampere<Half>>(p, stream);
  launch_embed<Ampere<BFloat16>>(p, stream);
}

}  // namespace slimvit
