#include "cuda/ops.h"
#include "cuda/row_stats.h"

namespace slimvit {
namespace {

constexpr int kThreads = 256;

// Eight values a thread: a part of 16, 32 or 64 is 2, 4 or 8 neighbouring lanes.
template <class T>
__global__ void row_stats_kernel(RowStats p) {
  const std::int64_t vectors = p.rows * (p.width / 8);
  const std::int64_t at = std::int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const bool live = at < vectors;
  float values[8];
  unpack<T>(load16(static_cast<const T*>(p.x) + 8 * (live ? at : 0)), values);
  store_stats(p.out + at / (p.part / 8) * 2, values, p.part / 8, live);
}

}  // namespace

void row_stats(const RowStats& p, Type type, void* stream) {
  const std::int64_t vectors = p.rows * (p.width / 8);
  const dim3 grid((vectors + kThreads - 1) / kThreads);
  const auto kernel = type == Type::half ? row_stats_kernel<Half> : row_stats_kernel<BFloat16>;
  launch("row_stats", kernel, grid, kThreads, 0, stream, p);
}

}  // namespace slimvit
