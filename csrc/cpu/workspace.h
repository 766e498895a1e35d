#pragma once

#include "cpu/memory.h"
#include "cpu/slim_attention.h"

// The memory of a forward pass: what a team shares, and what each worker has for itself.

namespace slimvit {
namespace {

// Rows whose hidden layer is held at a time, and columns of it: whole panels everywhere.
constexpr long kMlpRows = 256;
constexpr long kMlpColumns = 768;

// What one group of images needs, shared by the workers of its team.
template <typename T>
struct Shared {
  float *x, *gathered;  // [rows, D]
  T *y, *y_kept;        // [rows, D]
  T *q, *a;             // [rows, H · d]
  T* kv;                // [rows, 2 · H · d]
  T *keys, *values;     // packed, by image and head

  // `keys`: all images' keys, the extra ones too, each image's padded to whole vectors.
  static Shared make(Parts& parts, long rows, long keys, const BlockShape& shape) {
    const long inner = shape.inner(), packed = keys * inner;
    Shared shared;
    shared.x = parts.take<float>(rows * shape.width);
    shared.gathered = parts.take<float>(rows * shape.width);
    shared.y = parts.take<T>(rows * shape.width);
    shared.y_kept = parts.take<T>(rows * shape.width);
    shared.q = parts.take<T>(rows * inner);
    shared.a = parts.take<T>(rows * inner);
    shared.kv = parts.take<T>(rows * 2 * inner);
    shared.keys = parts.take<T>(packed);
    shared.values = parts.take<T>(packed);
    return shared;
  }
};

// What a worker needs for itself.
template <class S, typename T>
struct Own {
  AttentionMemory<S, T> attention;
  float* bias;  // [columns]
  T* hidden;    // [kMlpRows, kMlpColumns]

  static Own make(Parts& parts, long tokens) {
    const long columns = Panels<S, T>::columns(tokens + 1);
    Own own;
    own.attention.logits = parts.take<float>(kQueryRows * columns);
    own.attention.largest = parts.take<float>(kQueryRows * S::kLanes);
    own.attention.scale = parts.take<float>(kQueryRows);
    own.attention.p = parts.take<T>(kQueryRows * columns);
    own.bias = parts.take<float>(columns);
    own.hidden = parts.take<T>(kMlpRows * kMlpColumns);
    return own;
  }
};

}  // namespace
}  // namespace slimvit
