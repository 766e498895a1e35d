// Linear layers of a slimmed block: the norm folded in, rows gathered in the loads, and an epilogue
// of norm, bias, activation, gathered residual and statistics of the result.
//
//   out = act((x - mean) · rstd · W'ᵀ + b') + residual
//
// A row that stands for several tokens may have a spread: it adds to the variance of the norm, and
// the activation is its mean over those tokens.
//
// The product takes x as it is; since (x - mean) W'ᵀ = x W'ᵀ - mean · (row sums of W'), the
// epilogue puts mean and rstd right.

#include "cuda/activation.h"
#include "cuda/mma.h"
#include "cuda/ops.h"
#include "cuda/row_stats.h"

namespace slimvit {
namespace {

constexpr int kN = 64;           // columns of a tile: one part of the statistics
constexpr int kK = 64;           // of the inner dimension at a time
constexpr int kStride = kK + 8;  // rows of a tile start in different banks
constexpr int kOutStride = kN + 4;

constexpr int kStages = 2;

template <int kM>
constexpr int shared_bytes() {
  const int tiles = kStages * (kM + kN) * kStride * 2;
  const int out = kM * kOutStride * 4;
  return (tiles > out ? tiles : out) + 3 * kM * 4;
}

// Which rows and columns a block computes.
struct Tile {
  int first_row, rows, per_image;
  int first_column, columns, weight_row;
  bool tail;
};

template <int kM>
__device__ Tile find_tile(const Linear& p) {
  Tile tile;
  int block = blockIdx.x;
  const int head = ((p.batch * p.n + kM - 1) / kM) * ((p.columns + kN - 1) / kN);
  tile.tail = block >= head;
  if (tile.tail) block -= head;
  tile.per_image = tile.tail ? p.x_rows : p.n;
  tile.columns = tile.tail ? p.tail_columns : p.columns;
  tile.rows = p.batch * tile.per_image;
  // Neighbouring blocks share rows, which they so find in the L2 cache.
  const int across = (tile.columns + kN - 1) / kN;
  tile.first_row = block / across * kM;
  tile.first_column = block % across * kN;
  tile.weight_row = (tile.tail ? p.columns : blockIdx.y * p.columns) + tile.first_column;
  return tile;
}

struct Place {
  int image, place, source;
};

// Of a row of the tile: its image, its place there, and the row that an index makes of it.
__device__ Place place_of(const Linear& p, const Tile& tile, int row) {
  const int at = min(tile.first_row + row, tile.rows - 1);
  Place found;
  found.image = at / tile.per_image;
  found.place = at % tile.per_image;
  const bool gathered = p.index != nullptr && !tile.tail;
  found.source =
      gathered ? int(p.index[std::int64_t(found.image) * p.n + found.place]) : found.place;
  return found;
}

// Copies tiles of x and of the weight into shared memory, 16 bytes a thread at a time: at once
// where copies are asynchronous, else by way of registers, so that loads are under way during a
// product.
template <class M, int kM, int kThreads>
struct Loader {
  using T = typename M::T;
  static constexpr int kVectors = kK / 8;
  static constexpr int kX = kM * kVectors / kThreads;
  static constexpr int kW = kN * kVectors / kThreads;
  static_assert(kM * kVectors % kThreads == 0 && kN * kVectors % kThreads == 0, "whole rounds");

  const T* x[kX];
  const T* w[kW];
  uint4 held[M::asynchronous ? 1 : kX + kW];

  __device__ Loader(const Linear& p, const Tile& tile, Shared<int> x_row) {
    const std::int64_t stride = std::int64_t(p.groups) * p.inner;
    const T* first = static_cast<const T*>(p.x) + std::int64_t(blockIdx.y) * p.inner + lane();
#pragma unroll
    for (int i = 0; i < kX; ++i) x[i] = first + x_row[row(i)] * stride;
    const int last = (tile.tail ? p.columns + p.tail_columns : (blockIdx.y + 1) * p.columns) - 1;
#pragma unroll
    for (int i = 0; i < kW; ++i) {
      const int weight_row = min(tile.weight_row + row(i), last);
      w[i] = static_cast<const T*>(p.weight) + std::int64_t(weight_row) * p.inner + lane();
    }
  }

