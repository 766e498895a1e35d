// Rectangular attention: n queries of the kept tokens over the m keys of the alive ones.
//
//   out = softmax(q kᵀ / sqrt(d) + bias) v,   for every image and head
//
// Keys and values of an image's head lie in shared memory, whole where they fit. A warp has 16
// queries, so that 141 of them cost 144; a block has as many warps as there are queries, up to
// sixteen, and then reads keys and values once. Softmax is in float32, with a running maximum.

#include "cuda/mma.h"
#include "cuda/ops.h"
#include "cuda/slim_attention.h"

namespace slimvit {
namespace {

// Rows first … first + rows of a matrix of d columns, d at most kD, with zeros around what there
// is.
template <class M, int kD, class T>
__device__ void load_rows(Shared<T> to, const T* from, std::int64_t stride, int first, int rows,
                          int end, int d, int thread, int threads) {
  constexpr int kVectors = kD / 8;
  for (int i = thread; i < rows * kVectors; i += threads) {
    const int row = first + i / kVectors, column = i % kVectors * 8;
    const bool live = row < end && column < d;
    const T* at = from + (live ? row * stride + column : 0);
    Shared<T> place = to + i / kVectors * (kD + 8) + column;
    if constexpr (M::asynchronous) {
      copy16_async(place, at, live);
    } else {
      store16(place, live ? load16(at) : uint4{0, 0, 0, 0});
    }
  }
}

// Warps of a block at most: what registers allow, and the scratch of the older cores.
template <class M, int kD>
__host__ __device__ constexpr int most_warps() {
  return !M::asynchronous ? 4 : kD > 64 ? 8 : 16;
}

template <class M, int kD>
__global__ void __launch_bounds__(32 * most_warps<M, kD>()) slim_attention_kernel(Attention p) {
  if constexpr (compiled_for<M>()) {
    using T = typename M::T;
    constexpr int kStride = kD + 8;
    const int head = blockIdx.y, image = blockIdx.z;
    const int inner = p.heads * p.d;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int query = (blockIdx.x * (blockDim.x / 32) + warp) * kQueries;
    Shared<unsigned char> memory = shared_memory();
    Shared<T> keys = carve<T>(memory, p.segment * kStride);
    Shared<T> values = carve<T>(memory, p.segment * kStride);
    Shared<unsigned char> scratch = memory + warp * Strip<M, kD>::scratch_bytes();
    Strip<M, kD> strip(scratch);

    const T* q = static_cast<const T*>(p.q) + std::int64_t(image) * p.n * inner + head * p.d;
    load_rows<M, kD>(strip.tile, q, inner, query, kQueries, p.n, p.d, lane, 32);
    if constexpr (M::asynchronous) {
      close_copies();
      wait_copies<0>();
    }
    __syncwarp();
    const float* extra = p.extra == nullptr ? nullptr : p.extra + head * p.d;
    const Keys about = {
        p.key_bias == nullptr ? nullptr : p.key_bias + std::int64_t(image) * p.bias_image, p.m,
        rsqrtf(p.d) * kLog2e};
    if (extra != nullptr) {
      float sum = 0;
      for (int i = lane % 2; i < p.d; i += 2)
        sum += to_float(strip.tile[lane / 2 * kStride + i]) * extra[i];
      sum += __shfl_xor_sync(~0u, sum, 1);
      if (lane % 2 == 0) strip.alone[lane / 2] = sum * about.scale + p.extra_bias * kLog2e;
      __syncwarp();
    }
    strip.start(extra == nullptr ? nullptr : extra + inner, p.d);

    const T* kv = static_cast<const T*>(p.kv) + std::int64_t(image) * p.m * 2 * inner + head * p.d;
    for (int first = 0; first < p.m; first += p.segment) {
      const int rows = min(p.segment, (p.m - first + 15) / 16 * 16);
      __syncthreads();  // until every warp is done with the segment before
      load_rows<M, kD>(keys, kv, 2 * inner, first, rows, p.m, p.d, threadIdx.x, blockDim.x);
      load_rows<M, kD>(values, kv + inner, 2 * inner, first, rows, p.m, p.d, threadIdx.x,
                       blockDim.x);
      if constexpr (M::asynchronous) {
        close_copies();
        wait_copies<0>();
      }
      __syncthreads();
      for (int key = 0; key < rows; key += kKeys) {
        const int tiles = min(kKeys, rows - key) / 16;
        strip.attend(keys + key * kStride, values + key * kStride, tiles, first + key, about);
      }
    }
    strip.finish();

    T* out = static_cast<T*>(p.out) + std::int64_t(image) * p.n * inner + head * p.d;
    constexpr int kVectors = kD / 8;
    for (int i = lane; i < kQueries * kVectors; i += 32) {
      const int row = i / kVectors, column = i % kVectors * 8;
      if (query + row < p.n && column < p.d) {
        store16(out + std::int64_t(query + row) * inner + column,
                load16(strip.tile + row * kStride + column));
      }
    }
  }
}

template <class M, int kD>
void launch_attention(Attention p, void* stream) {
  constexpr int kRow = (kD + 8) * 2 * 2;  // bytes of a key and its value
  constexpr int kScratch = Strip<M, kD>::scratch_bytes();
  const int strips = ceil_div(p.n, kQueries);
  // As many warps as leave room for a chunk of keys.
  const int fitting = (shared_memory_limit() - kKeys * kRow - 64) / kScratch;
  const int most = fitting < most_warps<M, kD>() ? fitting : most_warps<M, kD>();
  const int blocks = ceil_div(strips, most);
  const int warps = ceil_div(strips, blocks);
  const int room = (shared_memory_limit() - warps * kScratch - 64) / kRow / 16 * 16;
  const int needed = ceil_div(p.m, 16) * 16;
  const int segments = ceil_div(needed, room);
  p.segment = ceil_div(ceil_div(needed, segments), kKeys) * kKeys;
  p.segment = p.segment < room ? p.segment : room;
  p.segment = p.segment < needed ? p.segment : needed;
  const int shared = p.segment * kRow + warps * kScratch + 64;
  launch("slim_attention", slim_attention_kernel<M, kD>, dim3(blocks, p.heads, p.batch), warps * 32,
         shared, stream, p);
}

template <class M>
void launch_attention(const Attention& p, void* stream) {
  if (p.d <= 32) return launch_attention<M, 32>(p, stream);
  if (p.d <= 64) return launch_attention<M, 64>(p, stream);
  launch_attention<M, 128>(p, stream);
}

}  // namespace

void slim_attention(const Attention& p, Type type, void* stream) {
  if (architecture() < 80) return launch_attention<Volta>(p, stream);
  if (type == Type::half) return launch_attention<Ampere<Half>>(p, stream);
  launch_attention<Ampere<BFloat16>>(p, stream);
}

}  // namespace slimvit
