// What the kernels take: plain pointers into GPU memory, and sizes. Tensors are contiguous, of
// 16-byte aligned rows, of `type` where nothing else is said; whoever calls has checked that.
#pragma once

#include <cstdint>

namespace slimvit {

enum class Type { half, bfloat16 };
enum class Activation { none, gelu, gelu_tanh, quick_gelu };

// act(LN(x) Wᵀ + b) + residual of n rows of each image, and then, where tail_columns > 0, of all
// m = x_rows rows for the columns that follow: queries, then keys and values. With a spread, act is
// its mean over the tokens that a row stands for: see activation.h.
struct Linear {
  const void* x;              // [batch, x_rows, groups * inner]
  const float* stats;         // [batch, x_rows, x_parts, 2], or null: no norm
  const void* weight;         // [groups * columns + tail_columns, inner], the norm's weight in it
  const float* row_sums;      // of the weight, [columns + tail_columns], where there is a norm
  const float* spread;        // more variance of each row than stats have, [batch, x_rows], or null
  const float* squares;       // of the weight's rows, summed, [columns], where there is a spread
  const float* bias;          // [groups * columns + tail_columns] or null
  const void* residual;       // [batch, residual_rows, columns] or null
  const std::int64_t* index;  // [batch, n]: rows of the residual, or else of x; null: the first n
  void* out;                  // [batch, out_rows, groups * columns]
  void* tail_out;             // [batch, x_rows, tail_columns]
  float* out_stats;           // [batch, out_rows, columns / part, 2] or null
  int batch, n, x_rows, residual_rows, out_rows;
  int groups, inner, columns, tail_columns;
  int x_parts, part;
  float eps;
  Activation activation;
};
void slim_linear(const Linear& p, Type type, void* stream);

// softmax(q kᵀ / sqrt(d) + bias) v of every image and head.
struct Attention {
  const void* q;          // [batch, n, heads * d]
  const void* kv;         // [batch, m, 2, heads * d]
  const float* key_bias;  // [m] or [batch, m], or null
  const float* extra;     // one more key and value for all images, [2, heads * d], or null
  void* out;              // [batch, n, heads * d]
  int batch, n, m, heads, d;
  int bias_image;  // elements from one image's bias to the next: 0 or m
  int segment;     // keys in shared memory at a time, a multiple of 16: set by the launcher
  float extra_bias;
};
void slim_attention(const Attention& p, Type type, void* stream);

// The average of normalised rows under each query's softmax; see kernels/last_attention.py.
struct LastAttention {
  const void* x;          // [batch, m, width]
  const float* stats;     // [batch, m, parts, 2]
  const void* u;          // [batch, queries, width]
  const float* key_bias;  // [m] or [batch, m], or null
  void* out;              // [batch, queries, width]
  int batch, m, width, queries, parts;
  int bias_image;
  float scale, eps;
  bool has_zero;  // one more row, a zero row, with this logit
  float zero_bias;
};
void last_attention(const LastAttention& p, Type type, void* stream);

// A whole block in one launch; see fused_block.cu. Norms are folded into weights and biases.
struct FusedBlock {
  const void* x;              // [batch, m, width]
  const void* qkv;            // [3 * width, width]
  const float* qkv_bias;      // [3 * width]
  const void* proj;           // [width, width]
  const float* proj_bias;     // [width]
  const void* fc1;            // [hidden, width]
  const float* fc1_bias;      // [hidden]
  const void* fc2;            // [width, hidden]
  const float* fc2_bias;      // [width]
  const float* key_bias;      // [m] or [batch, m], or null
  const std::int64_t* index;  // [batch, n] or null
  void* out;                  // [batch, out_rows, width]
  float* out_stats;           // [batch, out_rows, width / 64, 2]
  int batch, m, n, out_rows, width, heads, hidden;
  int bias_image;
  int stages;      // tiles of weights in shared memory: set by the launcher
  bool has_extra;  // one more key and value, of a zero row
  float extra_bias, eps1, eps2;
  Activation activation;
};
// How many tiles of weights fit beside the activations on the current device; 0: it does not run.
int fused_block_stages(const FusedBlock& p);
void fused_block(FusedBlock p, Type type, void* stream);

// Mean and sum of squared deviations of each part of each row.
struct RowStats {
  const void* x;  // [rows, width]
  float* out;     // [rows, width / part, 2]
  std::int64_t rows;
  int width, part;
};
void row_stats(const RowStats& p, Type type, void* stream);

// out[b, index[b, k]] = x[b, k], zero elsewhere.
struct Scatter {
  const void* x;              // [batch, kept, width]
  const std::int64_t* index;  // [kept] or [batch, kept]
  void* out;                  // [batch, length, width]
  int batch, kept, length, width;
  int index_image;  // elements from one image's index to the next: 0 or kept
};
void scatter_tokens(const Scatter& p, void* stream);

// What absorb chooses by; see absorb_scores.cu.
struct AbsorbScores {
  const void* x;             // [batch, m, width]
  const float* stats;        // [batch, m, x_parts, 2]
  const void* q;             // [batch, tokens, heads * d]
  const void* kv;            // [batch, m, 2, heads * d]
  const float* norm_weight;  // [width]
  const float* norm_bias;    // [width]
  const float* key_bias;     // [batch, m] or null
  void* normed;              // scratch: LN(x), [batch, m, width]
  float* shrink;             // scratch: one by the norms of those rows, [batch, m]
  float* of_heads;           // scratch: importances in each head, [batch, heads, m]
  float* importance;         // [batch, m]
  float* score;              // [batch, m]; infinite for tokens that may not be pruned
  float* cosine;             // [batch, m, m]; kFarthest where the column is not ahead of the row
  int batch, m, width, x_parts, tokens, heads, d, prefix;
  int candidates;  // patches of least importance that may be pruned
  float scale, eps;
};
void absorb_importance(const AbsorbScores& p, Type type, void* stream);  // the scratch alone
void absorb_scores(const AbsorbScores& p, Type type, void* stream);

// The kept tokens, and which of those each token goes into.
struct AbsorbSelect {
  const float* score;   // [batch, m]
  const float* cosine;  // [batch, m, m]
  std::int64_t* index;  // [batch, n]
  int* into;            // [batch, m]
  int batch, m, n, prefix;
};
void absorb_select(const AbsorbSelect& p, void* stream);

// The kept tokens with what goes into them; see absorb_merge.cu. Statistics, those of x as well,
// have width * spread in the squared deviations of a row's first part.
struct AbsorbMerge {
  const void* x;              // [batch, m, width]
  const float* stats;         // [batch, m, width / part, 2]
  const float* importance;    // [batch, m]
  const std::int64_t* index;  // [batch, n]
  const int* into;            // [batch, m]
  const float* size;          // [batch, m] or null: 1
  const float* spread;        // [batch, m] or null: 0
  void* out;                  // [batch, n, width]
  float* out_stats;           // [batch, n, width / part, 2]
  float* out_size;            // [batch, n]
  float* out_bias;            // the log of that
  float* out_spread;          // [batch, n]
  int batch, m, n, width, part;
};
void absorb_merge(const AbsorbMerge& p, Type type, void* stream);

// The first `prefix` tokens and the highest scores of the others, n in all.
struct TopTokens {
  const void* scores;   // [batch, m], float32; with a weight [batch, m, channels]
  const float* weight;  // [channels] or null
  std::int64_t* index;  // [batch, n]
  int batch, m, n, prefix, channels;
};
void top_tokens(const TopTokens& p, Type type, void* stream);

// What each head of a selector says of each patch; see selector_judge.cu. Matrices have inputs
// before outputs, c is a head's channels.
struct SelectorJudge {
  const void* x;             // [batch, m, heads * c]: prefix, p patches, packages
  const void* embed;         // [heads, c, c], the norm's weight in it
  const float* embed_bias;   // [heads, c]
  const void* judge1;        // [heads, c, half], its first rows for what is local
  const float* bias1;        // [heads, half]
  const void* judge2;        // [heads, half, quarter]
  const float* bias2;        // [heads, quarter]
  const float* judge3;       // [heads, quarter]
  const float* bias3;        // [heads]
  const float* weigh1;       // [hidden, heads]
  const float* weigh1_bias;  // [hidden]
  const float* weigh2;       // [heads, hidden]
  const float* weigh2_bias;  // [heads]
  void* local;               // scratch: [batch, heads, p, local outputs]
  float* sums;               // scratch: of the other outputs, [batch, heads, tiles, c - those]
  float* means;              // scratch: of a head's channels, [batch, heads, p]
  float* verdict;            // [batch, heads, p]
  float* weight;             // [batch, heads, p], logits
  int batch, m, p, prefix;
  int heads, c, half, quarter, hidden;
  float eps;
};
constexpr int kSelectorRows = 32;                                      // patches of a tile
void selector_embed(const SelectorJudge& p, Type type, void* stream);  // the scratch alone
void selector_judge(const SelectorJudge& p, Type type, void* stream);

// The n patches of the highest scores, and what the others are of the package.
struct SelectorChoose {
  const float* verdict;  // [batch, heads, p]
  const float* weight;   // [batch, heads, p], logits
  float* score;          // [batch, p]
  float* share;          // [batch, p]
  std::int64_t* index;   // [batch, prefix + n + packages + 1]
  int batch, heads, p, n, prefix, packages;
};
void selector_choose(const SelectorChoose& p, void* stream);

// The tokens at an index, and after them the mean of patches by their shares.
struct PackageTokens {
  const void* x;              // [batch, m, width]
  const std::int64_t* index;  // [batch, count], the last for the package
  const float* share;         // [batch, p]
  void* out;                  // [batch, count, width]
  float* out_stats;           // [batch, count, width / part, 2]
  int batch, m, p, prefix, count, width, part;
};
void package_tokens(const PackageTokens& p, Type type, void* stream);

}  // namespace slimvit
