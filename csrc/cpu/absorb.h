#pragma once

#include "cpu/select.h"
#include "cpu/workspace.h"

// Scores by attention and redundancy, and where pruned tokens go: slimvit/dynamic/absorb.py.

namespace slimvit {
namespace {

// Vectors across a panel of what patches are compared by: narrow ones waste less at the end.
template <class S>
constexpr int kAbsorbVecs = static_cast<int>(least(2, S::kVecs));

// What is kept: tokens that the head's tokens read and that none of more importance stands for.
inline float absorb_score(float importance, float cosine) {
  return __builtin_sqrtf(importance) * (1.0f - cosine);
}

// What a token weighs in an average.
inline float absorb_weight(float importance) { return importance > 1e-20f ? importance : 1e-20f; }

// One image's tokens between their keys and their queries.
template <typename T>
struct Tokens {
  long m, prefix;
  const T* kv;    // [m, 2 · H · d]
  const T* keys;  // packed, every head's `head_size` apart
  long head_size;
  const T* query;  // [head_tokens, H · d], scaled so that logits are logarithms to base 2
  long head_tokens;
  const T* y;  // [m, D], LN1 of the tokens, by whose cosines they are alike
  // [patches and padding, D], for the patches of y as columns of a product. The kept tokens' rows
  // come to be here, and those of LN2 of the block before were: it is in the cache.
  T* packed;
};

// Attention below it is none. It is above 2^-125, at which exp2 ends.
constexpr float kLeastRead = 2.4e-38f;

// Where the columns of a vector stand.
constexpr float kPlaces[kMaxLanes] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

template <class S, typename T>
class Absorb {
 public:
  Absorb(const Tokens<T>& tokens, const BlockShape& shape, const SharedChoice<T>& shared,
         const OwnChoice<S, T>& own)
      : tokens_(tokens), shape_(shape), shared_(shared), own_(own) {}

  void measure_values(long begin, long end) const {
    const long d = shape_.head_dim;
    for (long i = begin; i < end; ++i) {
      const T* v = tokens_.kv + i * 2 * shape_.inner() + shape_.inner();
      for (long h = 0; h < shape_.heads; ++h)
        shared_.value_square[h * padded() + i] = square(v + h * d, d);
    }
  }

  // importance_i = Σ_h A^h[head tokens, i] · ‖V^h_i‖, A averaged over the tokens that the head
  // reads, which is also what a token weighs in an average; `bias` [columns] is -∞ where the
  // columns are padding.
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
    for (long i = 0; i < tokens_.m; ++i) own_.weight[i] = absorb_weight(own_.importance[i]);
  }

  // The worker's panels of patches, nearly all of rows that it has computed, and squares of their
  // norms. These are of numbers as rounded to T, so that a token is as near to itself as can be.
  void pack(int rank, int size) const {
    constexpr long kPanel = kAbsorbVecs<S> * S::kLanes;
    const long end = share(patches(), rank + 1, size, kPanel), width = shape_.width;
    for (long first = share(patches(), rank, size, kPanel); first < end; first += kPanel) {
      const long count = least(kPanel, patches() - first);
      pack_keys<S, T>(patch(first), width, count, width, nullptr, tokens_.packed + first * width);
      for (long i = first; i < first + count; ++i) shared_.square[i] = square(patch(i), width);
    }
  }

  // own_.candidate: the patches of least importance, of equals the later, ascending; and
  // own_.standing: the importance by which one is ahead of another, least where there is no patch.
  void find_candidates(long candidates) const {
    const float* importance = own_.importance + tokens_.prefix;
    for (long i = 0; i < patches(); ++i) own_.key[i] = ordered(importance[i]);
    part_highest(own_.key, patches(), patches() - candidates, 0, own_.index, own_.candidate);
    for (long c = 0; c < columns(); ++c)
      own_.standing[c] =
          c < patches() && importance[c] == importance[c] ? importance[c] : kMinusInfinity;
  }

  // Candidates [begin, end): shared_.score, one for each, and shared_.cosines with those ahead of
  // it; -1 with all others.
  void score(long begin, long end) const {
    invert(shared_.square);
    for (long first = begin; first < end; first += kChoiceRows) {
      const std::int32_t* candidate = own_.candidate + first;
      const long rows = least(kChoiceRows, end - first);
      compare(candidate, rows, cosines(first));
      for (long i = 0; i < rows; ++i) {
        const float cosine = look_ahead(candidate[i], cosines(first + i));
        shared_.score[first + i] =
            absorb_score(own_.importance[tokens_.prefix + candidate[i]], cosine);
      }
    }
  }

  // How many candidates have scores below `threshold` where importance adds up to one.
  long count_below(long candidates, float threshold) const {
    float total = 0.0f;
    for (long i = 0; i < tokens_.m; ++i) total += own_.importance[i];
    const float bound = threshold * __builtin_sqrtf(total);
    long below = 0;
    for (long i = 0; i < candidates; ++i) below += shared_.score[i] < bound;
    return below;
  }

