#pragma once

#include "cpu/numbers.h"

// Matrix products of a few hundred rows by packed columns, with what follows them fused in.

namespace slimvit {
namespace {

// Columns in panels of `vecs` vectors, the last one narrower: [panel][step of k][column][kStep].
// Columns come in whole vectors and k in whole steps; padding is zero.
template <class S, typename T>
struct Panels {
  const T* data;
  long n;    // columns, with padding
  long k;    // depth, with padding
  int vecs;  // vectors across a whole panel

  static long columns(long n) { return round_up(n, S::kLanes); }
  static long depth(long k) { return round_up(k, kStep<T>); }
  static long size(long n, long k) { return columns(n) * depth(k); }
};

// Columns stream from the second cache, which stays this many steps ahead of the sums.
constexpr long kStepsAhead = 24;
constexpr long kLine = 64;  // bytes of a cache line

// Columns that stay in the second cache, in bytes, while all rows pass them; what follows them in
// memory is fetched meanwhile, and has room there too.
constexpr long kColumnBytes = 256 * 1024;

template <int NV, class S, typename T>
SLIMVIT_INLINE void prefetch_step(const T* b) {
  constexpr long kPerLine = kLine / static_cast<long>(sizeof(T));
#pragma GCC unroll 4
  for (long i = 0; i < NV * S::kLanes * kStep<T>; i += kPerLine) __builtin_prefetch(b + i);
}

// What a tile fetches into the second cache as it goes: from so many bytes behind the start of its
// columns on, so many bytes a step.
struct Ahead {
  long offset, pace;
};

// By how many rows of tiles what follows a block of columns is fetched: slowly, for only so many
// lines are under way at a time, and the block's own are among them.
constexpr long kFetchingTiles = 8;

// acc[i][j] += a[i] · b[:, j] over `steps` steps.
template <class S, typename T, int MR, int NV>
SLIMVIT_INLINE void multiply(typename S::F (&acc)[MR][NV], const T* a, long lda, const T* b,
                             long steps, Ahead ahead) {
  const char* next = reinterpret_cast<const char*>(b) + ahead.offset;
  constexpr long kStride = NV * S::kLanes * kStep<T>;
  for (long s = 0; s < steps; ++s) {
    prefetch_step<NV, S>(b + kStepsAhead * kStride);
    __builtin_prefetch(next, 0, 2);
    next += ahead.pace;
    decltype(S::operand(b)) column[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) column[j] = S::operand(b + j * S::kLanes * kStep<T>);
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) {
      const auto x = S::broadcast(a + i * lda);
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) acc[i][j] = S::dot(acc[i][j], x, column[j]);
    }
    a += kStep<T>;
    b += kStride;
  }
}

template <class S, typename T, int MR, int NV, class Epilogue>
void tile(const T* a, long lda, const T* b, long steps, Ahead ahead, long row, long column,
          Epilogue& epilogue) {
  typename S::F acc[MR][NV];
  epilogue.template begin<MR, NV>(acc, column);
  multiply<S, T, MR, NV>(acc, a, lda, b, steps, ahead);
  epilogue.template end<MR, NV>(acc, row, column);
}

// fn(Int<rows>), rows up to eight.
template <class Fn>
SLIMVIT_INLINE void with_rows(int rows, Fn fn) {
  switch (rows) {
    case 1:
      return fn(Int<1>{});
    case 2:
      return fn(Int<2>{});
    case 3:
      return fn(Int<3>{});
    case 4:
      return fn(Int<4>{});
    case 5:
      return fn(Int<5>{});
    case 6:
      return fn(Int<6>{});
    case 7:
      return fn(Int<7>{});
    default:
      return fn(Int<8>{});
  }
}

// Whether the instruction set multiplies matrices rather than vectors: see Amx.
template <class S, typename T>
constexpr bool kMatrices = S::kIsa == Isa::amx && kStep<T> == 2;

// What `tile` does, of more rows, by one product of matrices.
template <class S, int NV, class Epilogue>
void matrix_tile(int rows, const bf16* a, long lda, const bf16* b, long steps, long row,
                 long column, Epilogue& epilogue) {
  alignas(64) float sums[S::rows(NV) * NV * S::kLanes];
  S::template multiply<NV>(rows, a, lda, b, steps, sums);
  for (int first = 0; first < rows; first += 8)
    with_rows(static_cast<int>(least(8, rows - first)), [&](auto count) {
      constexpr int kCount = decltype(count)::value;
      typename S::F acc[kCount][NV];
      epilogue.template begin<kCount, NV>(acc, column);
#pragma GCC unroll 8
      for (int i = 0; i < kCount; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j)
          acc[i][j] = S::add(acc[i][j], S::load(sums + ((first + i) * NV + j) * S::kLanes));
      epilogue.template end<kCount, NV>(acc, row + first, column);
    });
}

template <class S, typename T, int NV, class Epilogue>
SLIMVIT_INLINE void tile_of(int rows, const T* a, long lda, const T* b, long steps, Ahead ahead,
                            long row, long column, Epilogue& epilogue) {
  if constexpr (kMatrices<S, T>)
    matrix_tile<S, NV>(rows, a, lda, b, steps, row, column, epilogue);
  else
    with_rows(rows, [&](auto count) {
      constexpr int kCount = decltype(count)::value;
      if constexpr (kCount <= S::rows(NV))
        tile<S, T, kCount, NV>(a, lda, b, steps, ahead, row, column, epilogue);
    });
}

