// How much of each token of an image no better token stands for:
//
//   cosine_ij = cosine of LN(x)_i and LN(x)_j
//   score_i   = sqrt(importance_i) · (1 - max cosine_ij)
//
// over the patches j ahead of i in importance, among equals the earlier. Only so many patches of
// least importance are candidates: the score of any other token is infinite, so that it is kept.
//
// Two launches: that of absorb_importance.cu, then some rows of the cosines a block, with all
// columns.

#include "cuda/absorb.h"
#include "cuda/mma.h"
#include "cuda/ops.h"

namespace slimvit {
namespace {

constexpr int kK = 64;           // channels at a time
constexpr int kStride = kK + 8;  // rows of a tile start in different banks
constexpr int kPatch = 16 + 4;   // of sixteen columns that a warp lays out

// Blocks of kM rows: sixteen where there are few, so that more multiprocessors have some.
template <int kM>
struct Shape {
  static constexpr int kN = kM == 16 ? 128 : 64;   // columns at a time
  static constexpr int kSide = kM == 16 ? 1 : 2;   // sixteens of rows, and of columns, of a warp
  static constexpr int kAcross = kN / 16 / kSide;  // warps beside each other
  static constexpr int kThreads = kM / 16 / kSide * kAcross * 32;
  static constexpr int kLines = kM + kN;  // rows of x in shared memory

  static int shared_bytes(int m) {
    const int fixed =
        2 * kLines * kStride * 2 + (kThreads / 32 * 16 * kPatch + 2 * kAcross * kM) * 4;
    return fixed + 2 * ceil_div(m * 4, 32) * 32;
  }
};

// Copies rows into shared memory: those of the block, then those that are its columns.
template <class M, int kM>
struct Loader {
  using T = typename M::T;
  using S = Shape<kM>;
  static constexpr int kVectors = kK / 8;
  static constexpr int kRounds = (S::kLines * kVectors + S::kThreads - 1) / S::kThreads;

  const T* rows;
  int m, width, first_row;
  uint4 held[M::asynchronous ? 1 : kRounds];

  static __device__ int slot(int i) { return threadIdx.x + i * S::kThreads; }
  static __device__ bool inside(int i) { return slot(i) < S::kLines * kVectors; }
  static __device__ int line(int i) { return slot(i) / kVectors; }
  static __device__ int channel(int i) { return slot(i) % kVectors * 8; }

  __device__ void fetch(Shared<T> to, int first_column, int k) {
#pragma unroll
    for (int i = 0; i < kRounds; ++i) {
      if (!inside(i)) continue;
      const int at = line(i) < kM ? first_row + line(i) : first_column + line(i) - kM;
      const T* from = rows + std::int64_t(min(at, m - 1)) * width;
      const bool live = k + channel(i) < width;
      if (live) from += k + channel(i);
      if constexpr (M::asynchronous) {
        copy16_async(to + line(i) * kStride + channel(i), from, live);
      } else {
        held[i] = live ? load16(from) : uint4{0, 0, 0, 0};
      }
    }
    if constexpr (M::asynchronous) close_copies();
  }

  // What was fetched is in shared memory after this and a barrier.
  __device__ void settle(Shared<T> to) {
    if constexpr (M::asynchronous) {
      wait_copies<0>();
    } else {
#pragma unroll
      for (int i = 0; i < kRounds; ++i) {
        if (inside(i)) store16(to + line(i) * kStride + channel(i), held[i]);
      }
    }
  }
};

// A warp's share of the cosines.
template <class M, int kM>
struct Cosines {
  using T = typename M::T;
  using S = Shape<kM>;

  typename M::C c[S::kSide][S::kSide];
  // Of rows 2 i + lane / 16, among the columns of this lane: the greatest cosine, and how many
  // patches are ahead.
  float nearest[S::kSide][8];
  int ahead[S::kSide][8] = {};
  int row, column;  // of the warp in a tile

