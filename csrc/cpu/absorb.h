#pragma once

#include "cpu/select.h"
#include "cpu/workspace.h"

// Scores by attention and redundancy, and where pruned tokens go: slimvit/dynamic/absorb.py.

namespace slimvit {
namespace {

// Vectors across a panel of what patches are compared by: in a triangle narrow ones waste less.
template <class S>
constexpr int kAbsorbVecs = static_cast<int>(least(kMaxLanes / S::kLanes, S::kVecs));

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

// Where the columns of a vector stand; `before`, at kMaxLanes + c - row: 0 in those before the row.
struct Places {
  float number[kMaxLanes], before[2 * kMaxLanes];
};
constexpr Places make_places() {
  Places places{};
  for (long i = 0; i < kMaxLanes; ++i) {
    places.number[i] = static_cast<float>(i);
    places.before[kMaxLanes + i] = kMinusInfinity;
  }
  return places;
}
constexpr Places kPlaces = make_places();

template <class S, typename T>
class Absorb {
 public:
  Absorb(const Tokens<T>& tokens, const BlockShape& shape, const SharedChoice<T>& shared,
         const OwnChoice<S, T>& own)
      : tokens_(tokens), shape_(shape), shared_(shared), own_(own) {}

  // Squares of norms of patches [begin, end), for all workers. Norms are those of numbers as
  // rounded to T, so that a token is as near to itself as can be.
  void measure(long begin, long end) const {
    for (long i = begin; i < end; ++i) shared_.square[i] = square(patch(i), tokens_.depth);
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

  // How much a token weighs in an average.
  void weigh_by_importance() const {
    for (long i = 0; i < tokens_.m; ++i) own_.weight[i] = absorb_weight(own_.importance[i]);
  }
  void weigh_by_size() const {
    for (long i = 0; i < tokens_.m; ++i) own_.weight[i] = tokens_.size[i];
  }

  // The worker's panels of what patches are compared by, nearly all of rows that it has computed.
  void pack(int rank, int size) const {
    constexpr long kPanel = kAbsorbVecs<S> * S::kLanes;
    const long end = share(patches(), rank + 1, size, kPanel);
    for (long first = share(patches(), rank, size, kPanel); first < end; first += kPanel)
      pack_keys<S, T>(patch(first), tokens_.depth, least(kPanel, patches() - first), tokens_.depth,
                      nullptr, shared_.packed + first * tokens_.depth);
  }

  // The worker's rows of the triangle of products, by turns; what is beyond the diagonal of a tile
  // that crosses it is computed as well.
  void multiply(int rank, int size) const {
    constexpr long kRows = S::rows(kAbsorbVecs<S>), kPanel = kAbsorbVecs<S> * S::kLanes;
    for (long row = rank * kRows; row < patches(); row += size * kRows) {
      const long rows = least(kRows, patches() - row);
      compare(patch(row), rows, least(columns(), round_up(row + rows, kPanel)), products(row));
    }
  }

  // own_.score, from the triangle: each product is of use to whichever of the two patches is of
  // less importance. Among equals the earlier is ahead.
  void score() const {
    invert(shared_.products, columns() + 1);
    for (long c = 0; c < columns(); c += S::kLanes) S::store(own_.best + c, S::set(kMinusInfinity));
    long row = 0;
    for (; row + 4 <= patches(); row += 4) look_back<4>(row);
    for (; row < patches(); ++row) look_back<1>(row);
    for (long i = 0; i < patches(); ++i) {
      float* score = own_.score + tokens_.prefix + i;
      const float cosine = most(*score, own_.best[i]) * own_.inverse[i];
      *score = absorb_score(own_.importance[tokens_.prefix + i], most(cosine, -1.0f));
    }
  }

  // Which of the n kept tokens each pruned one goes into, the kept patch of the greatest cosine,
  // and what it adds to that one's size: all that it has, or `by_cosine`, which takes the triangle.
  void find_nearest(long n, bool by_cosine) const {
    if (!by_cosine) invert(shared_.square, 1);
    open_kept(n);
    for (long first = 0; first < tokens_.m - n; first += kChoiceRows) {
      const std::int32_t* pruned = own_.pruned + first;
      const long rows = least(kChoiceRows, tokens_.m - n - first);
      if (by_cosine)
        look_up(pruned, rows);
      else
        multiply_pruned(pruned, rows);
      for (long i = 0; i < rows; ++i) {
        const float size = tokens_.size[pruned[i]];
        const float greatest = find_open(own_.rows + i * columns(), own_.into[first + i]);
        const float cosine = greatest * own_.inverse[pruned[i] - tokens_.prefix];
        own_.gain[first + i] = by_cosine ? absorb_gain(size, cosine) : size;
      }
    }
  }

 private:
  long patches() const { return tokens_.m - tokens_.prefix; }
  long columns() const { return Panels<S, T>::columns(patches()); }
  long padded() const { return round_up(tokens_.m, kMaxLanes); }
  const T* patch(long i) const { return tokens_.like + (tokens_.prefix + i) * tokens_.depth; }
  float* products(long row) const { return shared_.products + row * columns(); }

  static float most(float a, float b) { return a > b ? a : b; }

  float square(const T* x, long count) const {
    auto sum = S::zero();
    long c = 0;
    for (; c + S::kLanes * kStep<T> <= count; c += S::kLanes * kStep<T>) {
      const auto part = S::operand(x + c);
      sum = S::dot(sum, part, part);
    }
    for (; c < count; c += S::kLanes) {
      const auto part = S::load(x + c);
      sum = S::fma(part, part, sum);
    }
    return S::sum(sum);
  }

  // out = products of `rows` rows of x with the first `ahead` patches.
  void compare(const T* x, long rows, long ahead, float* out) const {
    const long depth = tokens_.depth;
    Store<S, float> store{{nullptr}, out, columns()};
    gemm(x, depth, rows, Panels<S, T>{shared_.packed, ahead, depth, kAbsorbVecs<S>}, store);
  }

  // own_.inverse, of squares of norms that are `step` apart.
  void invert(const float* square, long step) const {
    for (long c = 0; c < columns(); ++c)
      own_.inverse[c] = c < patches() ? most(square[c * step], 1e-24f) : 1.0f;
    for (long c = 0; c < columns(); c += S::kLanes)
      S::store(own_.inverse + c, S::div(S::set(1.0f), S::sqrt(S::load(own_.inverse + c))));
  }

  // For each of some rows, as own_.score: the greatest cosine · ‖its patch‖ over the patches before
  // it that are ahead of it. Those that it is ahead of have theirs in own_.best.
  template <int kRows>
  void look_back(long row) const {
    const float* importance = own_.importance + tokens_.prefix;
    const auto none = S::set(kMinusInfinity);
    typename S::F mine[kRows], inverse[kRows], best[kRows];
    for (int i = 0; i < kRows; ++i) {
      mine[i] = S::set(importance[row + i]);
      inverse[i] = S::set(own_.inverse[row + i]);
      best[i] = none;
    }
    const auto look = [&](long c, bool all) {
      const auto theirs = S::load(importance + c), their_inverse = S::load(own_.inverse + c);
      auto their_best = S::load(own_.best + c);
      for (int i = 0; i < kRows; ++i) {
        auto x = S::load(products(row + i) + c);
        if (!all) x = S::add(x, S::load(kPlaces.before + kMaxLanes + c - (row + i)));
        best[i] = S::max(S::above(mine[i], theirs, none, S::mul(x, their_inverse)), best[i]);
        their_best = S::max(S::above(mine[i], theirs, S::mul(x, inverse[i]), none), their_best);
      }
      S::store(own_.best + c, their_best);
    };
    const long whole = row / S::kLanes * S::kLanes;  // vectors hold whole groups of rows
    for (long c = 0; c < whole; c += S::kLanes) look(c, true);
    look(whole, false);
    for (int i = 0; i < kRows; ++i) own_.score[tokens_.prefix + row + i] = S::largest(best[i]);
  }

  void add_importance(const float* p, float scale, const float* value_square) const {
    for (long c = 0; c < tokens_.m; c += S::kLanes) {
      const auto weight = S::mul(S::load(p + c), S::sqrt(S::load(value_square + c)));
      S::store(own_.importance + c, S::fma(weight, S::set(scale), S::load(own_.importance + c)));
    }
  }

  // own_.key: where each patch stands among the kept tokens; own_.open: 0 there, else -∞.
  void open_kept(long n) const {
    for (long c = 0; c < columns(); c += S::kLanes) S::store(own_.open + c, S::set(kMinusInfinity));
    for (long k = tokens_.prefix; k < n; ++k) {
      own_.key[own_.index[k] - tokens_.prefix] = static_cast<std::int32_t>(k);
      own_.open[own_.index[k] - tokens_.prefix] = 0.0f;
    }
  }

  // own_.rows = products of pruned patches with all others: rows of the triangle, then columns.
  void look_up(const std::int32_t* pruned, long rows) const {
    const auto at = [&](long i) { return pruned[i] - tokens_.prefix; };
    for (long i = 0; i < rows; ++i)
      __builtin_memcpy(own_.rows + i * columns(), products(at(i)), at(i) * sizeof(float));
    long before = 0;  // how many of the pruned, which ascend, are before the row
    for (long row = at(0); row < patches(); ++row) {
      for (long i = 0; i < before; ++i) own_.rows[i * columns() + row] = products(row)[at(i)];
      before += before < rows && at(before) == row;
    }
  }

  // The same where there is no triangle.
  void multiply_pruned(const std::int32_t* pruned, long rows) const {
    for (long i = 0; i < rows; ++i)
      __builtin_memcpy(own_.taken + i * tokens_.depth, patch(pruned[i] - tokens_.prefix),
                       tokens_.depth * sizeof(T));
    compare(own_.taken, rows, columns(), own_.rows);
  }

  // The greatest product · inverse of an open patch; `kept`: which token that is, of equal ones the
  // first.
  float find_open(const float* product, std::int32_t& kept) const {
    const auto none = S::set(kMinusInfinity), step = S::set(static_cast<float>(S::kLanes));
    auto greatest = none, column = S::load(kPlaces.number), first = column;
    for (long c = 0; c < columns(); c += S::kLanes, column = S::add(column, step)) {
      const auto x =
          S::fma(S::load(product + c), S::load(own_.inverse + c), S::load(own_.open + c));
      first = S::above(x, greatest, column, first);
      greatest = S::max(x, greatest);
    }
    const float top = S::largest(greatest);
    const auto place = S::above(S::set(top), greatest, none, S::sub(S::zero(), first));
    const bool found = top > kMinusInfinity;  // not of NaN
    kept = static_cast<std::int32_t>(found ? own_.key[static_cast<long>(-S::largest(place))]
                                           : tokens_.prefix);
    return top;
  }

  const Tokens<T>& tokens_;
  const BlockShape& shape_;
  const SharedChoice<T>& shared_;
  const OwnChoice<S, T>& own_;
};

}  // namespace
}  // namespace slimvit
