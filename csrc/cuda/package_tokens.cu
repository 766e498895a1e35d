// The tokens that follow a selector: those at an index as they are, and after them the package,
//
//   package = Σ share_i x_i

#include "cuda/ops.h"
#include "cuda/row_stats.h"

namespace slimvit {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;

// A row a warp.
template <class T>
__device__ void copy_row(const PackageTokens& p, int place, std::int64_t image) {
  const int vectors = p.width / 8, parts = p.width / p.part;
  const std::int64_t to = image * p.count + place;
  const T* from = static_cast<const T*>(p.x) + (image * p.m + p.index[to]) * p.width;
  for (int first = 0; first < vectors; first += 32) {
    const int vector = first + threadIdx.x % 32;
    const bool live = vector < vectors;
    const uint4 packed = live ? load16(from + 8 * vector) : uint4{0, 0, 0, 0};
    if (live) store16(static_cast<T*>(p.out) + to * p.width + 8 * vector, packed);
    float values[8];
    unpack<T>(packed, values);
    store_stats(p.out_stats + (to * parts + 8 * vector / p.part) * 2, values, p.part / 8, live);
  }
}

// The columns of one part: each thread sums eight of every so many rows.
template <class T>
__device__ void write_package(const PackageTokens& p, int part, std::int64_t image) {
  Shared<unsigned char> memory = shared_memory();
  Shared<float> sums = carve<float>(memory, kThreads * 8), totals = carve<float>(memory, p.part);
  const int thread = threadIdx.x;
  const int lanes = p.part / 8, lane = thread % lanes, runs = kThreads / lanes;
  const float* share = p.share + image * p.p;
  const T* x = static_cast<const T*>(p.x) + (image * p.m + p.prefix) * p.width + part * p.part;
  float sum[8] = {};
  for (int i = thread / lanes; i < p.p; i += runs) {
    const float weight = share[i];
    if (weight == 0) continue;  // kept: zero times infinity would be NaN
    float values[8];
    unpack<T>(load16(x + std::int64_t(i) * p.width + 8 * lane), values);
#pragma unroll
    for (int k = 0; k < 8; ++k) sum[k] += weight * values[k];
  }
#pragma unroll
  for (int k = 0; k < 8; ++k) sums[thread * 8 + k] = sum[k];
  __syncthreads();
  if (thread < p.part) {
    float total = 0;
    for (int run = 0; run < runs; ++run) total += sums[run * p.part + thread];
    totals[thread] = total;
  }
  __syncthreads();
  if (thread >= 32) return;
  const bool live = thread < lanes;
  float values[8];
#pragma unroll
  for (int k = 0; k < 8; ++k) values[k] = live ? float(totals[8 * thread + k]) : 0.0f;
  const std::int64_t to = image * p.count + p.count - 1;
  const uint4 packed = pack<T>(values);
  T* out = static_cast<T*>(p.out) + to * p.width + part * p.part;
  if (live) store16(out + 8 * thread, packed);
  unpack<T>(packed, values);  // of what the next norm will read
  store_stats(p.out_stats + (to * (p.width / p.part) + part) * 2, values, lanes, live);
}

template <class T>
__global__ void __launch_bounds__(kThreads) package_tokens_kernel(PackageTokens p) {
  const int block = blockIdx.x, parts = p.width / p.part;
  if (block < parts) return write_package<T>(p, block, blockIdx.y);
  const int place = (block - parts) * kWarps + threadIdx.x / 32;
  if (place < p.count - 1) copy_row<T>(p, place, blockIdx.y);
}

}  // namespace

void package_tokens(const PackageTokens& p, Type type, void* stream) {
  const auto kernel =
      type == Type::half ? package_tokens_kernel<Half> : package_tokens_kernel<BFloat16>;
  const dim3 grid(p.width / p.part + ceil_div(p.count - 1, kWarps), p.batch);
  const int shared = kThreads * 8 * 4 + ceil_div(p.part * 4, 32) * 32;
  launch("package_tokens", kernel, grid, kThreads, shared, stream, p);
}

}  // namespace slimvit
