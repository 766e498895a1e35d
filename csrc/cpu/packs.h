#pragma once

#include <cstdint>

#include "cpu/inline.h"
#include "cpu/isa.h"

// Weights, laid out once for the kernels of one instruction set: plain bytes that start with a
// header, so that whoever owns them may copy or keep them as any other array.

namespace slimvit {

enum class Dtype : std::int32_t { float32, bfloat16 };
enum class Activation : std::int32_t { gelu, gelu_tanh, quick_gelu };
enum class Scores : std::int32_t { attention, predictor };

inline constexpr std::int64_t kAlignment = 64;

struct PackHead {
  enum class Kind : std::int32_t { block = 1, embedding, head, chooser, selector };
  static constexpr std::uint32_t kMagic = 0x54565354;  // another where the layout of a pack changes

  std::uint32_t magic;
  Kind kind;
  Isa isa;
  Dtype dtype;
  std::int64_t bytes;
};

// Offsets count bytes from the header; 0 means absent.
struct Norm {
  std::int64_t weight, bias;  // float32 [D]
  float eps;
};

struct Linear {
  std::int64_t weight, bias;  // Panels; float32 [n], padded
};

struct BlockShape {
  std::int32_t width, heads, head_dim, hidden;
  Activation activation;
  float eps1, eps2;
  float extra_bias;   // logit bias of the extra key, if there is one
  std::int32_t lone;  // whether it will be called for a lone query or two: see Block::lone

  SLIMVIT_INLINE long inner() const { return static_cast<long>(heads) * head_dim; }
};

// Weights in float32, row by row, [out, in]; null where a model has none.
struct BlockWeights {
  const float *norm1_weight, *norm1_bias, *qkv_weight, *qkv_bias, *proj_weight, *proj_bias;
  const float *norm2_weight, *norm2_bias, *fc1_weight, *fc1_bias, *fc2_weight, *fc2_bias;
  const float *extra_key, *extra_value;  // [H · d]
};

struct BlockPack {
  PackHead head;
  BlockShape shape;
  Norm norm1, norm2;
  Linear kv, q, proj;  // weights lie in the order of their use
  std::int64_t mlp;    // T, the weights of fc1 and fc2: see mlp_slice
  std::int64_t fc1_bias, fc2_bias;
  std::int64_t fc1_squares;           // float32 [hidden], padded: see Activate
  std::int64_t extra;                 // T [2 · H · d]: key, then value
  std::int64_t lone_key, lone_value;  // Panels of every head: [D] from [d], and [d] from [D]
};

struct EmbeddingShape {
  std::int32_t channels, image_height, image_width, patch_height, patch_width;
  std::int32_t tokens, prefix, width;
  float eps;  // of the norm after the embedding

  SLIMVIT_INLINE long rows() const { return image_height / patch_height; }
  SLIMVIT_INLINE long columns() const { return image_width / patch_width; }
  SLIMVIT_INLINE long patch() const {
    return static_cast<long>(channels) * patch_height * patch_width;
  }
};

struct EmbeddingWeights {
  const float* weight;                   // [D, C · ph · pw]
  const float* table;                    // [N, D], lifetime order: what each token starts from
  const std::int32_t* order;             // [N]: which token comes where in lifetime order
  const float *norm_weight, *norm_bias;  // [D], or null
};

struct EmbeddingPack {
  PackHead head;
  EmbeddingShape shape;
  std::int64_t table, weight;
  std::int64_t place;  // int32 [N]: where each token stands in lifetime order
  Norm norm;
};

struct HeadShape {
  std::int32_t width, classes, heads;  // heads: 0, 1, or 2 that are averaged; one token each
  float eps;
};

struct HeadWeights {
  const float *norm_weight, *norm_bias;  // [D], or null
  const float *weight[2], *bias[2];      // [classes, D], [classes] or null
};

struct HeadPack {
  PackHead head;
  HeadShape shape;
  Norm norm;
  Linear linear[2];
};

// How a block chooses its tokens: by the attention of the tokens that the head reads, and the
// pruned ones go into the kept ones, or by a small module, score = out · act(down(LN(x))).
struct ChooserShape {
  Scores scores;
  std::int32_t width;
  std::int32_t head_tokens;  // of `attention`
  std::int32_t reach;        // there, patches that are looked at for each that goes
  // There, where an average image has so many tokens before and after, and not 0: all patches of
  // lower scores go, instead of a fixed number.
  float threshold;
  std::int32_t before, after;
  std::int32_t hidden;  // of `predictor`
  Activation activation;
  float eps;

  // Whether each image keeps a number of its own.
  SLIMVIT_INLINE bool ragged() const { return before > 0; }
};

struct ChooserWeights {
  const float *norm_weight, *norm_bias;  // [D], or null where there is no predictor
  const float *down_weight, *down_bias;  // [hidden, D], [hidden] or null
  const float* out_weight;               // [hidden]
};

struct ChooserPack {
  PackHead head;
  ChooserShape shape;
  Norm norm;
  Linear down;
  std::int64_t out;  // float32 [hidden], padded
};

// A selector, whose heads judge their own channels of the patches: slimvit/dynamic/selector.py.
struct SelectorShape {
  std::int32_t width, heads;
  std::int32_t patches;   // to keep; 0 for as many as it favours,
  std::int32_t fewest;    // but so many, that the selectors after it can keep one and prune one
  std::int32_t packages;  // of earlier selectors
  float eps;

  SLIMVIT_INLINE long channels() const { return width / heads; }
  SLIMVIT_INLINE long half() const { return channels() / 2; }
  SLIMVIT_INLINE long quarter() const { return channels() / 4; }
  SLIMVIT_INLINE long hidden() const { return heads > 1 ? heads / 2 : 1; }
};

// Weights in float32. Those of a layer for every head are [H, in, out], biases [H, out].
struct SelectorWeights {
  const float *norm_weight, *norm_bias;  // [D]
  const float *embed, *embed_bias;       // c to c
  const float *judge1, *judge1_bias;     // c to c / 2
  const float *judge2, *judge2_bias;     // c / 2 to c / 4
  const float *judge3, *judge3_bias;     // c / 4 to 2
  const float *weigh1, *weigh1_bias;     // [hidden, H], [hidden]
  const float *weigh2, *weigh2_bias;     // [H, hidden], [H]
};

struct SelectorPack {
  PackHead head;
  SelectorShape shape;
  Norm norm;
  Linear local, global;  // every head's embedding: its halves
  Linear judge1;         // of the local half
  std::int64_t of_mean;  // float32 [H, c / 2, c / 2 padded]: the same of the mean's half
  Linear judge2;
  std::int64_t judge3, judge3_bias;  // float32 [H, c / 4 padded], [H]: keep less prune
  std::int64_t weigh1, weigh1_bias, weigh2, weigh2_bias;  // float32, as they come
};

}  // namespace slimvit
