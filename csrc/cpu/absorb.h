#pragma once

#include "cpu/select.h"
#include "cpu/workspace.h"

// Scores by attention and redundancy, and where pruned tokens go: slimvit/dynamic/absorb.py.

namespace slimvit {
namespace {

// Vectors across a panel of what tokens are compared by: in a triangle narrow ones waste less.
template <class S>
constexpr int kAbsorbVecs = static_cast<int>(least(2, S::kVecs));

// What is kept: tokens that the head's tokens read and that none of more importance stands for.
inline float absorb_score(float importance, float cosine) { return importance * (1.0f - cosine); }

// What a token weighs in an average, and what it adds to the size of the token it goes into.
inline float absorb_weight(float importance) { return importance > 1e-20f ? importance : 1e-20f; }
inline float absorb_gain(float size, float cosine) {
  return size * __builtin_sqrtf(cosine > 0.0f ? cosine : 0.0f);
}

// One image's tokens between their keys and their queries.
template <typename T>
struct Tokens {
  long m, prefix;
  const T* kv;    // [m, 2 · H · d]
  const T* keys;  // packed, every head's `head_size` apart
  long head_size;
  const T* query;  // [head_tokens, H · d], scaled so that logits are logarithms to base 2
  long head_tokens;
  const float* size;  // [m]
  const T* like;      // [m, depth]: tokens are alike as the cosine of these is great
  long depth;
};

// best = max(best, cosine · ‖row's key‖) over the columns that are ahead of the row.
template <class S>
struct Nearest : FromBias<S> {
  static constexpr int kMaxVecs = kAbsorbVecs<S>;
  const float* inverse;  // [columns]
  const float* stairs;   // at [kStairs + c - r]: 0 where column c is ahead of row r, else -∞
  long first;
  float* best;  // [rows, lanes]

  static constexpr long kStairs = 64;  // more than a tile's rows and columns are apart

  template <int MR, int NV>
  SLIMVIT_INLINE void end(typename S::F (&acc)[MR][NV], long row, long column) const {
    const bool all = column + NV * S::kLanes <= first + row;
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) {
      auto top = S::load(best + (row + i) * S::kLanes);
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) {
        const long c = column + j * S::kLanes;
        auto x = S::mul(acc[i][j], S::load(inverse + c));
        if (!all) x = S::add(x, S::load(stairs + kStairs + c - (first + row + i)));
        top = S::max(x, top);
      }
      S::store(best + (row + i) * S::kLanes, top);
    }
  }
};

// out = cosine · ‖row's key‖, -∞ in columns that are not open.
template <class S>
struct Cosines : FromBias<S> {
  static constexpr int kMaxVecs = kAbsorbVecs<S>;
  const float *inverse, *open;  // [columns]
  float* out;
  long ld;

  template <int MR, int NV>
  SLIMVIT_INLINE void end(typename S::F (&acc)[MR][NV], long row, long column) const {
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) {
        const long c = column + j * S::kLanes;
        S::store(out + (row + i) * ld + c,
                 S::fma(acc[i][j], S::load(inverse + c), S::load(open + c)));
      }
  }
};

template <class S, typename T>
class Absorb {
 public:
  Absorb(const Tokens<T>& tokens, const BlockShape& shape, const SharedChoice<T>& shared,
         const OwnChoice<S, T>& own)
      : tokens_(tokens), shape_(shape), shared_(shared), own_(own) {}

  // Squares of norms of tokens [begin, end), for all workers. Norms are those of numbers as rounded
  // to T, so that a token is as near to itself as can be.
  void measure(long begin, long end) const {
    for (long i = begin; i < end; ++i)
      shared_.square[i] = square(tokens_.like + i * tokens_.depth, tokens_.depth);
  }

  // Keys are alike where their sums over the heads are.
  void add_keys(T* sums, long begin, long end) const {
    const long d = shape_.head_dim;
    for (long i = begin; i < end; ++i) {
      const T* k = tokens_.kv + i * 2 * shape_.inner();
      for (long c = 0; c < d; c += S::kLanes) {
        auto x = S::load(k + c);
        for (long h = 1; h < shape_.heads; ++h) x = S::add(x, S::load(k + h * d + c));
        S::store(sums + i * d + c, x);
      }
    }
  }

