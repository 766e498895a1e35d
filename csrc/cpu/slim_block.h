#pragma once

#include "cpu/kernels.h"
#include "cpu/layer_norm.h"
#include "cpu/pack.h"
#include "cpu/slim_attention.h"
#include "cpu/stopwatch.h"
#include "cpu/workspace.h"

// One slimmed block: y = LN1(x); x' = x[kept] + Attn(y[kept], y); out = x' + MLP(LN2(x')).

namespace slimvit {
namespace {

// Which of the `m` rows of `images` images a block keeps, and how their keys are biased.
struct Kept {
  long images, m, n;
  const std::int64_t* index;  // [images, n], or null: the first n
  const float* bias;          // [m], or [images, m] where bias_image = m; or null
  long bias_image;

  // Whether kept rows must be moved together first.
  bool gathers() const { return index != nullptr || (images > 1 && n < m); }
  long source(long row) const {
    const long image = row / n, i = row % n;
    return image * m + (index == nullptr ? i : index[row]);
  }
};

template <class S, typename T>
class Block {
 public:
  Block(const BlockPack& pack, const Kept& kept, const Team& team, Shared<T>& shared,
        Own<S, T>& own)
      : pack_(pack), shape_(pack.shape), kept_(kept), team_(team), shared_(shared), own_(own) {}

  // shared.x [images · m, D] becomes [images · n, D]; where nothing is gathered, rows from n on
  // stay.
  void run() {
    const long rows = kept_.images * kept_.m, rows_out = kept_.images * kept_.n;
    keys_and_values(share(rows, team_.rank, team_.size), share(rows, team_.rank + 1, team_.size));
    team_.sync();
    const long begin = share(rows_out, team_.rank, team_.size);
    const long end = share(rows_out, team_.rank + 1, team_.size);
    pack_heads();
    queries(begin, end);
    team_.sync();
    if (lone())
      attend_lone(begin, end);
    else
      attend(begin, end);
    float* x = (kept_.gathers() ? shared_.gathered : shared_.x) + begin * width();
    project(shared_.a + begin * inner(), end - begin, x);
    for (long row = begin; row < end; row += kMlpRows)
      mlp(least(kMlpRows, end - row), x + (row - begin) * width(), shared_.y + row * width());
    if (kept_.gathers()) {
      float* old = shared_.x;
      shared_.x = shared_.gathered;
      shared_.gathered = old;
    }
    team_.sync();
  }

 private:
  long width() const { return shape_.width; }
  long inner() const { return shape_.inner(); }

  Panels<S, T> columns_of(const Linear& linear, long n, long k) const {
    return panels<S, T>(section<T>(pack_, linear.weight), n, k);
  }
  const float* bias_of(const Linear& linear) const { return section<float>(pack_, linear.bias); }

  void norm(const Norm& norm, const float* x, long rows, T* y) const {
    layer_norm<S>(x, width(), rows, width(), section<float>(pack_, norm.weight),
                  section<float>(pack_, norm.bias), norm.eps, y, width());
  }

  void keys_and_values(long begin, long end) {
    const Stopwatch stopwatch(Phase::keys_values);
    T* y = shared_.y + begin * width();
    norm(pack_.norm1, shared_.x + begin * width(), end - begin, y);
    if (lone()) return;
    Store<S, T> store{{bias_of(pack_.kv)}, shared_.kv + begin * 2 * inner(), 2 * inner()};
    gemm(y, width(), end - begin, columns_of(pack_.kv, 2 * inner(), width()), store);
  }

  long packed_size() const { return Panels<S, T>::columns(kept_.m + 1) * shape_.head_dim; }

  void pack_heads() {
    const Stopwatch stopwatch(Phase::packing);
    if (lone()) return pack_lone();
    const long items = kept_.images * shape_.heads, d = shape_.head_dim;
    const T* extra = section<T>(pack_, pack_.extra);
    const long end = share(items, team_.rank + 1, team_.size);
    for (long i = share(items, team_.rank, team_.size); i < end; ++i) {
      const long image = i / shape_.heads, head = i % shape_.heads;
      const T* k = shared_.kv + image * kept_.m * 2 * inner() + head * d;
      const T* extra_key = extra == nullptr ? nullptr : extra + head * d;
      const T* extra_value = extra == nullptr ? nullptr : extra_key + inner();
      const long at = i * packed_size();
      pack_keys<S, T>(k, 2 * inner(), kept_.m, d, extra_key, shared_.keys + at);
      pack_values<S, T>(k + inner(), 2 * inner(), kept_.m, d, extra_value, shared_.values + at);
    }
  }

