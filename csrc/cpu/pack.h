#pragma once

#include "cpu/gemm.h"
#include "cpu/memory.h"
#include "cpu/slim_attention.h"

// Weights laid out for the kernels of one instruction set, once for a model.

namespace slimvit {
namespace {

inline void copy_floats(const float* from, long n, float* to) {
  for (long i = 0; i < n; ++i) to[i] = from[i];
}

template <class S, typename T>
Linear take_linear(Sections& sections, long n, long k) {
  return {sections.take<T>(Panels<S, T>::size(n, k)),
          sections.take<float>(Panels<S, T>::columns(n))};
}

// `bias` [n] or null, padded to whole vectors.
template <class S, typename T>
void pack_bias(const float* bias, long n, float factor, float* out) {
  for (long i = 0; i < Panels<S, T>::columns(n); ++i)
    out[i] = bias != nullptr && i < n ? factor * bias[i] : 0.0f;
}

template <class S, typename T>
void pack_linear(void* pack, const Linear& to, const float* weight, const float* bias, long n,
                 long k, float factor = 1.0f) {
  pack_columns<S, T>(weight, k, 1, n, k, S::kVecs, factor, section<T>(pack, to.weight));
  pack_bias<S, T>(bias, n, factor, section<float>(pack, to.bias));
}

template <class S, typename T>
Panels<S, T> panels(const T* data, long n, long k) {
  return {data, Panels<S, T>::columns(n), Panels<S, T>::depth(k), S::kVecs};
}

// Columns of the hidden layer that are held at a time: whole panels everywhere.
constexpr long kMlpColumns = 768;

// Where a slice of fc1 and fc2 begins: hidden columns [first, first + kMlpColumns) of the one, then
// what the other makes of them. `first` may be their end.
template <class S, typename T>
long mlp_slice(long width, long first) {
  return Panels<S, T>::size(first, width) + Panels<S, T>::size(width, first);
}

template <class S, typename T>
void pack_mlp(const float* fc1, const float* fc2, long width, long hidden, T* out) {
  for (long first = 0; first < hidden; first += kMlpColumns) {
    const long columns = least(kMlpColumns, hidden - first);
    T* slice = out + mlp_slice<S, T>(width, first);
    pack_columns<S, T>(fc1 + first * width, width, 1, columns, width, S::kVecs, 1.0f, slice);
    slice += Panels<S, T>::size(columns, width);
    pack_columns<S, T>(fc2 + first, hidden, 1, width, columns, S::kVecs, 1.0f, slice);
  }
}

template <class S, typename T>
constexpr PackHead pack_head_of(PackHead::Kind kind, std::int64_t bytes) {
  const Dtype dtype = kStep<T> == 1 ? Dtype::float32 : Dtype::bfloat16;
  return {PackHead::kMagic, kind, S::kIsa, dtype, bytes};
}

// Bytes of the pack; writes it unless `out` is null.
template <class S, typename T>
std::int64_t pack_block(const BlockShape& shape, const BlockWeights& w, void* out) {
  const long width = shape.width, inner = shape.inner(), hidden = shape.hidden;
  Sections sections(sizeof(BlockPack));
  BlockPack pack{};
  pack.shape = shape;
  pack.norm1 = {sections.take<float>(width), sections.take<float>(width), shape.eps1};
  pack.norm2 = {sections.take<float>(width), sections.take<float>(width), shape.eps2};
  pack.kv = take_linear<S, T>(sections, 2 * inner, width);
  pack.q = take_linear<S, T>(sections, inner, width);
  pack.proj = take_linear<S, T>(sections, width, inner);
  pack.mlp = sections.take<T>(mlp_slice<S, T>(width, hidden));
  pack.fc1_bias = sections.take<float>(Panels<S, T>::columns(hidden));
  pack.fc2_bias = sections.take<float>(Panels<S, T>::columns(width));
  pack.fc1_squares = sections.take<float>(Panels<S, T>::columns(hidden));
  if (w.extra_key != nullptr) pack.extra = sections.take<T>(2 * inner + 2 * S::kLanes);
  if (shape.lone != 0) {
    pack.lone_key = sections.take<T>(shape.heads * Panels<S, T>::size(width, shape.head_dim));
    pack.lone_value = sections.take<T>(shape.heads * Panels<S, T>::size(shape.head_dim, width));
  }
  pack.head = pack_head_of<S, T>(PackHead::Kind::block, sections.used());
  if (out == nullptr) return sections.used();

  __builtin_memset(out, 0, sections.used());
  __builtin_memcpy(out, &pack, sizeof(pack));
  copy_floats(w.norm1_weight, width, section<float>(out, pack.norm1.weight));
  copy_floats(w.norm1_bias, width, section<float>(out, pack.norm1.bias));
  copy_floats(w.norm2_weight, width, section<float>(out, pack.norm2.weight));
  copy_floats(w.norm2_bias, width, section<float>(out, pack.norm2.bias));
  // The softmax works with powers of two.
  const float scale = kLog2E / __builtin_sqrtf(static_cast<float>(shape.head_dim));
  const float* kv_bias = w.qkv_bias == nullptr ? nullptr : w.qkv_bias + inner;
  pack_linear<S, T>(out, pack.kv, w.qkv_weight + inner * width, kv_bias, 2 * inner, width);
  pack_linear<S, T>(out, pack.q, w.qkv_weight, w.qkv_bias, inner, width, scale);
  pack_linear<S, T>(out, pack.proj, w.proj_weight, w.proj_bias, width, inner);
  pack_mlp<S, T>(w.fc1_weight, w.fc2_weight, width, hidden, section<T>(out, pack.mlp));
  pack_bias<S, T>(w.fc1_bias, hidden, 1.0f, section<float>(out, pack.fc1_bias));
  pack_bias<S, T>(w.fc2_bias, width, 1.0f, section<float>(out, pack.fc2_bias));
  float* squares = section<float>(out, pack.fc1_squares);
  for (long i = 0; i < hidden * width; ++i) {
    const float folded = w.fc1_weight[i] * w.norm2_weight[i % width];
    squares[i / width] += folded * folded;
  }
  if (w.extra_key != nullptr) {
    T* extra = section<T>(out, pack.extra);
    for (long i = 0; i < inner; ++i) {
      narrow(w.extra_key[i], extra[i]);
      narrow(w.extra_value[i], extra[inner + i]);
    }
  }
  for (long head = 0; shape.lone != 0 && head < shape.heads; ++head) {
    const long d = shape.head_dim, size = Panels<S, T>::size(width, d);
    const float* key = w.qkv_weight + (inner + head * d) * width;
    pack_columns<S, T>(key, 1, width, width, d, S::kVecs, 1.0f,
                       section<T>(out, pack.lone_key) + head * size);
    pack_columns<S, T>(key + inner * width, width, 1, d, width, S::kVecs, 1.0f,
                       section<T>(out, pack.lone_value) + head * size);
  }
  return sections.used();
}

template <class S>
Norm take_norm(Sections& sections, const float* weight, long width, float eps) {
  if (weight == nullptr) return {0, 0, eps};
  return {sections.take<float>(width), sections.take<float>(width), eps};
}

inline void pack_norm(void* out, const Norm& norm, const float* weight, const float* bias,
                      long width) {
  if (weight == nullptr) return;
  copy_floats(weight, width, section<float>(out, norm.weight));
  copy_floats(bias, width, section<float>(out, norm.bias));
}

template <class S, typename T>
std::int64_t pack_embedding(const EmbeddingShape& shape, const EmbeddingWeights& w, void* out) {
  const long width = shape.width, tokens = shape.tokens;
  Sections sections(sizeof(EmbeddingPack));
  EmbeddingPack pack{};
  pack.shape = shape;
  pack.table = sections.take<float>(tokens * width);
  pack.place = sections.take<std::int32_t>(tokens);
  pack.weight = sections.take<T>(Panels<S, T>::size(width, shape.patch()));
  pack.norm = take_norm<S>(sections, w.norm_weight, width, shape.eps);
  pack.head = pack_head_of<S, T>(PackHead::Kind::embedding, sections.used());
  if (out == nullptr) return sections.used();

  __builtin_memset(out, 0, sections.used());
  __builtin_memcpy(out, &pack, sizeof(pack));
  copy_floats(w.table, tokens * width, section<float>(out, pack.table));
  auto* place = section<std::int32_t>(out, pack.place);
  for (std::int32_t row = 0; row < tokens; ++row) place[w.order[row]] = row;
  pack_columns<S, T>(w.weight, shape.patch(), 1, width, shape.patch(), S::kVecs, 1.0f,
                     section<T>(out, pack.weight));
  pack_norm(out, pack.norm, w.norm_weight, w.norm_bias, width);
  return sections.used();
}

template <class S, typename T>
std::int64_t pack_head(const HeadShape& shape, const HeadWeights& w, void* out) {
  Sections sections(sizeof(HeadPack));
  HeadPack pack{};
  pack.shape = shape;
  pack.norm = take_norm<S>(sections, w.norm_weight, shape.width, shape.eps);
  for (int i = 0; i < shape.heads; ++i)
    pack.linear[i] = take_linear<S, T>(sections, shape.classes, shape.width);
  pack.head = pack_head_of<S, T>(PackHead::Kind::head, sections.used());
  if (out == nullptr) return sections.used();

  __builtin_memset(out, 0, sections.used());
  __builtin_memcpy(out, &pack, sizeof(pack));
  pack_norm(out, pack.norm, w.norm_weight, w.norm_bias, shape.width);
  for (int i = 0; i < shape.heads; ++i)
    pack_linear<S, T>(out, pack.linear[i], w.weight[i], w.bias[i], shape.classes, shape.width,
                      1.0f / static_cast<float>(shape.heads));
  return sections.used();
}

template <class S, typename T>
std::int64_t pack_chooser(const ChooserShape& shape, const ChooserWeights& w, void* out) {
  Sections sections(sizeof(ChooserPack));
  ChooserPack pack{};
  pack.shape = shape;
  const long width = shape.width, hidden = shape.hidden;
  if (shape.scores == Scores::predictor) {
    pack.norm = take_norm<S>(sections, w.norm_weight, width, shape.eps);
    pack.down = take_linear<S, T>(sections, hidden, width);
    pack.out = sections.take<float>(Panels<S, T>::columns(hidden));
  }
  pack.head = pack_head_of<S, T>(PackHead::Kind::chooser, sections.used());
  if (out == nullptr) return sections.used();

  __builtin_memset(out, 0, sections.used());
  __builtin_memcpy(out, &pack, sizeof(pack));
  if (shape.scores == Scores::predictor) {
    pack_norm(out, pack.norm, w.norm_weight, w.norm_bias, width);
    pack_linear<S, T>(out, pack.down, w.down_weight, w.down_bias, hidden, width);
    copy_floats(w.out_weight, hidden, section<float>(out, pack.out));
  }
  return sections.used();
}

// Layers for every head, one head after the other.
template <class S, typename T>
Linear take_heads(Sections& sections, long heads, long n, long k) {
  return {sections.take<T>(heads * Panels<S, T>::size(n, k)),
          sections.take<float>(heads * Panels<S, T>::columns(n))};
}

// Outputs [first, first + n) and inputs [0, k) of weights [H, inputs, outputs].
template <class S, typename T>
void pack_heads(void* pack, const Linear& to, const float* weight, const float* bias, long heads,
                long inputs, long outputs, long first, long n, long k) {
  const long columns = Panels<S, T>::columns(n);
  for (long head = 0; head < heads; ++head) {
    pack_columns<S, T>(weight + head * inputs * outputs + first, 1, outputs, n, k, S::kVecs, 1.0f,
                       section<T>(pack, to.weight) + head * Panels<S, T>::size(n, k));
    copy_floats(bias + head * outputs + first, n, section<float>(pack, to.bias) + head * columns);
  }
}

template <class S, typename T>
std::int64_t pack_selector(const SelectorShape& shape, const SelectorWeights& w, void* out) {
  const long width = shape.width, heads = shape.heads, c = shape.channels();
  const long half = shape.half(), quarter = shape.quarter(), hidden = shape.hidden();
  const long half_columns = Panels<S, T>::columns(half);
  const long quarter_columns = Panels<S, T>::columns(quarter);
  Sections sections(sizeof(SelectorPack));
  SelectorPack pack{};
  pack.shape = shape;
  pack.norm = take_norm<S>(sections, w.norm_weight, width, shape.eps);
  pack.local = take_heads<S, T>(sections, heads, half, c);
  pack.global = take_heads<S, T>(sections, heads, half, c);
  pack.judge1 = take_heads<S, T>(sections, heads, half, half);
  pack.of_mean = sections.take<float>(heads * half * half_columns);
  pack.judge2 = take_heads<S, T>(sections, heads, quarter, half);
  pack.judge3 = sections.take<float>(heads * quarter_columns);
  pack.judge3_bias = sections.take<float>(heads);
  pack.weigh1 = sections.take<float>(hidden * heads);
  pack.weigh1_bias = sections.take<float>(hidden);
  pack.weigh2 = sections.take<float>(heads * hidden);
  pack.weigh2_bias = sections.take<float>(heads);
  pack.head = pack_head_of<S, T>(PackHead::Kind::selector, sections.used());
  if (out == nullptr) return sections.used();

  __builtin_memset(out, 0, sections.used());
  __builtin_memcpy(out, &pack, sizeof(pack));
  pack_norm(out, pack.norm, w.norm_weight, w.norm_bias, width);
  pack_heads<S, T>(out, pack.local, w.embed, w.embed_bias, heads, c, c, 0, half, c);
  pack_heads<S, T>(out, pack.global, w.embed, w.embed_bias, heads, c, c, half, half, c);
  pack_heads<S, T>(out, pack.judge1, w.judge1, w.judge1_bias, heads, c, half, 0, half, half);
  pack_heads<S, T>(out, pack.judge2, w.judge2, w.judge2_bias, heads, half, quarter, 0, quarter,
                   half);
  float* of_mean = section<float>(out, pack.of_mean);
  float* judge3 = section<float>(out, pack.judge3);
  for (long head = 0; head < heads; ++head) {
    for (long i = 0; i < half; ++i)
      copy_floats(w.judge1 + (head * c + half + i) * half, half,
                  of_mean + (head * half + i) * half_columns);
    const float* both = w.judge3 + head * quarter * 2;
    for (long i = 0; i < quarter; ++i)
      judge3[head * quarter_columns + i] = both[2 * i] - both[2 * i + 1];
    section<float>(out, pack.judge3_bias)[head] =
        w.judge3_bias[2 * head] - w.judge3_bias[2 * head + 1];
  }
  copy_floats(w.weigh1, hidden * heads, section<float>(out, pack.weigh1));
  copy_floats(w.weigh1_bias, hidden, section<float>(out, pack.weigh1_bias));
  copy_floats(w.weigh2, heads * hidden, section<float>(out, pack.weigh2));
  copy_floats(w.weigh2_bias, heads, section<float>(out, pack.weigh2_bias));
  return sections.used();
}

}  // namespace
}  // namespace slimvit
