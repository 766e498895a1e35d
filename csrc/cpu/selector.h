#pragma once

#include "cpu/activation.h"
#include "cpu/alive.h"
#include "cpu/kernels.h"
#include "cpu/layer_norm.h"
#include "cpu/pack.h"
#include "cpu/predictor.h"
#include "cpu/select.h"
#include "cpu/stopwatch.h"
#include "cpu/workspace.h"

// Ahead of a block a selector keeps some patches and makes a package of the others:
// slimvit/dynamic/selector.py and spvit.py.

namespace slimvit {
namespace {

// sums += activation(result), over the rows.
template <class S, typename T>
struct AddActivated : FromBias<S> {
  static constexpr int kMaxVecs = S::kVecs;
  float* sums;  // [columns]

  template <int MR, int NV>
  SLIMVIT_INLINE void end(typename S::F (&acc)[MR][NV], long, long column) const {
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) {
      auto sum = S::load(sums + column + j * S::kLanes);
#pragma GCC unroll 8
      for (int i = 0; i < MR; ++i) sum = S::add(sum, gelu<S, T>(acc[i][j]));
      S::store(sums + column + j * S::kLanes, sum);
    }
  }
};

// One image's tokens, D wide: prefix, patches, packages of earlier selectors.
struct Selecting {
  long m, prefix;
  std::int32_t package;  // place of the new package
  const float* x;        // [m]
  float* out;            // at most [m]
  Alive alive;           // of the m tokens, then of those that are left
};

// With d_i = keep_i - prune_i of a head, of log-softmaxes or not, the weighted mean over the heads
// has keep - prune = s_i = Σ_h w_i^h d_i^h / Σ_h w_i^h, and its softmax keeps i with sigmoid(s_i).
//
// Work is divided by groups of rows that are the same for every team, and so are all sums.
template <class S, typename T>
class Selection {
 public:
  Selection(const SelectorPack& pack, const Selecting& of, const Team& team,
            const SharedSelection<T>& shared, const OwnSelection<S, T>& own)
      : pack_(pack), shape_(pack.shape), of_(of), team_(team), shared_(shared), own_(own) {}

  // How many rows are left in `out`, once all workers are there.
  long run() const {
    long kept;
    {
      const Stopwatch stopwatch(Phase::choosing);
      each_group(&Selection::embed);
      team_.sync();
      judge_means();
      each_group(&Selection::judge);
      team_.sync();
      kept = choose();
      weigh_pruned(patches() - kept);
    }
    const Stopwatch stopwatch(Phase::gathering);
    gather(kept);
    return of_.prefix + kept + shape_.packages + 1;
  }

 private:
  long width() const { return shape_.width; }
  long channels() const { return shape_.channels(); }
  long patches() const { return of_.m - of_.prefix - shape_.packages; }
  long groups() const { return (patches() + kSelectorRows - 1) / kSelectorRows; }
  long half() const { return Panels<S, T>::columns(shape_.half()); }
  const float* patch(long row) const { return of_.x + (of_.prefix + row) * width(); }
  T* local(long row) const { return shared_.local + row * shape_.heads * half(); }
  const float* floats(std::int64_t offset) const { return section<float>(pack_, offset); }

  template <class Fn>
  void each_group(Fn fn) const {
    const long end = share(groups(), team_.rank + 1, team_.size);
    for (long g = share(groups(), team_.rank, team_.size); g < end; ++g)
      (this->*fn)(g, least(kSelectorRows, patches() - g * kSelectorRows));
  }

  Panels<S, T> of_head(const Linear& linear, long head, long n, long k) const {
    return panels<S, T>(section<T>(pack_, linear.weight) + head * Panels<S, T>::size(n, k), n, k);
  }
  const float* bias_of_head(const Linear& linear, long head, long n) const {
    return floats(linear.bias) + head * Panels<S, T>::columns(n);
  }

  // GELU(Linear(LN(x))) of every head: its first half stays, of its second half the sum is taken.
  void embed(long group, long rows) const {
    const long c = channels(), n = shape_.half(), first = group * kSelectorRows;
    for (long head = 0; head < shape_.heads; ++head) {
      layer_norm<S>(patch(first) + head * c, width(), rows, c, floats(pack_.norm.weight) + head * c,
                    floats(pack_.norm.bias) + head * c, Scale{pack_.norm.eps}, own_.normed, c);
      Activate<S, T> activate{{bias_of_head(pack_.local, head, n)},
                              local(first) + head * half(),
                              shape_.heads * half(),
                              Activation::gelu};
      gemm(own_.normed, c, rows, of_head(pack_.local, head, n, c), activate);
      float* sums = shared_.sums + (group * shape_.heads + head) * half();
      for (long i = 0; i < half(); i += S::kLanes) S::store(sums + i, S::zero());
      AddActivated<S, T> add{{bias_of_head(pack_.global, head, n)}, sums};
      gemm(own_.normed, c, rows, of_head(pack_.global, head, n, c), add);
    }
    weigh_heads(group, rows);
  }

