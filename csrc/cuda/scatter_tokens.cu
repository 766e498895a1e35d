#include "cuda/device.h"
#include "cuda/ops.h"

namespace slimvit {
namespace {

constexpr int kThreads = 256;
constexpr int kRows = 64;  // of the result, for one block

// A block turns the index of its image over for its rows, then writes each of them once.
__global__ void scatter_tokens_kernel(Scatter p) {
  Shared<unsigned char> memory = shared_memory();
  Shared<int> source = carve<int>(memory, kRows);
  const int image = blockIdx.y;
  const int first = blockIdx.x * kRows;
  if (threadIdx.x < kRows) source[threadIdx.x] = -1;
  __syncthreads();
  const std::int64_t* index = p.index + std::int64_t(image) * p.index_image;
  for (int k = threadIdx.x; k < p.kept; k += kThreads) {
    const std::int64_t place = index[k] - first;
    if (place >= 0 && place < kRows) source[place] = k;  // places are distinct
  }
  __syncthreads();
  const int vectors = p.width / 8;
  const uint4* x = static_cast<const uint4*>(p.x) + std::int64_t(image) * p.kept * vectors;
  uint4* out = static_cast<uint4*>(p.out) + (std::int64_t(image) * p.length + first) * vectors;
  const int rows = min(kRows, p.length - first);
  for (int i = threadIdx.x; i < rows * vectors; i += kThreads) {
    const int k = source[i / vectors];
    out[i] = k < 0 ? uint4{0, 0, 0, 0} : x[std::int64_t(k) * vectors + i % vectors];
  }
}

}  // namespace

void scatter_tokens(const Scatter& p, void* stream) {
  const dim3 grid(ceil_div(p.length, kRows), p.batch);
  launch("scatter_tokens", scatter_tokens_kernel, grid, kThreads, kRows * sizeof(int), stream, p);
}

}  // namespace slimvit
