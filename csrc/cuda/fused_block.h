// The pieces of fused_block.cu: weights that stream by, and the rows of a warp.
#pragma once

#include "cuda/activation.h"
#include "cuda/ops.h"
#include "cuda/row_stats.h"
#include "cuda/slim_attention.h"

namespace slimvit {

constexpr int kD = 64;           // of a head
constexpr int kShare = 192;      // columns of the residual whose sums a warp holds
constexpr int kNarrow = kD + 8;  // rows of keys, values, and weights taken 64 columns at a time

// A model of `width` channels. Where they are too many for one warp's registers, several warps have
// the same sixteen rows: each its own heads, its own hidden channels and its own columns of the
// result.
template <class Type, int width>
struct Shape {
  using T = Type;
  using M = Ampere<Type>;
  static constexpr int kWidth = width;
  static constexpr int kHeads = width / kD;
  static constexpr int kSides = width / kShare;
  static constexpr int kStride = width + 8;  // rows of activations, and of weights taken 64 rows
  static constexpr int kTile = width * kNarrow;  // room for either tile of a weight, values
  static_assert(width % kShare == 0 && kTile >= 64 * kStride, "whole sides, and either tile fits");
};

// Tiles of the weights in the order in which they are needed: keys, values and queries of as many
// heads as there are sides, again and again, the projection by heads, then fc1 and fc2 by 64 hidden
// channels.
template <class S>
struct Weights {
  using T = typename S::T;

  const FusedBlock& p;
  Shared<T> room;
  int next = 0;

  __device__ Weights(const FusedBlock& p, Shared<T> room) : p(p), room(room) {}

  __device__ int count() const { return 4 * S::kHeads + 2 * (p.hidden / 64); }
  __device__ Shared<T> at(int tile) const { return room + tile % p.stages * S::kTile; }

  __device__ void fetch(int tile) {
    if (tile >= count()) return;
    const int late = tile - 3 * S::kHeads, last = tile - 4 * S::kHeads;
    if (late < 0) {
      const int kind = tile / S::kSides % 3;  // keys, values, queries
      const int head = tile / (3 * S::kSides) * S::kSides + tile % S::kSides;
      rows(tile, p.qkv, (kind + 1) % 3 * S::kWidth + head * kD);
    } else if (last < 0) {
      columns(tile, p.proj, S::kWidth, late * kD);
    } else if (last % 2 == 0) {
      rows(tile, p.fc1, last / 2 * 64);
    } else {
      columns(tile, p.fc2, p.hidden, last / 2 * 64);
    }
    close_copies();
  }

  // 64 rows of a weight [·, width].
  __device__ void rows(int tile, const void* weight, int first) {
    constexpr int kVectors = S::kWidth / 8;
    const T* from = static_cast<const T*>(weight) + first * S::kWidth;
    for (int i = threadIdx.x; i < 64 * kVectors; i += blockDim.x) {
      const int row = i / kVectors, column = i % kVectors * 8;
      copy16_async(at(tile) + row * S::kStride + column, from + row * S::kWidth + column, true);
    }
  }

  // 64 columns of a weight [width, stride].
  __device__ void columns(int tile, const void* weight, int stride, int first) {
    const T* from = static_cast<const T*>(weight) + first;
    for (int i = threadIdx.x; i < S::kWidth * 64 / 8; i += blockDim.x) {
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

// c[j] = rows (16, wherever this lane's is) times 16 * count rows of a weight.
template <class S, int count>
__device__ void multiply_rows(typename S::M::C (&c)[count], Shared<typename S::T> row,
                              Shared<typename S::T> weight) {
  using M = typename S::M;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (auto& tile : c) M::zero(tile);
#pragma unroll 4
  for (int k = 0; k < S::kWidth; k += 16) {
    typename M::A a;
    load_matrices<false>(a.r, row + k + lane / 16 * 8);
#pragma unroll
    for (int j = 0; j < count; ++j) {
      typename M::ColumnsB b;
      M::load_columns(b, weight + 16 * j * S::kStride + k, S::kStride);
      M::multiply_add(c[j], a, b);
    }
  }
}

// c into 16 rows of shared memory, rounded.
template <class M, int count>
__device__ void store_rows(Shared<typename M::T> to, int stride, const typename M::C (&c)[count]) {
#pragma unroll
  for (int j = 0; j < count; ++j) {
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
      store4(to + M::row(i) * stride + 16 * j + M::column(i),
             pack<typename M::T>(c[j].x[i], c[j].x[i + 1]));
    }
  }
}

template <class M, int count>
__device__ void add_bias(typename M::C (&c)[count], const float* bias) {
#pragma unroll
  for (int j = 0; j < count; ++j) {
#pragma unroll
    for (int i = 0; i < 8; ++i) c[j].x[i] += bias[16 * j + M::column(i)];
  }
}

// Rows normalised, a warp each, from global to shared memory; rows beyond the end are zero.
template <class S>
__device__ void normalise(Shared<typename S::T> to, const typename S::T* x, int m, int rows,
                          float eps) {
  using T = typename S::T;
  constexpr int kVectors = S::kWidth / 8, kRounds = (kVectors + 31) / 32;
  const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
  for (int row = threadIdx.x / 32; row < rows; row += warps) {
    float values[kRounds][8] = {};
    float sum = 0, square = 0;
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
      const int vector = lane + 32 * r;
      if (vector < kVectors && row < m)
        unpack<T>(load16(x + row * S::kWidth + 8 * vector), values[r]);
      for (float value : values[r]) sum += value;
    }
    for (int far = 16; far > 0; far /= 2) sum += __shfl_xor_sync(~0u, sum, far);
    const float mean = sum / S::kWidth;
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
      for (float& value : values[r]) {
        value = lane + 32 * r < kVectors ? value - mean : 0;
        square += value * value;
      }
    }
    for (int far = 16; far > 0; far /= 2) square += __shfl_xor_sync(~0u, square, far);
    const float rstd = row < m ? rsqrtf(square / S::kWidth + eps) : 0.0f;
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
      const int vector = lane + 32 * r;
      for (float& value : values[r]) value *= rstd;
      if (vector < kVectors) store16(to + row * S::kStride + 8 * vector, pack<T>(values[r]));
    }
  }
}

