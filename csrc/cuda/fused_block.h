// The pieces of fused_block.cu: weights that stream by, and the rows of a warp.
#pragma once

#include "cuda/activation.h"
#include "cuda/ops.h"
#include "cuda/row_stats.h"
#include "cuda/slim_attention.h"

namespace slimvit {

constexpr int kMostWarps = 12;  // three a scheduler, 168 registers a thread
constexpr int kD = 64;          // of a head
constexpr int kHeads = 3;
constexpr int kWidth = kHeads * kD;
constexpr int kStride = kWidth + 8;  // rows of activations, and of weights taken 64 rows at a time
constexpr int kNarrow = kD + 8;      // rows of keys, values, and weights taken 64 columns at a time
constexpr int kTile = kWidth * kNarrow;  // room for either tile of a weight, values
static_assert(kTile >= 64 * kStride, "either tile fits");

template <class T>
using Core = Ampere<T>;

// Tiles of the weights in the order in which they are needed: keys, values and queries of each
// head, the projection by heads, then fc1 and fc2 by 64 hidden channels.
template <class T, int kThreads>
struct Weights {
  const FusedBlock& p;
  Shared<T> room;
  int next = 0;

  __device__ Weights(const FusedBlock& p, Shared<T> room) : p(p), room(room) {}

  __device__ int count() const { return 4 * kHeads + 2 * (p.hidden / 64); }
  __device__ Shared<T> at(int tile) const { return room + tile % p.stages * kTile; }

  __device__ void fetch(int tile) {
    if (tile >= count()) return;
    if (tile < 3 * kHeads) {
      const int part = tile % 3 == 2 ? 0 : tile % 3 + 1;  // keys, values, queries
      rows(tile, p.qkv, part * kWidth + tile / 3 * kD);
    } else if (tile < 4 * kHeads) {
      columns(tile, p.proj, kWidth, (tile - 3 * kHeads) * kD);
    } else if ((tile - 4 * kHeads) % 2 == 0) {
      rows(tile, p.fc1, (tile - 4 * kHeads) / 2 * 64);
    } else {
      columns(tile, p.fc2, p.hidden, (tile - 4 * kHeads) / 2 * 64);
    }
    close_copies();
  }

  // 64 rows of a weight [·, kWidth].
  __device__ void rows(int tile, const void* weight, int first) {
    const T* from = static_cast<const T*>(weight) + first * kWidth;
    for (int i = threadIdx.x; i < 64 * kWidth / 8; i += blockDim.x) {
      const int row = i / (kWidth / 8), column = i % (kWidth / 8) * 8;
      copy16_async(at(tile) + row * kStride + column, from + row * kWidth + column, true);
    }
  }

  // 64 columns of a weight [kWidth, stride].
  __device__ void columns(int tile, const void* weight, int stride, int first) {
    const T* from = static_cast<const T*>(weight) + first;
    for (int i = threadIdx.x; i < kWidth * 64 / 8; i += blockDim.x) {
      const int row = i / 8, column = i % 8 * 8;
      copy16_async(at(tile) + row * kNarrow + column, from + std::int64_t(row) * stride + column,
                   true);
    }
  }

  // The next tile, once every warp is done with the one before; the one after is under way then, if
  // there is room for two.
  __device__ Shared<T> take() {
    if (p.stages == 1) {
      __syncthreads();
      fetch(next);
    }
    wait_copies<0>();
    __syncthreads();
    if (p.stages == 2) fetch(next + 1);
    return at(next++);
  }
};

// c[j] = rows (16, of kWidth, wherever this lane's is) times 16 * count rows of a weight.
template <class T, int count>
__device__ void multiply_rows(typename Core<T>::C (&c)[count], Shared<T> row, Shared<T> weight) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (auto& tile : c) Core<T>::zero(tile);
#pragma unroll 4
  for (int k = 0; k < kWidth; k += 16) {
    typename Core<T>::A a;
    load_matrices<false>(a.r, row + k + lane / 16 * 8);
#pragma unroll
    for (int j = 0; j < count; ++j) {
      typename Core<T>::ColumnsB b;
      Core<T>::load_columns(b, weight + 16 * j * kStride + k, kStride);
      Core<T>::multiply_add(c[j], a, b);
    }
  }
}