  __device__ Cosines() {
    const int warp = threadIdx.x / 32;
    row = warp / S::kAcross * 16 * S::kSide;
    column = warp % S::kAcross * 16 * S::kSide;
    for (auto& side : nearest) {
      for (float& value : side) value = kFarthest;
    }
    clear();
  }

  __device__ void clear() {
    for (auto& side : c) {
      for (auto& tile : side) M::zero(tile);
    }
  }

  __device__ void add(Shared<T> tile) {
    Shared<T> x = tile + row * kStride, y = tile + (kM + column) * kStride;
#pragma unroll
    for (int k = 0; k < kK; k += 16) {
      typename M::A a[S::kSide];
      typename M::ColumnsB b[S::kSide];
#pragma unroll
      for (int i = 0; i < S::kSide; ++i) M::load(a[i], x + 16 * i * kStride + k, kStride);
#pragma unroll
      for (int i = 0; i < S::kSide; ++i) M::load_columns(b[i], y + 16 * i * kStride + k, kStride);
#pragma unroll
      for (int i = 0; i < S::kSide; ++i) {
#pragma unroll
        for (int j = 0; j < S::kSide; ++j) M::multiply_add(c[i][j], a[i], b[j]);
      }
    }
  }

  // Writes the cosines of a tile and starts afresh.
  __device__ void finish(const AbsorbScores& p, Shared<float> patch, Shared<float> importance,
                         Shared<float> shrink, int first_row, int first_column) {
    const int lane = threadIdx.x % 32;
    float* cosine = p.cosine + std::int64_t(blockIdx.y) * p.m * p.m;
#pragma unroll
    for (int s = 0; s < S::kSide; ++s) {
#pragma unroll
      for (int t = 0; t < S::kSide; ++t) {
        M::store(patch, c[s][t], kPatch);
        __syncwarp();
        const int j = first_column + column + 16 * t + lane % 16;
        const float theirs = importance[min(j, p.m - 1)], by = shrink[min(j, p.m - 1)];
#pragma unroll
        for (int r = 0; r < 8; ++r) {
          const int at = 2 * r + lane / 16, i = first_row + row + 16 * s + at;
          if (i >= p.m || j >= p.m) continue;
          const float value = patch[at * kPatch + lane % 16] * (shrink[i] * by);
          const bool counts = j >= p.prefix && is_ahead(theirs, importance[i], j < i);
          cosine[std::int64_t(i) * p.m + j] = counts ? value : kFarthest;
          if (counts) nearest[s][r] = fmaxf(nearest[s][r], value);
          ahead[s][r] += counts;
        }
        __syncwarp();
      }
    }
    clear();
  }

  // The greatest cosine of each row among this warp's columns, and the patches ahead.
  __device__ void reduce(Shared<float> greatest, Shared<int> rank) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int s = 0; s < S::kSide; ++s) {
#pragma unroll
      for (int r = 0; r < 8; ++r) {
        float value = nearest[s][r];
        int count = ahead[s][r];
        for (int far = 8; far > 0; far /= 2) {
          value = fmaxf(value, __shfl_xor_sync(~0u, value, far));
          count += __shfl_xor_sync(~0u, count, far);
        }
        if (lane % 16 == 0) {
          greatest[row + 16 * s + 2 * r + lane / 16] = value;
          rank[row + 16 * s + 2 * r + lane / 16] = count;
        }
      }
    }
  }
};

// Sums of heads, and what to multiply rows by, of all tokens of the image.
__device__ void take_tokens(const AbsorbScores& p, Shared<float> importance, Shared<float> shrink) {
  const std::int64_t image = blockIdx.y;
  for (int j = threadIdx.x; j < p.m; j += blockDim.x) {
    float sum = 0;
    for (int h = 0; h < p.heads; ++h) sum += p.of_heads[(image * p.heads + h) * p.m + j];
    importance[j] = sum;
    shrink[j] = p.shrink[image * p.m + j];
  }
}