// Sums over the four lanes that share a row; unused where the kernel is empty, on older cores.
[[maybe_unused]] __device__ inline float sum_of_row(float value) {
  value += __shfl_xor_sync(~0u, value, 1);
  return value + __shfl_xor_sync(~0u, value, 2);
}

// Adds up, over the sides, what their warps have of the rows l / 4 and l / 4 + 8.
template <int kSides>
__device__ void sum_over_sides(float (&value)[2], Shared<float> room) {
  if constexpr (kSides > 1) {
    const int warp = threadIdx.x / 32, row = threadIdx.x % 32 / 4;
    if (threadIdx.x % 4 == 0) {
      room[16 * warp + row] = value[0];
      room[16 * warp + row + 8] = value[1];
    }
    __syncthreads();
    value[0] = value[1] = 0;
    for (int side = 0; side < kSides; ++side) {
      const int at = 16 * (warp / kSides * kSides + side) + row;
      value[0] += room[at];
      value[1] += room[at + 8];
    }
  }
}

// The second half of the block on a warp's 16 rows: its columns of the residual, in registers.
template <class S>
struct Rows {
  using T = typename S::T;
  using M = typename S::M;
  typename M::C sum[kShare / 16];

  __device__ Rows() {
#pragma unroll
    for (auto& tile : sum) M::zero(tile);
  }

  // sum += a (16 x 64) times 64 columns of a weight.
  __device__ void add(const typename M::A (&a)[4], Shared<T> weight) {
#pragma unroll
    for (int j = 0; j < kShare / 16; ++j) {
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
    add_bias<M>(sum, bias);
#pragma unroll
    for (int j = 0; j < kShare / 16; ++j) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        sum[j].x[i] += to_float(x[i % 4 / 2][16 * j + M::column(i)]);
      }
    }
  }

  // LN of the rows into shared memory, this warp's columns of it. `room` has two floats for each
  // row of each warp.
  __device__ void normalise(Shared<T> to, float eps, Shared<float> room) {
    float mean[2] = {}, square[2] = {};
#pragma unroll
    for (auto& tile : sum) {
#pragma unroll
      for (int i = 0; i < 8; ++i) mean[i % 4 / 2] += tile.x[i];
    }
#pragma unroll
    for (float& value : mean) value = sum_of_row(value);
    sum_over_sides<S::kSides>(mean, room);
#pragma unroll
    for (float& value : mean) value /= S::kWidth;
#pragma unroll
    for (auto& tile : sum) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float apart = tile.x[i] - mean[i % 4 / 2];
        square[i % 4 / 2] += apart * apart;
      }
    }
#pragma unroll
    for (float& value : square) value = sum_of_row(value);
    sum_over_sides<S::kSides>(square, room + blockDim.x / 2);
#pragma unroll
    for (float& value : square) value = rsqrtf(value / S::kWidth + eps);
#pragma unroll
    for (int j = 0; j < kShare / 16; ++j) {
#pragma unroll
      for (int i = 0; i < 8; i += 2) {
        const int half = i % 4 / 2;
        store4(to + M::row(i) * S::kStride + 16 * j + M::column(i),
               pack<T>((sum[j].x[i] - mean[half]) * square[half],
                       (sum[j].x[i + 1] - mean[half]) * square[half]));
      }
    }
    __syncwarp();
  }
};

}  // namespace slimvit
