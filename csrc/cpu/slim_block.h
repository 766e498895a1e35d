#pragma once

#include "cpu/dynamic_block.h"
#include "cpu/layer_norm.h"
#include "cpu/slim_attention.h"
#include "cpu/stopwatch.h"

// One slimmed block: y = LN1(x); x' = x[kept] + Attn(y[kept], y); out = x' + MLP(LN2(x')).

namespace slimvit {
namespace {

template <class S, typename T>
class Block : private Chooser<S, T> {
  using Base = Chooser<S, T>;
  using Base::advance;
  using Base::ask;
  using Base::bias_of;
  using Base::columns_of;
  using Base::inner;
  using Base::kept_;
  using Base::logit_bias;
  using Base::own_;
  using Base::pack_;
  using Base::packed_size;
  using Base::shape_;
  using Base::shared_;
  using Base::team_;
  using Base::width;

 public:
  using Base::Base;

  // shared.x [images · m, D] becomes [images · n, D]; where nothing is gathered, rows from n on
  // stay. Returns n, which may be the image's own.
  long run() {
    const long rows = kept_.images * kept_.m;
    keys_and_values(share(rows, team_.rank, team_.size), share(rows, team_.rank + 1, team_.size));
    team_.sync();
    pack_heads();
    if (kept_.choosing != nullptr) advance();
    const long rows_out = kept_.images * kept_.n;
    const long begin = share(rows_out, team_.rank, team_.size);
    const long end = share(rows_out, team_.rank + 1, team_.size);
    queries(begin, end);
    if (!kept_.chooses()) team_.sync();  // else all have waited for the packed heads
    if (lone())
      attend_lone(begin, end);
    else
      attend(begin, end);
    float* x = (kept_.gathers() ? shared_.gathered : shared_.x) + begin * width();
    T* y = kept_.gathers() ? shared_.y_kept : shared_.y;  // others may still gather from shared_.y
    project(shared_.a + begin * inner(), end - begin, x);
    for (long row = begin; row < end; row += kMlpRows)
      mlp(row, least(kMlpRows, end - row), x + (row - begin) * width(), y + row * width());
    if (kept_.gathers()) {
      float* old = shared_.x;
      shared_.x = shared_.gathered;
      shared_.gathered = old;
    }
    team_.sync();
    return kept_.n;
  }

 private:
  // Rows from `first` on, of tokens that may stand for several where blocks choose: `alive`, of
  // which every image has `per_image`. `share` as in SpreadScale.
  void norm(const Norm& norm, const float* x, long first, long rows, const Alive* alive,
            long per_image, float* share, T* y) const {
    const auto by = [&](const auto& scale) {
      layer_norm<S>(x, width(), rows, width(), section<float>(pack_, norm.weight),
                    section<float>(pack_, norm.bias), scale, y, width());
    };
    if (alive == nullptr) return by(Scale{norm.eps});
    by(SpreadScale{*alive, first, per_image, norm.eps, share});
  }

  void keys_and_values(long begin, long end) {
    const Stopwatch stopwatch(Phase::keys_values);
    T* y = shared_.y + begin * width();
    const Alive* before = kept_.choosing == nullptr ? nullptr : &kept_.choosing->before;
    norm(pack_.norm1, shared_.x + begin * width(), begin, end - begin, before, kept_.m, nullptr, y);
    if (lone()) return;
    Store<S, T> store{{bias_of(pack_.kv)}, shared_.kv + begin * 2 * inner(), 2 * inner()};
    gemm(y, width(), end - begin, columns_of(pack_.kv, 2 * inner(), width()), store);
  }

  void pack_heads() {
    const Stopwatch stopwatch(Phase::packing);
    if (lone()) return pack_lone();
    // Keys and values apart, so that workers have equal shares of an odd number of heads too.
    const long items = 2 * kept_.images * shape_.heads, d = shape_.head_dim;
    const T* extra = section<T>(pack_, pack_.extra);
    const long end = share(items, team_.rank + 1, team_.size);
    for (long i = share(items, team_.rank, team_.size); i < end; ++i) {
      const long image = i / 2 / shape_.heads, head = i / 2 % shape_.heads,
                 at = i / 2 * packed_size();
      const T* k = shared_.kv + image * kept_.m * 2 * inner() + head * d;
      const T* more = extra == nullptr ? nullptr : extra + head * d;
      if (i % 2 == 0)
        pack_keys<S, T>(k, 2 * inner(), kept_.m, d, more, shared_.keys + at);
      else
        pack_values<S, T>(k + inner(), 2 * inner(), kept_.m, d,
                          more == nullptr ? nullptr : more + inner(), shared_.values + at);
    }
  }

  void queries(long begin, long end) {
    const Stopwatch stopwatch(Phase::queries);
    const T* y = kept_.gathers() ? shared_.y_kept : shared_.y;
    if (kept_.gathers() && !kept_.chooses()) {
      for (long row = begin; row < end; ++row) {
        const long from = kept_.source(row) * width();
        __builtin_memcpy(shared_.gathered + row * width(), shared_.x + from,
                         width() * sizeof(float));
        __builtin_memcpy(shared_.y_kept + row * width(), shared_.y + from, width() * sizeof(T));
      }
    }
    ask(y + begin * width(), begin, end - begin);
    if (lone()) fold_queries(begin, end);
  }