  void measure_values(long begin, long end) const {
    const long d = shape_.head_dim;
    for (long i = begin; i < end; ++i) {
      const T* v = tokens_.kv + i * 2 * shape_.inner() + shape_.inner();
      for (long h = 0; h < shape_.heads; ++h)
        shared_.value_square[h * padded() + i] = square(v + h * d, d);
    }
  }

  // importance_i = Σ_h A^h[head tokens, i] · ‖V^h_i‖, A averaged over the tokens that the head
  // reads; `bias` [columns] is -∞ where the columns are padding.
  void weigh(const float* bias, const AttentionMemory<S, T>& memory) const {
    const long columns = Panels<S, T>::columns(tokens_.m), d = shape_.head_dim;
    for (long c = 0; c < columns; c += S::kLanes) S::store(own_.importance + c, S::zero());
    for (long h = 0; h < shape_.heads; ++h) {
      for (long i = 0; i < tokens_.head_tokens; ++i)
        S::store(memory.largest + i * S::kLanes, S::set(kMinusInfinity));
      Logits<S> logits{{bias}, memory.logits, columns, memory.largest};
      gemm(tokens_.query + h * d, shape_.inner(), tokens_.head_tokens,
           Panels<S, T>{tokens_.keys + h * tokens_.head_size, columns, d, S::kVecs}, logits);
      for (long i = 0; i < tokens_.head_tokens; ++i) {
        float* p = memory.logits + i * columns;
        const float scale = softmax_row<S, float>(p, memory.largest + i * S::kLanes, columns, p);
        add_importance(p, scale / static_cast<float>(tokens_.head_tokens),
                       shared_.value_square + h * padded());
      }
    }
  }

  // Patches in order of importance, so that those a patch is compared with are ahead of it.
  void order_by_importance() const {
    for (long i = 0; i < tokens_.m; ++i) own_.weight[i] = absorb_weight(own_.importance[i]);
    for (long i = 0; i < patches(); ++i) own_.key[i] = ordered(own_.importance[tokens_.prefix + i]);
    sort_descending<S>(own_.key, patches(), own_.order);
    invert();
  }

  // Every patch in its own place, of the weight of its size.
  void order_by_place() const {
    for (long i = 0; i < tokens_.m; ++i) own_.weight[i] = tokens_.size[i];
    for (long i = 0; i < patches(); ++i) own_.order[i] = static_cast<std::int32_t>(i);
    invert();
  }

  // The worker's panels of what patches are compared by.
  void pack(int rank, int size) const {
    constexpr long kPanel = kAbsorbVecs<S> * S::kLanes;
    for (long first = rank * kPanel; first < patches(); first += size * kPanel) {
      const long count = least(kPanel, patches() - first);
      for (long c = 0; c < count; ++c) take(tokens_.prefix + own_.order[first + c], c);
      pack_keys<S, T>(own_.taken, tokens_.depth, count, tokens_.depth, nullptr,
                      shared_.packed + first * tokens_.depth);
    }
  }

  // The worker's part of the scores: rows of a triangle, so that workers take them by turns.
  void score(int rank, int size) const {
    constexpr long kRows = S::rows(kAbsorbVecs<S>), kPanel = kAbsorbVecs<S> * S::kLanes;
    alignas(64) float stairs[2 * Nearest<S>::kStairs];
    for (long i = 0; i < 2 * Nearest<S>::kStairs; ++i)
      stairs[i] = i < Nearest<S>::kStairs ? 0.0f : kMinusInfinity;
    alignas(64) float best[kRows * S::kLanes];
    for (long row = rank * kRows; row < patches(); row += size * kRows) {
      const long rows = least(kRows, patches() - row);
      for (long i = 0; i < rows; ++i) {
        S::store(best + i * S::kLanes, S::set(kMinusInfinity));
        take(tokens_.prefix + own_.order[row + i], i);
      }
      Nearest<S> nearest{{nullptr}, own_.inverse, stairs, row, best};
      compare(rows, least(columns(), round_up(row + rows, kPanel)), nearest);
      for (long i = 0; i < rows; ++i) {
        const long token = tokens_.prefix + own_.order[row + i];
        const float cosine = S::largest(S::load(best + i * S::kLanes)) * own_.inverse[row + i];
        shared_.score[token] =
            absorb_score(own_.importance[token], cosine > -1.0f ? cosine : -1.0f);
      }
    }
  }