  // e^-shift · sigmoid(z) = e^(min(z, 0) - shift) / (1 + e^-|z|), of a sigmoid that may be as low
  // as it likes: `shift` is the highest of those that it is compared with, or 0 if that is above.
  static SLIMVIT_INLINE typename S::F sigmoid(typename S::F z, typename S::F shift) {
    const auto log2e = S::set(kLog2E), below = S::min(S::zero(), z), above = S::max(S::zero(), z);
    const auto e = exp2<S, float>(S::mul(S::sub(below, shift), log2e));
    const auto rest = exp2<S, float>(S::mul(S::sub(below, above), log2e));
    return S::div(e, S::add(S::set(1.0f), rest));
  }

  // w = sigmoid(W2 GELU(W1 means)) of every row, divided by its sum over the heads.
  void weigh_heads(long group, long rows) const {
    const long heads = shape_.heads, hidden = shape_.hidden();
    float* weights = shared_.weights + group * heads * kSelectorRows;
    means(group, rows);
    for (long i = 0; i < kSelectorRows; i += S::kLanes) {
      const auto mix = [&](std::int64_t weight, std::int64_t bias, long row, const float* x,
                           long count) {
        const float* w = floats(weight) + row * count;
        auto sum = S::set(floats(bias)[row]);
        for (long k = 0; k < count; ++k)
          sum = S::fma(S::set(w[k]), S::load(x + k * kSelectorRows + i), sum);
        return sum;
      };
      for (long row = 0; row < hidden; ++row)
        S::store(own_.weighed + row * kSelectorRows + i,
                 gelu<S, float>(mix(pack_.weigh1, pack_.weigh1_bias, row, own_.means, heads)));
      auto highest = S::set(kMinusInfinity), total = S::zero();
      for (long row = 0; row < heads; ++row) {
        const auto z = mix(pack_.weigh2, pack_.weigh2_bias, row, own_.weighed, hidden);
        highest = S::max(highest, z);
        S::store(weights + row * kSelectorRows + i, z);
      }
      const auto shift = S::min(S::zero(), highest);
      for (long row = 0; row < heads; ++row) {
        float* weight = weights + row * kSelectorRows + i;
        const auto w = sigmoid(S::load(weight), shift);
        total = S::add(total, w);
        S::store(weight, w);
      }
      for (long row = 0; row < heads; ++row) {
        float* weight = weights + row * kSelectorRows + i;
        S::store(weight, S::div(S::load(weight), total));
      }
    }
  }

  // Of every head's channels, [H, kSelectorRows].
  void means(long group, long rows) const {
    const long c = channels();
    for (long head = 0; head < shape_.heads; ++head)
      for (long i = 0; i < kSelectorRows; ++i) {
        float& mean = own_.means[head * kSelectorRows + i];
        mean = 0.0f;
        if (i >= rows) continue;
        const float* x = patch(group * kSelectorRows + i) + head * c;
        auto sum = S::zero();
        for (long k = 0; k < c; k += S::kLanes) sum = S::add(sum, S::load(x + k));
        mean = S::sum(sum) / static_cast<float>(c);
      }
  }

  // What the means over the patches add to every row of the first judging layer, and its bias.
  void judge_means() const {
    const long n = shape_.half(), size = shape_.heads * half();
    float* sums = own_.sums;
    for (long i = 0; i < size; i += S::kLanes) {
      auto sum = S::zero();
      for (long g = 0; g < groups(); ++g) sum = S::add(sum, S::load(shared_.sums + g * size + i));
      S::store(sums + i, S::div(sum, S::set(static_cast<float>(patches()))));
    }
    for (long head = 0; head < shape_.heads; ++head) {
      const float* weight = floats(pack_.of_mean) + head * n * half();
      const float* bias = bias_of_head(pack_.judge1, head, n);
      for (long i = 0; i < half(); i += S::kLanes) {
        auto sum = S::load(bias + i);
        for (long k = 0; k < n; ++k)
          sum = S::fma(S::set(sums[head * half() + k]), S::load(weight + k * half() + i), sum);
        S::store(own_.of_mean + head * half() + i, sum);
      }
    }
  }