  void attend(long begin, long end) {
    const long d = shape_.head_dim, keys = kept_.m + (pack_.extra != 0);
    for (long row = begin; row < end;) {
      const long image = row / kept_.n, until = least(end, (image + 1) * kept_.n);
      logit_bias(image, keys);
      for (long head = 0; head < shape_.heads; ++head) {
        const long at = row * inner() + head * d;
        const long packed = (image * shape_.heads + head) * packed_size();
        slim_attention<S, T>(shared_.q + at, inner(), until - row, shared_.keys + packed,
                             shared_.values + packed, own_.bias, keys, d, shared_.a + at, inner(),
                             own_.attention);
      }
      row = until;
    }
  }

  // A lone query, such as that of a class token alone in the last block, need not have the keys and
  // values of all the others computed: with y the tokens that they would be computed from,
  //   q · (W_k y_j + b_k) = (W_kᵀ q) · y_j + const   and   Σ p_j (W_v y_j + b_v) = W_v Σ p_j y_j +
  //   b_v,
  // so that y itself serves every head as keys and as values.
  bool lone() const {
    return pack_.lone_key != 0 && pack_.extra == 0 && !kept_.chooses() && kept_.n <= 2 &&
           inner() >= width() &&
           kept_.n * width() <= kept_.m * shape_.head_dim;  // room in shared_.kv
  }

  T* folded() const { return shared_.kv; }  // [rows, H, D]
  T* attended() const { return shared_.kv + kept_.images * kept_.n * shape_.heads * width(); }
  long lone_size() const { return Panels<S, T>::size(width(), shape_.head_dim); }

  void pack_lone() {
    const long end = share(kept_.images, team_.rank + 1, team_.size);
    for (long i = share(kept_.images, team_.rank, team_.size); i < end; ++i) {
      const T* y = shared_.y + i * kept_.m * width();
      const long at = i * shape_.heads * packed_size();
      pack_keys<S, T>(y, width(), kept_.m, width(), nullptr, shared_.keys + at);
      pack_values<S, T>(y, width(), kept_.m, width(), nullptr, shared_.values + at);
    }
  }

  void fold_queries(long begin, long end) {
    const long d = shape_.head_dim, row = shape_.heads * width();
    for (long head = 0; head < shape_.heads; ++head) {
      const T* key = section<T>(pack_, pack_.lone_key) + head * lone_size();
      Store<S, T> store{{nullptr}, folded() + begin * row + head * width(), row};
      gemm(shared_.q + begin * inner() + head * d, inner(), end - begin,
           panels<S, T>(key, width(), d), store);
    }
  }

  void attend_lone(long begin, long end) {
    const long d = shape_.head_dim, line = shape_.heads * width();
    for (long row = begin; row < end;) {
      const long image = row / kept_.n, until = least(end, (image + 1) * kept_.n);
      const long packed = image * shape_.heads * packed_size();
      logit_bias(image, kept_.m);
      slim_attention<S, T>(folded() + row * line, width(), (until - row) * shape_.heads,
                           shared_.keys + packed, shared_.values + packed, own_.bias, kept_.m,
                           width(), attended() + row * line, width(), own_.attention);
      row = until;
    }
    for (long head = 0; head < shape_.heads; ++head) {
      const T* value = section<T>(pack_, pack_.lone_value) + head * lone_size();
      const float* bias = bias_of(pack_.kv) + inner() + head * d;
      Store<S, T> store{{bias}, shared_.a + begin * inner() + head * d, inner()};
      gemm(attended() + begin * line + head * width(), line, end - begin,
           panels<S, T>(value, d, width()), store);
    }
  }

  void project(const T* a, long rows, float* x) const {
    const Stopwatch stopwatch(Phase::projection);
    Accumulate<S> add{{bias_of(pack_.proj)}, x, width()};
    gemm(a, inner(), rows, columns_of(pack_.proj, width(), inner()), add);
  }

  // The hidden layer never leaves the cache: some columns of it at a time, at once used up.
  void mlp(long row, long rows, float* x, T* y) const {
    {
      const Stopwatch stopwatch(Phase::norm2);
      const Alive* after = kept_.choosing == nullptr ? nullptr : &kept_.choosing->after;
      norm(pack_.norm2, x, row, rows, after, kept_.n, own_.share, y);
    }
    for (long first = 0; first < shape_.hidden; first += kMlpColumns) {
      const long columns = least(kMlpColumns, shape_.hidden - first);
      const T* slice = section<T>(pack_, pack_.mlp) + mlp_slice<S, T>(width(), first);
      expand(y, rows, first, panels<S, T>(slice, columns, width()));
      slice += Panels<S, T>::size(columns, width());
      contract(x, rows, first, panels<S, T>(slice, width(), columns));
    }
  }

  void expand(const T* y, long rows, long first, const Panels<S, T>& fc1) const {
    const Stopwatch stopwatch(Phase::fc1);
    const float* bias = section<float>(pack_, pack_.fc1_bias) + first;
    Activate<S, T> activate{{bias}, own_.hidden, fc1.n, shape_.activation};
    if (kept_.choosing != nullptr) {
      activate.share = own_.share;
      activate.squares = section<float>(pack_, pack_.fc1_squares) + first;
    }
    gemm(y, width(), rows, fc1, activate);
  }

  void contract(float* x, long rows, long first, const Panels<S, T>& fc2) const {
    const Stopwatch stopwatch(Phase::fc2);
    const float* bias = first == 0 ? section<float>(pack_, pack_.fc2_bias) : nullptr;
    Accumulate<S> add{{bias}, x, width()};
    gemm(own_.hidden, fc2.k, rows, fc2, add);
  }
};

}  // namespace
}  // namespace slimvit
