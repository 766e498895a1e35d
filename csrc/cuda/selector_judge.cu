// What each head of a selector says of each patch, and how much it counts there:
//
//   verdict_i = GELU(GELU([local_i, mean_j other_j] J1 + b1) J2 + b2) · j3 + b3
//   weight_i  = (W2 GELU(W1 (mean of each head's channels of x_i) + c1) + c2)_h
//
// Two launches: that of selector_embed.cu makes the halves, then the means over all patches of an
// image are there. Sums are taken tile by tile, so that an image's are the same in every batch.

#include "cuda/selector.h"

namespace slimvit {
namespace {

template <class T>
struct Judging {
  Shared<T> rows, weight1, hidden, weight2;
  Shared<float> out, mean, first;

  // Sizes as in `shared_bytes`. Products take turns in `out`.
  __device__ Judging(Shared<unsigned char>& memory, const SelectorJudge& p, int local)
      : rows(carve<T>(memory, kSelectorRows * stride_of(local))),
        weight1(carve<T>(memory, sixteens(local) * stride_of(p.half))),
        hidden(carve<T>(memory, kSelectorRows * stride_of(p.half))),
        weight2(carve<T>(memory, sixteens(p.half) * stride_of(p.quarter))),
        out(carve<float>(memory, kSelectorRows * stride_of(p.half))),
        mean(carve<float>(memory, p.c)),
        first(carve<float>(memory, p.half)) {}
};

int shared_bytes(const SelectorJudge& p) {
  const int local = local_of(p.c), vectors = ceil_div(p.c * 4, 32) + ceil_div(p.half * 4, 32);
  return bytes_of(kSelectorRows, local) + bytes_of(sixteens(local), p.half) +
         bytes_of(kSelectorRows, p.half) + bytes_of(sixteens(p.half), p.quarter) +
         bytes_of(2 * kSelectorRows, p.half) + 32 * vectors;
}

// What the mean over the patches adds to each patch's first judgement, with its bias.
template <class T>
__device__ void judge_mean(const SelectorJudge& p, const Judging<T>& at, int head,
                           std::int64_t image) {
  const int local = local_of(p.c), others = p.c - local, tiles = tiles_of(p.p);
  const float* sums = p.sums + (image * p.heads + head) * tiles * others;
  for (int i = threadIdx.x; i < others; i += kSelectorThreads) {
    float sum = 0;
    for (int tile = 0; tile < tiles; ++tile) sum += sums[tile * others + i];
    at.mean[i] = sum / p.p;
  }
  __syncthreads();
  const T* weight = static_cast<const T*>(p.judge1) + (head * p.c + local) * p.half;
  for (int j = threadIdx.x; j < p.half; j += kSelectorThreads) {
    float sum = p.bias1[head * p.half + j];
    for (int i = 0; i < others; ++i) sum += at.mean[i] * to_float(weight[i * p.half + j]);
    at.first[j] = sum;
  }
}

// How much the head counts at a patch, a logit; W1 and W2 are small.
__device__ float weight_at(const SelectorJudge& p, int head, std::int64_t image, int patch) {
  const float* means = p.means + image * p.heads * p.p + patch;
  float sum = p.weigh2_bias[head];
  for (int j = 0; j < p.hidden; ++j) {
    float hidden = p.weigh1_bias[j];
    for (int h = 0; h < p.heads; ++h) hidden += p.weigh1[j * p.heads + h] * means[h * p.p];
    sum += p.weigh2[head * p.hidden + j] * gelu(hidden);
  }
  return sum;
}

template <class M>
__global__ void __launch_bounds__(kSelectorThreads) selector_judge_kernel(SelectorJudge p) {
  if constexpr (compiled_for<M>()) {
    using T = typename M::T;
    const int head = blockIdx.y, first = blockIdx.x * kSelectorRows, local = local_of(p.c);
    const int end = min(kSelectorRows, p.p - first), half = p.half, quarter = p.quarter;
    const std::int64_t image = blockIdx.z, to = (image * p.heads + head) * p.p + first;
    Shared<unsigned char> memory = shared_memory();
    const Judging<T> at(memory, p, local);
    take_matrix(at.rows, static_cast<const T*>(p.local) + to * local, end, local, kSelectorRows);
    take_matrix(at.weight1, static_cast<const T*>(p.judge1) + head * p.c * half, local, half,
                sixteens(local));
    take_matrix(at.weight2, static_cast<const T*>(p.judge2) + head * half * quarter, half, quarter,
                sixteens(half));
    judge_mean(p, at, head, image);
    __syncthreads();
    product<M>(at.out, at.rows, at.weight1, local, half);
    __syncthreads();
    const int wide = sixteens(half), stride = stride_of(half);
    for (int i = threadIdx.x; i < kSelectorRows * wide; i += kSelectorThreads) {
      const int row = i / wide, j = i % wide;
      const float value = j < half ? gelu(at.out[row * stride + j] + at.first[j]) : 0.0f;
      at.hidden[row * stride + j] = from_float<T>(value);
    }
    __syncthreads();
    product<M>(at.out, at.hidden, at.weight2, half, quarter);
    __syncthreads();
    const int lane = threadIdx.x % 32;
    for (int row = threadIdx.x / 32; row < end; row += kSelectorThreads / 32) {
      float sum = 0;
      for (int k = lane; k < quarter; k += 32) {
        const int of_head = head * quarter + k;
        sum += p.judge3[of_head] * gelu(at.out[row * stride_of(quarter) + k] + p.bias2[of_head]);
      }
      sum = over_warp(sum);
      if (lane == 0) p.verdict[to + row] = sum + p.bias3[head];
    }
    for (int row = threadIdx.x; row < end; row += kSelectorThreads) {
      p.weight[to + row] = weight_at(p, head, image, first + row);
    }
  }
}

template <class M>
void launch_judge(const SelectorJudge& p, void* stream) {
  const dim3 grid(tiles_of(p.p), p.heads, p.batch);
  launch("selector_judge", selector_judge_kernel<M>, grid, kSelectorThreads, shared_bytes(p),
         stream, p);
}

}  // namespace

void selector_judge(const SelectorJudge& p, Type type, void* stream) {
  selector_embed(p, type, stream);
  if (architecture() < 80) return launch_judge<Volta>(p, stream);
  if (type == Type::half) return launch_judge<Ampere<Half>>(p, stream);
  launch_judge<Ampere<BFloat16>>(p, stream);
}

}  // namespace slimvit
