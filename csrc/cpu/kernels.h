#pragma once

#include <cstdint>

#include "cpu/packs.h"

// What every instruction set offers: `kernels(isa, dtype)` has its functions.

namespace slimvit {

// Workers that share an image wait for each other here. Spins, then yields the processor.
class Barrier {
 public:
  void reset(int size) { size_ = size; }
  void wait();

 private:
  int size_ = 1;
  int arrived_ = 0;
  unsigned generation_ = 0;  // wraps around
};

struct Team {
  int rank = 0, size = 1;
  Barrier* barrier = nullptr;

  SLIMVIT_INLINE void sync() const {
    if (size > 1) barrier->wait();
  }
};

// Some images through one block.
struct BlockCall {
  const BlockPack* pack;
  const float* x;  // token t of image b at x + b · x_image + t · x_token
  long x_image, x_token;
  float* out;
  long out_image, out_token;
  const std::int64_t* index;  // [B, n], or null: the first n
  const float* key_bias;      // [m], or [B, m] where bias_image = m; or null
  long bias_image;
  long batch, m, n;
  // Where each image's kept tokens are chosen; else all are null.
  const ChooserPack* chooser;
  long prefix;
  const float* size;             // [B, m], or null: 1
  const float* spread;           // [B, m], or null: 0
  std::int64_t* kept;            // [B, n], positions among the alive tokens
  std::int64_t* into;            // [B, m - n], of a chooser that absorbs; or null
  float *size_out, *spread_out;  // [B, n]
};

// Some images through the whole network.
struct NetworkCall {
  const EmbeddingPack* embedding;
  const BlockPack* const* blocks;
  const HeadPack* head;
  const std::int32_t* counts;  // n of each block
  long depth;
  bool idle;    // pruned tokens stay keys and values
  bool tokens;  // the answer is the tokens after the final norm, not the logits
  const void* images;
  Dtype images_dtype;
  float* out;  // [B, classes], or [B, n_L, D] ([B, N, D] where idle)
  long batch;
  long chunk;  // images that a worker takes through the depth together, at most
  // Where each image's kept tokens are chosen; else null.
  const ChooserPack* const* choosers;    // of each block; null keeps the first n
  const SelectorPack* const* selectors;  // ahead of each block; null is none
  bool ragged;         // each image keeps a number of its own: `counts` is how many at most
  std::int64_t* kept;  // [B, Σ n]: places of the kept tokens, block after block, then -1
};

// Some images' tokens through one selector.
struct SelectCall {
  const SelectorPack* pack;
  const float* x;  // token t of image b at x + b · x_image + t · x_token
  long x_image, x_token;
  float* out;  // the same of the n that are left
  long out_image, out_token;
  std::int64_t* place;  // [B, n]: which of the m tokens each is, m for the package
  long batch, m, n, prefix;
};

// Workers call with their share [first, first + count) and memory of their team and of their own.
struct Kernels {
  std::int64_t (*pack_block)(const BlockShape&, const BlockWeights&, void* out);
  std::int64_t (*pack_embedding)(const EmbeddingShape&, const EmbeddingWeights&, void* out);
  std::int64_t (*pack_head)(const HeadShape&, const HeadWeights&, void* out);
  std::int64_t (*pack_chooser)(const ChooserShape&, const ChooserWeights&, void* out);
  std::int64_t (*pack_selector)(const SelectorShape&, const SelectorWeights&, void* out);

  // Bytes that a team needs, and each of its workers for itself.
  std::int64_t (*block_memory)(const BlockCall&);
  std::int64_t (*block_own_memory)(const BlockCall&);
  void (*block)(const BlockCall&, long first, long count, const Team&, char* shared, char* own);
  std::int64_t (*network_memory)(const NetworkCall&);
  std::int64_t (*network_own_memory)(const NetworkCall&);
  void (*network)(const NetworkCall&, long first, long count, const Team&, char* shared, char* own);
  std::int64_t (*select_memory)(const SelectCall&);
  std::int64_t (*select_own_memory)(const SelectCall&);
  void (*select)(const SelectCall&, long first, long count, const Team&, char* shared, char* own);

  double (*peak)(long rounds);  // floating-point operations of a run of nothing but products
  void (*finish)();             // after any of these, on the same thread
};

// Throws std::invalid_argument where this build has no kernels for `isa`.
const Kernels& kernels(Isa isa, Dtype dtype);

}  // namespace slimvit
