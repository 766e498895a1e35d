#pragma once

#include "cpu/activation.h"
#include "cpu/gemm.h"
#include "cpu/stopwatch.h"

// softmax(q kᵀ + bias) v of one head, in groups of rows whose logits stay in the first cache.

namespace slimvit {
namespace {

// Whole tiles of both products.
template <class S>
constexpr long kQueryRows = most(24, S::rows(S::kVecs));
constexpr float kMinusInfinity = -__builtin_inff();
constexpr float kLog2E = 1.44269504f;

// Panels of the values: as wide as a head where the registers allow it.
template <class S>
constexpr int value_vecs(long head_dim) {
  const long vecs = head_dim / S::kLanes;
  if (vecs <= S::kValueVecs) return static_cast<int>(vecs);
  for (int v = S::kValueVecs; v > 1; --v)
    if (vecs % v == 0) return v;
  return S::kVecs;
}

// Keys [m, d] as the columns of q kᵀ; one more row may follow them. Rows are `ld` apart.
template <class S, typename T>
void pack_keys(const T* k, long ld, long m, long d, const T* extra, T* out) {
  const long keys = m + (extra != nullptr), columns = Panels<S, T>::columns(keys);
  const long words = d / kStep<T>, row_bytes = ld * sizeof(T);
  for (long first = 0; first < columns; first += S::kVecs * S::kLanes) {
    const long width = least(S::kVecs * S::kLanes, columns - first);
    char* panel = reinterpret_cast<char*>(out + first * d);
    for (long lane = 0; lane < width; lane += S::kLanes) {
      const long row = first + lane;
      const int valid = static_cast<int>(most(0, least(S::kLanes, m - row)));
      for (long i = 0; i < words; i += S::kLanes) {
        const char* in = reinterpret_cast<const char*>(k + row * ld + i * kStep<T>);
        char* to = panel + (i * width + lane) * 4;
        S::transpose(in, row_bytes, valid, to, width * 4, least(S::kLanes, words - i));
      }
      if (extra != nullptr && row <= m && m < row + S::kLanes)
        for (long i = 0; i < words; ++i)
          __builtin_memcpy(panel + (i * width + lane + m - row) * 4, extra + i * kStep<T>, 4);
    }
  }
}

// Values [m, d], and one more row, as the columns of p v.
template <class S, typename T>
void pack_values(const T* v, long ld, long m, long d, const T* extra, T* out) {
  const long keys = m + (extra != nullptr), depth = Panels<S, T>::depth(keys);
  const long panel = value_vecs<S>(d) * S::kLanes;
  const auto row = [&](long i) { return i < m ? v + i * ld : i < keys ? extra : nullptr; };
  for (long i = 0; i < depth; i += kStep<T>)
    for (long first = 0; first < d; first += panel) {
      const long width = least(panel, d - first);
      T* to = out + first * depth + i * width;
      for (long c = 0; c < width; c += S::kLanes)
        if constexpr (kStep<T> == 1) {
          S::store(to + c, S::load(row(i) + first + c));
        } else {
          const T* next = row(i + 1);
          S::interleave(row(i) + first + c, next == nullptr ? nullptr : next + first + c,
                        to + c * kStep<T>);
        }
    }
}

// Logits in float32 and, for each row, the largest of each lane.
template <class S>
struct Logits : FromBias<S> {
  static constexpr int kMaxVecs = S::kVecs;
  float* out;
  long ld;
  float* largest;  // [rows, lanes]

  template <int MR, int NV>
  SLIMVIT_INLINE void end(typename S::F (&acc)[MR][NV], long row, long column) const {
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) {
      auto top = S::load(largest + (row + i) * S::kLanes);
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) {
        S::store(out + (row + i) * ld + column + j * S::kLanes, acc[i][j]);
        top = S::max(top, acc[i][j]);
      }
      S::store(largest + (row + i) * S::kLanes, top);
    }
  }
};

// Rows scaled, as T.
template <class S, typename T>
struct Scaled : FromBias<S> {
  static constexpr int kMaxVecs = S::kValueVecs;
  T* out;
  long ld;
  const float* scale;  // [rows]

  template <int MR, int NV>
  SLIMVIT_INLINE void end(typename S::F (&acc)[MR][NV], long row, long column) const {
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) {
      const auto factor = S::set(scale[row + i]);
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j)
        S::store(out + (row + i) * ld + column + j * S::kLanes, S::mul(acc[i][j], factor));
    }
  }
};

// p = 2^(logits - largest), and 1 / its sum.
template <class S, typename T>
float softmax_row(const float* logits, const float* largest, long columns, T* p) {
  const auto top = S::set(S::largest(S::load(largest)));
  auto sum = S::zero();
  for (long c = 0; c < columns; c += S::kLanes) {
    const auto e = exp2<S, T>(S::sub(S::load(logits + c), top));
    sum = S::add(sum, e);
    S::store(p + c, e);
  }
  return 1.0f / S::sum(sum);
}

template <class S, typename T>
struct AttentionMemory {
  float* logits;   // [rows, columns]
  float* largest;  // [rows, lanes]
  float* scale;    // [rows]
  T* p;            // [rows, columns]
};

// `n` rows of queries, scaled so that logits are logarithms to base 2, over packed keys and values.
// `bias` [columns] is -∞ where the columns are padding.
template <class S, typename T>
void slim_attention(const T* q, long ldq, long n, const T* keys, const T* values, const float* bias,
                    long m, long d, T* out, long ldo, const AttentionMemory<S, T>& memory) {
  const long columns = Panels<S, T>::columns(m), depth = Panels<S, T>::depth(m);
  const Panels<S, T> k{keys, columns, d, S::kVecs};
  const Panels<S, T> v{values, d, depth, value_vecs<S>(d)};
  for (long row = 0; row < n; row += kQueryRows<S>) {
    const long rows = least(kQueryRows<S>, n - row);
    {
      const Stopwatch stopwatch(Phase::logits);
      for (long i = 0; i < rows; ++i)
        S::store(memory.largest + i * S::kLanes, S::set(kMinusInfinity));
      Logits<S> logits{{bias}, memory.logits, columns, memory.largest};
      gemm(q + row * ldq, ldq, rows, k, logits);
    }
    {
      const Stopwatch stopwatch(Phase::softmax);
      for (long i = 0; i < rows; ++i)
        memory.scale[i] =
            softmax_row<S, T>(memory.logits + i * columns, memory.largest + i * S::kLanes, columns,
                              memory.p + i * columns);
    }
    const Stopwatch stopwatch(Phase::values);
    Scaled<S, T> scaled{{nullptr}, out + row * ldo, ldo, memory.scale};
    gemm(memory.p, columns, rows, v, scaled);
  }
}

}  // namespace
}  // namespace slimvit