  void queries(long begin, long end) {
    const Stopwatch stopwatch(Phase::queries);
    const T* y = shared_.y;
    if (kept_.gathers()) {
      y = shared_.y_kept;
      for (long row = begin; row < end; ++row) {
        const long from = kept_.source(row) * width();
        __builtin_memcpy(shared_.gathered + row * width(), shared_.x + from,
                         width() * sizeof(float));
        __builtin_memcpy(shared_.y_kept + row * width(), shared_.y + from, width() * sizeof(T));
      }
    }
    Store<S, T> store{{bias_of(pack_.q)}, shared_.q + begin * inner(), inner()};
    gemm(y + begin * width(), width(), end - begin, columns_of(pack_.q, inner(), width()), store);
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
    return pack_.lone_key != 0 && pack_.extra == 0 && kept_.n <= 2 && inner() >= width() &&
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

  void logit_bias(long image, long keys) {
    const float* bias = kept_.bias == nullptr ? nullptr : kept_.bias + image * kept_.bias_image;
    for (long i = 0; i < kept_.m; ++i) own_.bias[i] = bias == nullptr ? 0.0f : kLog2E * bias[i];
    if (keys > kept_.m) own_.bias[kept_.m] = kLog2E * shape_.extra_bias;
    for (long i = keys; i < Panels<S, T>::columns(keys); ++i) own_.bias[i] = kMinusInfinity;
  }

  void project(const T* a, long rows, float* x) const {
    const Stopwatch stopwatch(Phase::projection);
    Accumulate<S> add{{bias_of(pack_.proj)}, x, width()};
    gemm(a, inner(), rows, columns_of(pack_.proj, width(), inner()), add);
  }

  // The hidden layer never leaves the cache: some columns of it at a time, at once used up.
  void mlp(long rows, float* x, T* y) const {
    {
      const Stopwatch stopwatch(Phase::norm2);
      norm(pack_.norm2, x, rows, y);
    }
    for (long first = 0; first < shape_.hidden; first += kMlpColumns) {
      const long columns = least(kMlpColumns, shape_.hidden - first);
      expand(y, rows, first, columns);
      contract(x, rows, first, columns);
    }
  }

  void expand(const T* y, long rows, long first, long columns) const {
    const Stopwatch stopwatch(Phase::fc1);
    const T* fc1 = section<T>(pack_, pack_.fc1.weight) + first * width();
    const float* bias = bias_of(pack_.fc1) + first;
    Activate<S, T> activate{{bias}, own_.hidden, columns, shape_.activation};
    gemm(y, width(), rows, panels<S, T>(fc1, columns, width()), activate);
  }

  void contract(float* x, long rows, long first, long columns) const {
    const Stopwatch stopwatch(Phase::fc2);
    Accumulate<S> add{{first == 0 ? bias_of(pack_.fc2) : nullptr}, x, width()};
    const Panels<S, T> fc2 = columns_of(pack_.fc2, width(), shape_.hidden);
    gemm(own_.hidden, columns, rows, fc2, first, columns, add);
  }

  const BlockPack& pack_;
  const BlockShape& shape_;
  const Kept kept_;
  const Team team_;
  Shared<T>& shared_;
  Own<S, T>& own_;
};

// The op: images one after another, each with all workers of the team.
template <class S, typename T>
std::int64_t block_memory(const BlockCall& call) {
  Parts parts(nullptr);
  Shared<T>::make(parts, most(call.m, call.n), Panels<S, T>::columns(call.m + 1), call.pack->shape);
  return parts.used();
}

template <class S, typename T>
void block(const BlockCall& call, long first, long count, const Team& team, char* shared,
           char* own) {
  const long width = call.pack->shape.width;
  Parts shared_parts(shared), own_parts(own);
  const long rows = most(call.m, call.n);  // an index may name a row more than once
  auto memory =
      Shared<T>::make(shared_parts, rows, Panels<S, T>::columns(call.m + 1), call.pack->shape);
  auto worker = Own<S, T>::make(own_parts, call.m);
  for (long image = first; image < first + count; ++image) {
    const long begin = share(call.m, team.rank, team.size);
    const long end = share(call.m, team.rank + 1, team.size);
    for (long t = begin; t < end; ++t)
      copy_floats(call.x + image * call.x_image + t * call.x_token, width, memory.x + t * width);
    team.sync();
    const Kept kept{1,
                    call.m,
                    call.n,
                    call.index == nullptr ? nullptr : call.index + image * call.n,
                    call.key_bias == nullptr ? nullptr : call.key_bias + image * call.bias_image,
                    0};
    Block<S, T>(*call.pack, kept, team, memory, worker).run();
    for (long t = share(call.n, team.rank, team.size); t < share(call.n, team.rank + 1, team.size);
         ++t)
      copy_floats(memory.x + t * width, width,
                  call.out + image * call.out_image + t * call.out_token);
    team.sync();
  }
}

template <class S, typename T>
std::int64_t own_memory(long tokens) {
  Parts parts(nullptr);
  Own<S, T>::make(parts, tokens);
  return parts.used();
}

}  // namespace
}  // namespace slimvit
