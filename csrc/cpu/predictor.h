#pragma once

#include "cpu/activation.h"
#include "cpu/layer_norm.h"
#include "cpu/pack.h"
#include "cpu/select.h"
#include "cpu/workspace.h"

namespace slimvit {
namespace {

// sums += activation(result) · out, for each row and lane.
template <class S, typename T>
struct Project : FromBias<S> {
  static constexpr int kMaxVecs = S::kVecs;
  const float* out;  // [columns], zero where they are padding
  Activation kind;
  float* sums;  // [rows, lanes]

  template <int MR, int NV>
  SLIMVIT_INLINE void end(typename S::F (&acc)[MR][NV], long row, long column) const {
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) {
      auto sum = S::load(sums + (row + i) * S::kLanes);
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j)
        sum = S::fma(activate<S, T>(kind, acc[i][j]), S::load(out + column + j * S::kLanes), sum);
      S::store(sums + (row + i) * S::kLanes, sum);
    }
  }
};

// score = out · act(down(LN(x))) of rows [begin, end) of x [rows, D]; `y` [rows, D] is for the
// normed rows, and `sums` [kQueryRows, lanes].
template <class S, typename T>
void predict(const ChooserPack& pack, const float* x, long begin, long end, T* y, float* sums,
             float* score) {
  const long width = pack.shape.width;
  const auto down = panels<S, T>(section<T>(pack, pack.down.weight), pack.shape.hidden, width);
  for (long row = begin; row < end; row += kQueryRows<S>) {
    const long rows = least(kQueryRows<S>, end - row);
    layer_norm<S>(x + row * width, width, rows, width, section<float>(pack, pack.norm.weight),
                  section<float>(pack, pack.norm.bias), Scale{pack.norm.eps}, y + row * width,
                  width);
    for (long i = 0; i < rows; ++i) S::store(sums + i * S::kLanes, S::zero());
    Project<S, T> project{{section<float>(pack, pack.down.bias)},
                          section<float>(pack, pack.out),
                          pack.shape.activation,
                          sums};
    gemm(y + row * width, width, rows, down, project);
    for (long i = 0; i < rows; ++i) score[row + i] = S::sum(S::load(sums + i * S::kLanes));
  }
}

}  // namespace
}  // namespace slimvit