  static __device__ int lane() { return threadIdx.x % kVectors * 8; }
  static __device__ int row(int i) { return (threadIdx.x + i * kThreads) / kVectors; }

  __device__ void fetch(Shared<T> to_x, Shared<T> to_w, int k, int inner) {
    const bool live = k + lane() < inner;
#pragma unroll
    for (int i = 0; i < kX; ++i) fetch_one(to_x, x[i], i, i, k, live);
#pragma unroll
    for (int i = 0; i < kW; ++i) fetch_one(to_w, w[i], i, kX + i, k, live);
    if constexpr (M::asynchronous) close_copies();
  }

  __device__ void fetch_one(Shared<T> to, const T* from, int i, int slot, int k, bool live) {
    if constexpr (M::asynchronous) {
      copy16_async(to + row(i) * kStride + lane(), live ? from + k : from, live);
    } else {
      held[slot] = live ? load16(from + k) : uint4{0, 0, 0, 0};
    }
  }

  // What was fetched is in shared memory after this and a barrier.
  __device__ void settle(Shared<T> to_x, Shared<T> to_w) {
    if constexpr (M::asynchronous) {
      wait_copies<0>();
    } else {
#pragma unroll
      for (int i = 0; i < kX; ++i) store16(to_x + row(i) * kStride + lane(), held[i]);
#pragma unroll
      for (int i = 0; i < kW; ++i) store16(to_w + row(i) * kStride + lane(), held[kX + i]);
    }
  }
};

// A warp's share of a tile: 32 x 32.
template <class M>
struct Product {
  typename M::C c[2][2];

  __device__ Product() {
    for (auto& row : c) {
      for (auto& tile : row) M::zero(tile);
    }
  }

  __device__ void add(Shared<typename M::T> x, Shared<typename M::T> w) {
#pragma unroll
    for (int k = 0; k < kK; k += 16) {
      typename M::A a[2];
      typename M::ColumnsB b[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) M::load(a[i], x + 16 * i * kStride + k, kStride);
#pragma unroll
      for (int i = 0; i < 2; ++i) M::load_columns(b[i], w + 16 * i * kStride + k, kStride);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int j = 0; j < 2; ++j) M::multiply_add(c[i][j], a[i], b[j]);
      }
    }
  }

  __device__ void store(Shared<float> at) {
    for (int i = 0; i < 2; ++i) {
      for (int j = 0; j < 2; ++j) M::store(at + 16 * i * kOutStride + 16 * j, c[i][j], kOutStride);
    }
  }
};

// Eight neighbouring columns of a row a thread.
template <class T, int kM, int kThreads>
__device__ void write_tile(const Linear& p, const Tile& tile, Shared<float> sums,
                           Shared<float> mean, Shared<float> rstd, Shared<int> x_row) {
  const int lane = threadIdx.x % (kN / 8) * 8;
  const int column = tile.first_column + lane;
  const bool inside = column < tile.columns;
  const int weight_row = tile.weight_row + (inside ? lane : 0);
  T* out = static_cast<T*>(tile.tail ? p.tail_out : p.out) + column;
  int stride = tile.columns;
  if (!tile.tail) {
    out += std::int64_t(blockIdx.y) * p.columns;
    stride *= p.groups;
  }
  for (int row = threadIdx.x / (kN / 8); row < kM; row += kThreads / (kN / 8)) {
    const Place at = place_of(p, tile, row);
    const bool live = inside && tile.first_row + row < tile.rows;
    float values[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = sums[row * kOutStride + lane + i];
    if (p.stats != nullptr) {
      const float shift = mean[row], scale = rstd[row];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        values[i] = (values[i] - shift * p.row_sums[weight_row + i]) * scale;
      }
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (p.bias != nullptr) values[i] += p.bias[weight_row + i];
    }
    if (p.spread == nullptr) {
      activate(values, p.activation);
    } else {
      const float share = p.spread[x_row[row]] * rstd[row] * rstd[row];
      float s[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) s[i] = share * p.squares[weight_row + i];
      activate(values, s, p.activation);
    }
    if (p.residual != nullptr && live) {
      float more[8];
      const std::int64_t from = std::int64_t(at.image) * p.residual_rows + at.source;
      unpack<T>(load16(static_cast<const T*>(p.residual) + from * p.columns + column), more);
#pragma unroll
      for (int i = 0; i < 8; ++i) values[i] += more[i];
    }
    const uint4 packed = pack<T>(values);
    const int out_rows = tile.tail ? p.x_rows : p.out_rows;
    const std::int64_t to = std::int64_t(at.image) * out_rows + at.place;
    if (live) store16(out + to * stride, packed);
    if (p.out_stats != nullptr) {
      unpack<T>(packed, values);  // of what the next norm will read
      float* part = p.out_stats + (to * (p.columns / p.part) + column / p.part) * 2;
      store_stats(part, values, p.part / 8, live);
    }
  }
}