// c + bias into 16 rows of shared memory.
template <class T>
__device__ void store_rows(Shared<T> to, int stride, const typename Core<T>::C (&c)[4],
                           const float* bias) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
      const int column = 16 * j + Core<T>::column(i);
      store4(to + Core<T>::row(i) * stride + column,
             pack<T>(c[j].x[i] + bias[column], c[j].x[i + 1] + bias[column + 1]));
    }
  }
}

// A warp's rows normalised, [rows, kWidth] from global to shared memory; rows beyond the end are
// zero.
template <class T>
__device__ void normalise(Shared<T> to, const T* x, int m, int rows, float eps) {
  const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
  const bool inside = lane < kWidth / 8;
  for (int row = threadIdx.x / 32; row < rows; row += warps) {
    float values[8] = {};
    if (inside && row < m) unpack<T>(load16(x + row * kWidth + 8 * lane), values);
    float sum = 0;
    for (float value : values) sum += value;
    for (int far = 16; far > 0; far /= 2) sum += __shfl_xor_sync(~0u, sum, far);
    const float mean = sum / kWidth;
    float square = 0;
    for (float& value : values) {
      value = inside ? value - mean : 0;
      square += value * value;
    }
    for (int far = 16; far > 0; far /= 2) square += __shfl_xor_sync(~0u, square, far);
    const float rstd = row < m ? rsqrtf(square / kWidth + eps) : 0.0f;
    for (float& value : values) value *= rstd;
    if (inside) store16(to + row * kStride + 8 * lane, pack<T>(values));
  }
}

// Sums over the four lanes that share a row; unused where the kernel is empty, on older cores.
[[maybe_unused]] __device__ inline float sum_of_row(float value) {
  value += __shfl_xor_sync(~0u, value, 1);
  return value + __shfl_xor_sync(~0u, value, 2);
}

// The second half of the block on a warp's 16 rows: the residual's sums in registers.
template <class T>
struct Rows {
  using M = Core<T>;
  typename M::C sum[kWidth / 16];

  // sum[j] += a (16 x 64 at `row`, this lane's) times 64 columns of a weight.
  __device__ void add(const typename M::A (&a)[4], Shared<T> weight) {
#pragma unroll
    for (int j = 0; j < kWidth / 16; ++j) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        typename M::ColumnsB b;
        M::load_columns(b, weight + 16 * j * kNarrow + 16 * k, kNarrow);
        M::multiply_add(sum[j], a[k], b);
      }
    }
  }

  // Adds a row of x for each row, and a bias.
  __device__ void add(const T* const (&x)[2], const float* bias) {
#pragma unroll
    for (int j = 0; j < kWidth / 16; ++j) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int column = 16 * j + M::column(i);
        sum[j].x[i] += to_float(x[i % 4 / 2][column]) + bias[column];
      }
    }
  }

  // LN of the rows into shared memory; then the bias of what will be added is added.
  __device__ void normalise(Shared<T> to, float eps, const float* bias) {
    float mean[2] = {}, square[2] = {}, rstd[2];
#pragma unroll
    for (auto& tile : sum) {
#pragma unroll
      for (int i = 0; i < 8; ++i) mean[i % 4 / 2] += tile.x[i];
    }
#pragma unroll
    for (float& value : mean) value = sum_of_row(value) / kWidth;
#pragma unroll
    for (auto& tile : sum) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float apart = tile.x[i] - mean[i % 4 / 2];
        square[i % 4 / 2] += apart * apart;
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) rstd[i] = rsqrtf(sum_of_row(square[i]) / kWidth + eps);
#pragma unroll
    for (int j = 0; j < kWidth / 16; ++j) {
#pragma unroll
      for (int i = 0; i < 8; i += 2) {
        const int half = i % 4 / 2, column = 16 * j + M::column(i);
        store4(to + M::row(i) * kStride + column,
               pack<T>((sum[j].x[i] - mean[half]) * rstd[half],
                       (sum[j].x[i + 1] - mean[half]) * rstd[half]));
        sum[j].x[i] += bias[column];
        sum[j].x[i + 1] += bias[column + 1];
      }
    }
    __syncwarp();
  }

  // Rounded into shared memory.
  __device__ void store(Shared<T> to) {
    __syncwarp();
#pragma unroll
    for (int j = 0; j < kWidth / 16; ++j) {
#pragma unroll
      for (int i = 0; i < 8; i += 2) {
        store4(to + M::row(i) * kStride + 16 * j + M::column(i),
               pack<T>(sum[j].x[i], sum[j].x[i + 1]));
      }
    }
    __syncwarp();
  }
};

}  // namespace slimvit
