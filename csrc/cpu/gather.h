#pragma once

#include "cpu/alive.h"
#include "cpu/layer_norm.h"
#include "cpu/memory.h"
#include "cpu/workspace.h"

// What a block goes on with once it has chosen.

namespace slimvit {
namespace {

// One image before and after it was chosen from. Rows are D wide.
template <typename T>
struct Gathering {
  long width, m, n;
  const float* x;  // [m]
  const T* y;      // [m], LN1 of it
  float* x_kept;   // [n]
  T* y_kept;       // [n]
  Alive before, after;
};

// To what the norm scales rows that others went into, whose spread it so comes to know: `moment` is
// the weighted mean of the variances and spreads of those that make it up.
struct MergedScale {
  const float* moment;
  float eps;
  float* spread;
  long step;

  float operator()(long row, float variance) const {
    const float more = moment[row * step] - variance;
    spread[row * step] = more > 0.0f ? more : 0.0f;
    return norm_scale(variance + spread[row * step] + eps);
  }
};

// Kept rows [begin, end), those that others go into averaged with them:
//   x_kept = Σ w x / Σ w,  spread_kept = Σ w (spread + var(x)) / Σ w - var(x_kept),
//   y_kept = LN1(x_kept)
// `into` [m - n] may be null. The order of every sum is that of the tokens.
template <class S, typename T, class Pack>
class Gather {
 public:
  Gather(const Gathering<T>& of, const Pack& pack, const OwnChoice<S, T>& own,
         const std::int32_t* into)
      : of_(of), pack_(pack), own_(own), into_(into) {}

  void run(long begin, long end) const {
    const long pruned = into_ == nullptr ? 0 : of_.m - of_.n;
    add_up(pruned);
    for (long k = begin; k < end; ++k) keep(k);
    for (long i = 0; i < pruned; ++i)
      if (begin <= into_[i] && into_[i] < end) average(into_[i], own_.pruned[i]);
    long first = -1;  // two at a time, so that the sums across their lanes overlap
    for (long k = begin; k < end; ++k) {
      if (own_.grows[k] == 0) continue;
      if (first >= 0) finish<2>(first, k - first);
      first = first < 0 ? k : -1;
    }
    if (first >= 0) finish<1>(first, 0);
  }

 private:
  void add_up(long pruned) const {
    for (long k = 0; k < of_.n; ++k) {
      own_.size[k] = of_.before.size[own_.index[k]];
      own_.grows[k] = 0;
      if (pruned > 0) own_.total[k] = own_.weight[own_.index[k]];
    }
    for (long i = 0; i < pruned; ++i) {
      own_.size[into_[i]] += of_.before.size[own_.pruned[i]];
      own_.total[into_[i]] += own_.weight[own_.pruned[i]];
      own_.grows[into_[i]] = 1;
    }
  }

  void keep(long k) const {
    const long from = own_.index[k], width = of_.width;
    of_.after.place[k] = of_.before.place[from];
    of_.after.size[k] = own_.size[k];
    of_.after.bias[k] = of_.before.bias[from];
    of_.after.spread[k] = of_.before.spread[from];
    if (own_.grows[k] == 0) {
      __builtin_memcpy(of_.x_kept + k * width, of_.x + from * width, width * sizeof(float));
      __builtin_memcpy(of_.y_kept + k * width, of_.y + from * width, width * sizeof(T));
      return;
    }
    own_.moment[k] = 0.0f;
    of_.after.bias[k] = __builtin_logf(own_.size[k]);
    float* out = of_.x_kept + k * width;
    for (long c = 0; c < width; c += S::kLanes) S::store(out + c, S::zero());
    average(k, from);
  }

  // Token `from` as a part of kept row k.
  void average(long k, long from) const {
    const float share = own_.weight[from] / own_.total[k];
    const auto factor = S::set(share);
    const float* x = of_.x + from * of_.width;
    float* out = of_.x_kept + k * of_.width;
    const auto width = static_cast<float>(of_.width);
    auto sum = S::zero(), square = S::zero();
    for (long c = 0; c < of_.width; c += S::kLanes) {
      const auto part = S::load(x + c);
      sum = S::add(part, sum);
      S::store(out + c, S::fma(part, factor, S::load(out + c)));
    }
    const auto mean = S::set(S::sum(sum) / width);
    for (long c = 0; c < of_.width; c += S::kLanes) {
      const auto centred = S::sub(S::load(x + c), mean);
      square = S::fma(centred, centred, square);
    }
    own_.moment[k] += share * (S::sum(square) / width + of_.before.spread[from]);
  }

  // Kept rows first, first + step, … that others went into.
  template <int kRows>
  void finish(long first, long step) const {
    const long width = of_.width;
    const MergedScale scale{own_.moment + first, pack_.norm1.eps, of_.after.spread + first, step};
    layer_norm_rows<S, kRows>(of_.x_kept + first * width, step * width, width,
                              section<float>(pack_, pack_.norm1.weight),
                              section<float>(pack_, pack_.norm1.bias), scale, 0,
                              of_.y_kept + first * width, step * width);
  }

  const Gathering<T>& of_;
  const Pack& pack_;
  const OwnChoice<S, T>& own_;
  const std::int32_t* into_;
};

// The first tokens [begin, end) are kept: what is known of them stays.
inline void keep_first(const Alive& before, const Alive& after, long begin, long end) {
  for (long k = begin; k < end; ++k) {
    after.place[k] = before.place[k];
    after.size[k] = before.size[k];
    after.bias[k] = before.bias[k];
    after.spread[k] = before.spread[k];
  }
}

}  // namespace
}  // namespace slimvit