  // The candidates of the lowest scores are pruned, and n tokens kept.
  void prune(long candidates, long n) const {
    const long pruned = tokens_.m - n;
    for (long i = 0; i < candidates; ++i) own_.key[i] = ordered(shared_.score[i]);
    part_highest(own_.key, candidates, candidates - pruned, 0, own_.index, own_.row);
    std::int32_t token = 0;
    std::int32_t* kept = own_.index;
    for (long i = 0; i < pruned; ++i, ++token) {
      own_.pruned[i] = static_cast<std::int32_t>(tokens_.prefix) + own_.candidate[own_.row[i]];
      while (token < own_.pruned[i]) *kept++ = token++;
    }
    while (token < tokens_.m) *kept++ = token++;
  }

  // Which of the n kept tokens each pruned one goes into: the patch ahead of it of the greatest
  // cosine.
  void find_nearest(long n) const {
    open_kept(n);
    for (long i = 0; i < tokens_.m - n; ++i) own_.into[i] = find_open(cosines(own_.row[i]));
  }

 private:
  long patches() const { return tokens_.m - tokens_.prefix; }
  long columns() const { return Panels<S, T>::columns(patches()); }
  long padded() const { return round_up(tokens_.m, kMaxLanes); }
  const T* patch(long i) const { return tokens_.y + (tokens_.prefix + i) * shape_.width; }
  float* cosines(long row) const { return shared_.cosines + row * columns(); }

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

  // out [rows, columns]: products of some patches with all.
  void compare(const std::int32_t* some, long rows, float* out) const {
    const long width = shape_.width;
    for (long i = 0; i < rows; ++i)
      __builtin_memcpy(own_.taken + i * width, patch(some[i]), width * sizeof(T));
    Store<S, float> store{{nullptr}, out, columns()};
    gemm(own_.taken, width, rows, Panels<S, T>{tokens_.packed, columns(), width, kAbsorbVecs<S>},
         store);
  }

  // own_.inverse, of squares of norms.
  void invert(const float* square) const {
    for (long c = 0; c < columns(); ++c)
      own_.inverse[c] = c < patches() ? most(square[c], 1e-24f) : 1.0f;
    for (long c = 0; c < columns(); c += S::kLanes)
      S::store(own_.inverse + c, S::div(S::set(1.0f), S::sqrt(S::load(own_.inverse + c))));
  }

  // Products of a patch as cosines, and the greatest: -1 with the patches that are not ahead of it.
  // Of equal ones those before it are.
  float look_ahead(long self, float* product) const {
    const auto mine = S::set(own_.standing[self]), none = S::set(-1.0f);
    const auto inverse = S::set(own_.inverse[self]);
    auto best = none;
    const auto look = [&](long c, auto choose) {
      const auto scale = S::mul(S::load(own_.inverse + c), inverse);
      const auto x = S::mul(S::load(product + c), scale);
      const auto cosine = choose(S::load(own_.standing + c), x);
      S::store(product + c, cosine);
      best = S::max(cosine, best);
    };
    const auto before = [&](auto theirs, auto x) { return S::above(mine, theirs, none, x); };
    const auto after = [&](auto theirs, auto x) { return S::above(theirs, mine, x, none); };
    const long whole = self / S::kLanes * S::kLanes;
    const auto at = S::set(static_cast<float>(self - whole)), place = S::load(kPlaces);
    for (long c = 0; c < whole; c += S::kLanes) look(c, before);
    look(whole, [&](auto theirs, auto x) {
      return S::above(at, place, before(theirs, x), after(theirs, x));
    });
    for (long c = whole + S::kLanes; c < columns(); c += S::kLanes) look(c, after);
    return S::largest(best);
  }

  void add_importance(const float* p, float scale, const float* value_square) const {
    const auto least = S::set(kLeastRead / scale);
    for (long c = 0; c < tokens_.m; c += S::kLanes) {
      const auto x = S::load(p + c), read = S::above(least, x, S::zero(), x);
      const auto weight = S::mul(read, S::sqrt(S::load(value_square + c)));
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

  // Which token the open patch of the greatest is, of equal ones the first.
  std::int32_t find_open(const float* cosine) const {
    const auto none = S::set(kMinusInfinity), step = S::set(static_cast<float>(S::kLanes));
    auto greatest = none, column = S::load(kPlaces), first = column;
    for (long c = 0; c < columns(); c += S::kLanes, column = S::add(column, step)) {
      const auto x = S::add(S::load(cosine + c), S::load(own_.open + c));
      first = S::above(x, greatest, column, first);
      greatest = S::max(x, greatest);
    }
    const float top = S::largest(greatest);
    const auto place = S::above(S::set(top), greatest, none, S::sub(S::zero(), first));
    const bool found = top > kMinusInfinity;  // not of NaN
    return static_cast<std::int32_t>(found ? own_.key[static_cast<long>(-S::largest(place))]
                                           : tokens_.prefix);
  }

  const Tokens<T>& tokens_;
  const BlockShape& shape_;
  const SharedChoice<T>& shared_;
  const OwnChoice<S, T>& own_;
};

}  // namespace
}  // namespace slimvit