template <class M, int kM>
__global__ void __launch_bounds__(Shape<kM>::kThreads) absorb_scores_kernel(AbsorbScores p) {
  if constexpr (compiled_for<M>()) {
    using T = typename M::T;
    using S = Shape<kM>;
    Shared<unsigned char> memory = shared_memory();
    Shared<T> tiles = carve<T>(memory, 2 * S::kLines * kStride);
    Shared<float> patches = carve<float>(memory, S::kThreads / 32 * 16 * kPatch);
    Shared<float> greatest = carve<float>(memory, S::kAcross * kM);
    Shared<int> ranks = carve<int>(memory, S::kAcross * kM);
    Shared<float> importance = carve<float>(memory, p.m), shrink = carve<float>(memory, p.m);
    const std::int64_t image = blockIdx.y;
    const int warp = threadIdx.x / 32, first_row = blockIdx.x * kM;
    const T* rows = static_cast<const T*>(p.normed) + image * p.m * p.width;

    Loader<M, kM> loader{rows, p.m, p.width, first_row, {}};
    loader.fetch(tiles, 0, 0);
    take_tokens(p, importance, shrink);
    Cosines<M, kM> cosines;
    loader.settle(tiles);
    __syncthreads();
    const int chunks = (p.width + kK - 1) / kK;
    const int steps = chunks * ((p.m + S::kN - 1) / S::kN);
    for (int step = 0, chunk = 0, first_column = 0; step < steps; ++step) {
      const int next_chunk = chunk + 1 == chunks ? 0 : chunk + 1;
      const int next_column = next_chunk == 0 ? first_column + S::kN : first_column;
      const bool more = step + 1 < steps;
      Shared<T> next = tiles + (1 - step % 2) * S::kLines * kStride;
      if (more) loader.fetch(next, next_column, next_chunk * kK);
      cosines.add(tiles + step % 2 * S::kLines * kStride);
      if (next_chunk == 0) {
        cosines.finish(p, patches + warp * 16 * kPatch, importance, shrink, first_row,
                       first_column);
      }
      if (more) loader.settle(next);
      __syncthreads();
      chunk = next_chunk;
      first_column = next_column;
    }
    cosines.reduce(greatest + warp % S::kAcross * kM, ranks + warp % S::kAcross * kM);
    __syncthreads();
    for (int row = threadIdx.x; row < min(kM, p.m - first_row); row += S::kThreads) {
      float nearest = greatest[row];
      int rank = ranks[row];
      for (int i = 1; i < S::kAcross; ++i) {
        nearest = fmaxf(nearest, greatest[i * kM + row]);
        rank += ranks[i * kM + row];
      }
      const std::int64_t at = image * p.m + first_row + row;
      const float mine = importance[first_row + row];
      p.importance[at] = mine;
      const bool candidate = rank >= p.m - p.prefix - p.candidates;
      p.score[at] = candidate ? score_of(mine, nearest) : never_pruned();
    }
  }
}

template <class M, int kM>
void launch_scores(const AbsorbScores& p, void* stream) {
  launch("absorb_scores", absorb_scores_kernel<M, kM>, dim3(ceil_div(p.m, kM), p.batch),
         Shape<kM>::kThreads, Shape<kM>::shared_bytes(p.m), stream, p);
}

template <class M>
void launch_scores(const AbsorbScores& p, void* stream) {
  const bool few = p.batch * p.m <= 2048;
  if (few && Shape<16>::shared_bytes(p.m) <= shared_memory_limit()) {
    return launch_scores<M, 16>(p, stream);
  }
  launch_scores<M, 64>(p, stream);
}

}  // namespace

void absorb_scores(const AbsorbScores& p, Type type, void* stream) {
  absorb_importance(p, type, stream);
  if (architecture() < 80) return launch_scores<Volta>(p, stream);
  if (type == Type::half) return launch_scores<Ampere<Half>>(p, stream);
  launch_scores<Ampere<BFloat16>>(p, stream);
}

}  // namespace slimvit