// Where the rows of tile `t` of `tiles` begin: vectors have equal numbers, matrices whole ones.
template <class S, typename T>
long first_row(long m, long t, long tiles, int vecs) {
  return kMatrices<S, T> ? least(m, t * S::rows(vecs)) : m * t / tiles;
}

// The columns [begin, end) that a row of tiles passes: whole panels from `begin` on.
template <class S, typename T, class Epilogue>
void row_of_tiles(int rows, const T* a, long lda, const Panels<S, T>& b, Ahead ahead, long row,
                  long begin, long end, Epilogue& epilogue) {
  constexpr int kMaxVecs = Epilogue::kMaxVecs;
  const long steps = b.k / kStep<T>;
  for (long column = begin; column < end;) {
    const long vecs = least(b.vecs, (b.n - column) / S::kLanes);
    const T* panel = b.data + column * b.k;
    if (vecs == 1)
      tile_of<S, T, 1>(rows, a, lda, panel, steps, ahead, row, column, epilogue);
    else if (vecs == 2)
      tile_of<S, T, 2>(rows, a, lda, panel, steps, ahead, row, column, epilogue);
    else if constexpr (kMaxVecs >= 3) {
      if (vecs == 3)
        tile_of<S, T, 3>(rows, a, lda, panel, steps, ahead, row, column, epilogue);
      else if constexpr (kMaxVecs >= 4)
        tile_of<S, T, 4>(rows, a, lda, panel, steps, ahead, row, column, epilogue);
    }
    column += vecs * S::kLanes;
  }
}

// Rows [0, m) of `a` times all columns of `b`. As many columns as the second cache holds, and
// within them a tile's rows go outside: these stay in the first cache while the columns stream
// past. The rows of tiles after the first fetch what follows the block: as many bytes, which are
// its successor or the weights of the next product. Products of matrices (AMX) fetch nothing.
template <class S, typename T, class Epilogue>
void gemm(const T* a, long lda, long m, const Panels<S, T>& b, Epilogue& epilogue) {
  const long panel = b.vecs * S::kLanes;
  const long step_bytes = panel * kStep<T> * static_cast<long>(sizeof(T));
  const long panel_bytes = b.k / kStep<T> * step_bytes;
  const long block = panel * most(1, kColumnBytes / panel_bytes);
  const long tiles = (m + S::rows(b.vecs) - 1) / S::rows(b.vecs);
  const long fetching = least(kFetchingTiles, tiles - 1);
  for (long begin = 0; begin < b.n; begin += block) {
    const long end = least(begin + block, b.n);
    const long bytes = (end - begin) * b.k * static_cast<long>(sizeof(T));
    for (long t = 0; t < tiles; ++t) {
      const long row = first_row<S, T>(m, t, tiles, b.vecs);
      const int rows = static_cast<int>(first_row<S, T>(m, t + 1, tiles, b.vecs) - row);
      if constexpr (kMatrices<S, T>) S::configure(rows);
      Ahead ahead{0, 0};
      if (0 < t && t <= fetching)
        ahead = {bytes + (t - 1) * panel_bytes / fetching, step_bytes / fetching};
      row_of_tiles<S, T>(rows, a + row * lda, lda, b, ahead, row, begin, end, epilogue);
    }
  }
}

// Accumulators that start at a bias, or at zero.
template <class S>
struct FromBias {
  const float* bias;  // [n], padded to whole vectors; or null

  template <int MR, int NV>
  SLIMVIT_INLINE void begin(typename S::F (&acc)[MR][NV], long column) const {
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) {
      const auto x = bias == nullptr ? S::zero() : S::load(bias + column + j * S::kLanes);
#pragma GCC unroll 8
      for (int i = 0; i < MR; ++i) acc[i][j] = x;
    }
  }
};

// out = result.
template <class S, typename T>
struct Store : FromBias<S> {
  static constexpr int kMaxVecs = S::kVecs;
  T* out;
  long ld;

  template <int MR, int NV>
  SLIMVIT_INLINE void end(typename S::F (&acc)[MR][NV], long row, long column) const {
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j)
        S::store(out + (row + i) * ld + column + j * S::kLanes, acc[i][j]);
  }
};

// out += result, in float32.
template <class S>
struct Accumulate : FromBias<S> {
  static constexpr int kMaxVecs = S::kVecs;
  float* out;
  long ld;

  template <int MR, int NV>
  SLIMVIT_INLINE void end(typename S::F (&acc)[MR][NV], long row, long column) const {
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) {
        float* p = out + (row + i) * ld + column + j * S::kLanes;
        S::store(p, S::add(S::load(p), acc[i][j]));
      }
  }
};

// ---- packing, once per model -------------------------------------------------------------------

// W [n, k] in float32, whose rows are `ld` apart and whose entries are `step` apart, times
// `factor`, as the columns of a matrix product.
template <class S, typename T>
void pack_columns(const float* weight, long ld, long step, long n, long k, int vecs, float factor,
                  T* out) {
  const long columns = Panels<S, T>::columns(n), depth = Panels<S, T>::depth(k);
  for (long first = 0; first < columns; first += vecs * S::kLanes) {
    const long width = least(vecs * S::kLanes, columns - first);
    T* panel = out + first * depth;
    for (long c = 0; c < width; ++c)
      for (long i = 0; i < depth; ++i) {
        const bool inside = first + c < n && i < k;
        const float x = inside ? factor * weight[(first + c) * ld + i * step] : 0.0f;
        narrow(x, panel[(i / kStep<T> * width + c) * kStep<T> + i % kStep<T>]);
      }
  }
}

}  // namespace
}  // namespace slimvit