  // shared_.score of a group's rows.
  void judge(long group, long rows) const {
    const long n = shape_.half(), quarter = shape_.quarter(), first = group * kSelectorRows;
    float* score = shared_.score + first;
    for (long i = 0; i < rows; ++i) score[i] = 0.0f;
    for (long head = 0; head < shape_.heads; ++head) {
      Activate<S, T> activate{
          {own_.of_mean + head * half()}, own_.judged, half(), Activation::gelu};
      gemm(local(first) + head * half(), shape_.heads * half(), rows,
           of_head(pack_.judge1, head, n, n), activate);
      for (long i = 0; i < rows; ++i) S::store(own_.lanes + i * S::kLanes, S::zero());
      Project<S, T> project{{bias_of_head(pack_.judge2, head, quarter)},
                            floats(pack_.judge3) + head * Panels<S, T>::columns(quarter),
                            Activation::gelu,
                            own_.lanes};
      gemm(own_.judged, half(), rows, of_head(pack_.judge2, head, quarter, n), project);
      const float bias = floats(pack_.judge3_bias)[head];
      const float* weight = shared_.weights + (group * shape_.heads + head) * kSelectorRows;
      for (long i = 0; i < rows; ++i)
        score[i] += weight[i] * (S::sum(S::load(own_.lanes + i * S::kLanes)) + bias);
    }
  }

  // own_.index and own_.pruned, counted from the first patch; how many are kept.
  long choose() const {
    const long count = patches();
    long kept = shape_.patches;
    if (kept == 0) {
      for (long i = 0; i < count; ++i) kept += shared_.score[i] > 0.0f;
      kept = least(most(shape_.fewest, kept), count - 1);
    }
    for (long i = 0; i < count; ++i) own_.key[i] = ordered(shared_.score[i]);
    part_highest(own_.key, count, kept, 0, own_.index, own_.pruned);
    return kept;
  }

  // own_.weight: sigmoid(s) of the pruned, divided by its sum.
  void weigh_pruned(long count) const {
    float* weight = own_.weight;
    float highest = kMinusInfinity;
    for (long i = 0; i < count; ++i) {
      weight[i] = shared_.score[own_.pruned[i]];
      highest = weight[i] > highest ? weight[i] : highest;
    }
    for (long i = count; i < round_up(count, S::kLanes); ++i) weight[i] = 0.0f;
    const auto shift = S::set(highest < 0.0f ? highest : 0.0f);
    for (long i = 0; i < count; i += S::kLanes)
      S::store(weight + i, sigmoid(S::load(weight + i), shift));
    float total = 0.0f;
    for (long i = 0; i < count; ++i) total += weight[i];
    for (long i = 0; i < count; ++i) weight[i] /= total;
  }

  // The worker's share of the rows that are left, and of the package's channels.
  void gather(long kept) const {
    const long rows = of_.prefix + kept + shape_.packages,
               last = share(rows, team_.rank + 1, team_.size);
    for (long k = share(rows, team_.rank, team_.size); k < last; ++k)
      __builtin_memcpy(of_.out + k * width(), of_.x + source(k, kept) * width(),
                       width() * sizeof(float));
    const long vectors = width() / S::kLanes, end = share(vectors, team_.rank + 1, team_.size);
    for (long v = share(vectors, team_.rank, team_.size); v < end; ++v) {
      auto sum = S::zero();
      for (long i = 0; i < patches() - kept; ++i)
        sum = S::fma(S::load(patch(own_.pruned[i]) + v * S::kLanes), S::set(own_.weight[i]), sum);
      S::store(of_.out + rows * width() + v * S::kLanes, sum);
    }
    if (team_.rank == 0) move_places(rows, kept);
  }

  long source(long k, long kept) const {
    if (k < of_.prefix) return k;
    k -= of_.prefix;
    return of_.prefix + (k < kept ? own_.index[k] : patches() + k - kept);
  }

  // In place: no token moves back.
  void move_places(long rows, long kept) const {
    const Alive& alive = of_.alive;
    for (long k = of_.prefix; k < rows; ++k) {
      const long from = source(k, kept);
      alive.place[k] = alive.place[from];
      alive.size[k] = alive.size[from];
      alive.bias[k] = alive.bias[from];
      alive.spread[k] = alive.spread[from];
    }
    alive.place[rows] = of_.package;
    alive.size[rows] = 1.0f;
    alive.bias[rows] = 0.0f;
    alive.spread[rows] = 0.0f;
  }

  const SelectorPack& pack_;
  const SelectorShape& shape_;
  const Selecting& of_;
  const Team& team_;
  const SharedSelection<T>& shared_;
  const OwnSelection<S, T>& own_;
};

}  // namespace
}  // namespace slimvit