  // Pruned tokens [begin, end) of own_.pruned: which of the n kept ones each goes into, the kept
  // patch of the greatest cosine, and what it adds to that one's size.
  void find_nearest(long n, long begin, long end, bool by_cosine) const {
    open_kept(n);
    for (long first = begin; first < end; first += kChoiceRows) {
      const long rows = least(kChoiceRows, end - first);
      for (long i = 0; i < rows; ++i) take(own_.pruned[first + i], i);
      Cosines<S> cosines{{nullptr}, own_.inverse, own_.open, own_.rows, columns()};
      compare(rows, columns(), cosines);
      for (long i = 0; i < rows; ++i) {
        const long token = own_.pruned[first + i];
        float cosine;
        shared_.into[first + i] = greatest(own_.rows + i * columns(), cosine);
        cosine /= __builtin_sqrtf(shared_.square[token]);
        shared_.gain[first + i] =
            by_cosine ? absorb_gain(tokens_.size[token], cosine) : tokens_.size[token];
      }
    }
  }

 private:
  long patches() const { return tokens_.m - tokens_.prefix; }
  long columns() const { return Panels<S, T>::columns(patches()); }
  long padded() const { return round_up(tokens_.m, kMaxLanes); }

  float square(const T* x, long count) const {
    auto sum = S::zero();
    for (long c = 0; c < count; c += S::kLanes) {
      const auto part = S::load(x + c);
      sum = S::fma(part, part, sum);
    }
    return most(S::sum(sum), 1e-24f);
  }
  static float most(float a, float b) { return a > b ? a : b; }

  // A token's row as row `i` of own_.taken.
  void take(long token, long i) const {
    __builtin_memcpy(own_.taken + i * tokens_.depth, tokens_.like + token * tokens_.depth,
                     tokens_.depth * sizeof(T));
  }

  // Rows of own_.taken with the first `ahead` columns.
  template <class Epilogue>
  void compare(long rows, long ahead, Epilogue& epilogue) const {
    const long depth = tokens_.depth;
    gemm(own_.taken, depth, rows, Panels<S, T>{shared_.packed, ahead, depth, kAbsorbVecs<S>},
         epilogue);
  }

  void invert() const {
    for (long c = 0; c < columns(); ++c)
      own_.inverse[c] = c < patches() ? shared_.square[tokens_.prefix + own_.order[c]] : 1.0f;
    for (long c = 0; c < columns(); c += S::kLanes)
      S::store(own_.inverse + c, S::div(S::set(1.0f), S::sqrt(S::load(own_.inverse + c))));
  }

  void add_importance(const float* p, float scale, const float* value_square) const {
    for (long c = 0; c < tokens_.m; c += S::kLanes) {
      const auto weight = S::mul(S::load(p + c), S::sqrt(S::load(value_square + c)));
      S::store(own_.importance + c, S::fma(weight, S::set(scale), S::load(own_.importance + c)));
    }
  }

  // own_.key: where each patch stands among the kept tokens.
  void open_kept(long n) const {
    for (long i = 0; i < patches(); ++i) own_.key[i] = -1;
    for (long k = tokens_.prefix; k < n; ++k)
      own_.key[own_.index[k] - tokens_.prefix] = static_cast<std::int32_t>(k);
    for (long c = 0; c < columns(); ++c) {
      if (c < patches()) own_.order[c] = own_.key[own_.order[c]];
      const bool kept = c < patches() && own_.order[c] >= 0;
      own_.open[c] = kept ? 0.0f : kMinusInfinity;
    }
  }

  // Of equal cosines that of the first token; own_.order has its number among the kept ones.
  std::int32_t greatest(const float* cosine, float& top) const {
    auto greatest = S::load(cosine);
    for (long c = S::kLanes; c < columns(); c += S::kLanes)
      greatest = S::max(S::load(cosine + c), greatest);
    top = S::largest(greatest);
    std::int32_t into = INT32_MAX;
    for (long c = 0; c < patches(); ++c) {
      const std::int32_t mine = cosine[c] == top && own_.order[c] >= 0 ? own_.order[c] : INT32_MAX;
      into = mine < into ? mine : into;
    }
    return into == INT32_MAX ? static_cast<std::int32_t>(tokens_.prefix) : into;  // of NaN
  }

  const Tokens<T>& tokens_;
  const BlockShape& shape_;
  const SharedChoice<T>& shared_;
  const OwnChoice<S, T>& own_;
};

}  // namespace
}  // namespace slimvit