template <class M, int kM>
__global__ void slim_linear_kernel(Linear p) {
  if constexpr (compiled_for<M>()) {
    using T = typename M::T;
    constexpr int kThreads = kM * 2;  // warps of 32 x 32
    Shared<unsigned char> memory = shared_memory();
    Shared<float> mean = carve<float>(memory, kM);
    Shared<float> rstd = carve<float>(memory, kM);
    Shared<int> x_row = carve<int>(memory, kM);
    Shared<unsigned char> tiles = memory;
    Shared<float> sums = carve<float>(tiles, kM * kOutStride);
    Shared<T> xs = carve<T>(memory, kStages * kM * kStride);
    Shared<T> ws = carve<T>(memory, kStages * kN * kStride);

    const Tile tile = find_tile<kM>(p);
    if (threadIdx.x < kM) {
      const Place at = place_of(p, tile, threadIdx.x);
      const int row = at.image * p.x_rows + (p.residual == nullptr ? at.source : at.place);
      x_row[threadIdx.x] = row;
      if (p.stats != nullptr) {
        const float* stats = p.stats + std::int64_t(row) * p.x_parts * 2;
        const float more = p.spread == nullptr ? 0.0f : p.spread[row];
        const Norm norm = norm_of(stats, p.x_parts, p.inner, p.eps + more);
        mean[threadIdx.x] = norm.mean;
        rstd[threadIdx.x] = norm.rstd;
      }
    }
    __syncthreads();

    Loader<M, kM, kThreads> loader(p, tile, x_row);
    Product<M> product;
    const int warp = threadIdx.x / 32;
    const int row = warp / 2 * 32, column = warp % 2 * 32;
    loader.fetch(xs, ws, 0, p.inner);
    loader.settle(xs, ws);
    __syncthreads();
    for (int k = 0; k < p.inner; k += kK) {
      const int now = k / kK % kStages, next = kStages - 1 - now;
      const bool more = k + kK < p.inner;
      Shared<T> next_x = xs + next * kM * kStride, next_w = ws + next * kN * kStride;
      if (more) loader.fetch(next_x, next_w, k + kK, p.inner);
      product.add(xs + (now * kM + row) * kStride, ws + (now * kN + column) * kStride);
      if (more) loader.settle(next_x, next_w);
      __syncthreads();
    }
    product.store(sums + row * kOutStride + column);
    __syncthreads();
    write_tile<T, kM, kThreads>(p, tile, sums, mean, rstd, x_row);
  }
}

template <class M, int kM>
void launch_linear(const Linear& p, void* stream) {
  int tiles = ceil_div(p.batch * p.n, kM) * ceil_div(p.columns, kN);
  if (p.tail_columns > 0) tiles += ceil_div(p.batch * p.x_rows, kM) * ceil_div(p.tail_columns, kN);
  launch("slim_linear", slim_linear_kernel<M, kM>, dim3(tiles, p.groups), kM * 2,
         shared_bytes<kM>(), stream, p);
}

template <class M>
void launch_linear(const Linear& p, void* stream) {
  // Few rows: smaller tiles, for there are more of them than multiprocessors only then.
  const int rows = p.tail_columns > 0 && p.x_rows > p.n ? p.x_rows : p.n;
  if (p.batch * rows <= 2048) return launch_linear<M, 32>(p, stream);
  launch_linear<M, 128>(p, stream);
}

}  // namespace

void slim_linear(const Linear& p, Type type, void* stream) {
  if (architecture() < 80) return launch_linear<Volta>(p, stream);
  if (type == Type::half) return launch_linear<Ampere<Half>>(p, stream);
  launch_linear<Ampere<BFloat16>>(p, stream);
}

}  // namespace slimvit
