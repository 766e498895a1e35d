#pragma once

#include "cpu/packs.h"

namespace slimvit {

// The tokens of some images that a block receives, each image's `ld` apart.
struct Alive {
  std::int32_t* place;  // where each stands in the full sequence
  float* size;          // how many tokens each stands for
  float* bias;          // log(size)
  float* spread;        // see layer_norm.h; 0 of those that stand for themselves alone
  long ld;

  SLIMVIT_INLINE Alive of(long image) const {
    return {place + image * ld, size + image * ld, bias + image * ld, spread + image * ld, ld};
  }
};

// How a block chooses for each image, and where it writes what it chose.
struct Choosing {
  const ChooserPack* pack;  // null keeps the first n
  long prefix;
  Alive before, after;
  std::int64_t* kept;  // places of the n kept, images `kept_image` apart; or null
  long kept_image;
  std::int64_t* into;  // [images, m - n], of a pack that absorbs; or null
};

}  // namespace slimvit
