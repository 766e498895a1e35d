#pragma once

#include "cpu/alive.h"
#include "cpu/kernels.h"
#include "cpu/pack.h"
#include "cpu/slim_attention.h"
#include "cpu/workspace.h"

namespace slimvit {
namespace {

// Which of the `m` rows of `images` images a block keeps, and how their keys are biased.
struct Kept {
  long images, m, n;
  const std::int64_t* index;  // [images, n], or null: the first n
  const float* bias;          // [m], or [images, m] where bias_image = m; or null
  long bias_image;
  const Choosing* choosing;  // each image's tokens are its own; or null

  // Whether `n` is known only once scores are: until then it is `m`.
  bool ragged() const {
    return choosing != nullptr && choosing->pack != nullptr && choosing->pack->shape.ragged();
  }
  bool chooses() const {
    if (choosing == nullptr || choosing->pack == nullptr) return false;
    return ragged() || (choosing->prefix < n && n < m);
  }
  // Whether kept rows must be moved together first.
  bool gathers() const { return index != nullptr || (images > 1 && n < m) || chooses(); }
  long source(long row) const {
    const long image = row / n, i = row % n;
    return image * m + (index == nullptr ? i : index[row]);
  }
};

// What the parts of a block work on, and what they have in common.
template <class S, typename T>
class BlockParts {
 public:
  BlockParts(const BlockPack& pack, const Kept& kept, const Team& team, Shared<T>& shared,
             Own<S, T>& own)
      : pack_(pack), shape_(pack.shape), kept_(kept), team_(team), shared_(shared), own_(own) {}

 protected:
  long width() const { return shape_.width; }
  long inner() const { return shape_.inner(); }

  Panels<S, T> columns_of(const Linear& linear, long n, long k) const {
    return panels<S, T>(section<T>(pack_, linear.weight), n, k);
  }
  const float* bias_of(const Linear& linear) const { return section<float>(pack_, linear.bias); }

  long packed_size() const { return Panels<S, T>::columns(kept_.m + 1) * shape_.head_dim; }

  // Queries of rows of y, as rows of shared_.q from `row` on.
  void ask(const T* y, long row, long rows) { ask(y, row, rows, 0, inner()); }

  // Columns [begin, end) of them: whole panels.
  void ask(const T* y, long row, long rows, long begin, long end) {
    Panels<S, T> columns = columns_of(pack_.q, inner(), width());
    columns.data += begin * columns.k;
    columns.n = end - begin;
    Store<S, T> store{{bias_of(pack_.q) + begin}, shared_.q + row * inner() + begin, inner()};
    gemm(y, width(), rows, columns, store);
  }

  // Where masks leave an image no key, all weigh the same.
  void logit_bias(long image, long keys) {
    constexpr float kEnd = 1e38f;
    const float* bias = kept_.bias == nullptr ? nullptr : kept_.bias + image * kept_.bias_image;
    for (long i = 0; i < kept_.m; ++i)
      own_.bias[i] = bias == nullptr ? 0.0f : kLog2E * within(bias[i], kEnd);
    if (keys > kept_.m) own_.bias[kept_.m] = kLog2E * shape_.extra_bias;
    for (long i = keys; i < Panels<S, T>::columns(keys); ++i) own_.bias[i] = kMinusInfinity;
  }

  const BlockPack& pack_;
  const BlockShape& shape_;
  Kept kept_;
  const Team team_;
  Shared<T>& shared_;
  Own<S, T>& own_;
};

}  // namespace
}  // namespace slimvit
