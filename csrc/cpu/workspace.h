#pragma once

#include "cpu/pack.h"

// The memory of a forward pass: what a team shares, and what each worker has for itself.

namespace slimvit {
namespace {

constexpr long kMlpRows = 256;   // rows whose hidden layer is held at a time
constexpr long kChoiceRows = 8;  // tokens that are compared with others at a time
constexpr long kMaxLanes = 16;   // of any instruction set

// How many patches a chooser by attention looks at, to keep n of m tokens: slimvit/ops/choosers.py.
inline long candidates_of(const ChooserShape& how, long m, long n, long prefix) {
  const long patches = m - prefix;
  if (!how.ragged()) return least(patches, how.reach * (m - n));
  return least(patches - 1, how.reach * (m - m * how.after / how.before));
}

// What a call's blocks choose among, for which they need memory: the most of all its blocks.
struct Choices {
  long tokens = 0;       // of a block that chooses; 0 where none does
  bool attends = false;  // whether any chooses by attention
  long cosines = 0;      // of its candidates with patches
  long selected = 0;     // tokens before a selector; 0 where there is none

  // A block, which has `m` tokens and keeps `n`, or fewer of both; null chooses nothing.
  void add(const ChooserPack* chooser, long m, long n, long prefix) {
    if (chooser == nullptr) return;
    tokens = most(tokens, m);
    if (chooser->shape.scores != Scores::attention) return;
    attends = true;
    const long candidates = candidates_of(chooser->shape, m, n, prefix);
    cosines = most(cosines, candidates * round_up(m, kMaxLanes));
  }
};

// What a team needs to choose among the m tokens of an image. Columns are padded to whole vectors.
template <typename T>
struct SharedChoice {
  float* score;  // [m], of a predictor; or of candidates
  // By attention:
  float* square;        // [m], squares of the norms of LN1 of patches
  float* cosines;       // [candidates, columns], with the patches ahead of them
  float* value_square;  // [H, columns], ‖value‖²

  static SharedChoice make(Parts& parts, const Choices& choices, const BlockShape& shape) {
    SharedChoice shared{};
    if (choices.tokens == 0) return shared;
    shared.score = parts.take<float>(choices.tokens);
    if (!choices.attends) return shared;
    shared.square = parts.take<float>(choices.tokens);
    shared.cosines = parts.take<float>(choices.cosines);
    shared.value_square = parts.take<float>(shape.heads * round_up(choices.tokens, kMaxLanes));
    return shared;
  }
};

// Patches that a selector judges together: in sums their order is the same whoever takes them, and
// they are lanes of vectors.
constexpr long kSelectorRows = kMaxLanes;

constexpr long selector_rows(long m) { return round_up(m, kSelectorRows); }

// What a team needs to select among the m tokens of an image. A head's half of its channels, padded
// to whole vectors, is no more than all of them.
template <typename T>
struct SharedSelection {
  T* local;        // [m, D]: what the heads judge of each patch
  float* sums;     // [groups of patches, D]: sums of what they judge of all
  float* weights;  // [groups, H, kSelectorRows]
  float* score;    // [m]

  static SharedSelection make(Parts& parts, long m, long width) {
    SharedSelection shared{};
    if (m == 0) return shared;
    const long groups = selector_rows(m) / kSelectorRows;
    shared.local = parts.take<T>(m * width);
    shared.sums = parts.take<float>(groups * width);
    shared.weights = parts.take<float>(groups * width);
    shared.score = parts.take<float>(m);
    return shared;
  }
};

// What one group of images needs, shared by the workers of its team.
template <typename T>
struct Shared {
  float *x, *gathered;  // [rows, D]
  T* y;                 // [rows, D]
  T* y_kept;            // the same, and more where blocks choose: see Tokens::packed
  T *q, *a;             // [rows, H · d]
  T* kv;                // [rows, 2 · H · d]
  T *keys, *values;     // packed, by image and head
  SharedChoice<T> choice;
  SharedSelection<T> selection;

  // `keys`: all images' keys, the extra ones too, each image's padded to whole vectors.
  static Shared make(Parts& parts, long rows, long keys, const Choices& choices,
                     const BlockShape& shape) {
    const long inner = shape.inner(), packed = keys * inner;
    Shared shared;
    shared.x = parts.take<float>(rows * shape.width);
    shared.gathered = parts.take<float>(rows * shape.width);
    shared.y = parts.take<T>(rows * shape.width);
    shared.y_kept = parts.take<T>((rows + (choices.attends ? kMaxLanes : 0)) * shape.width);
    shared.q = parts.take<T>(rows * inner);
    shared.a = parts.take<T>(rows * inner);
    shared.kv = parts.take<T>(rows * 2 * inner);
    shared.keys = parts.take<T>(packed);
    shared.values = parts.take<T>(packed);
    shared.choice = SharedChoice<T>::make(parts, choices, shape);
    shared.selection = SharedSelection<T>::make(parts, choices.selected, shape.width);
    return shared;
  }
};

// What a worker needs for itself to choose: the same in all workers of a team, who all work it out
// rather than wait for one of them.
template <class S, typename T>
struct OwnChoice {
  std::int32_t* key;             // [columns]: see `ordered`
  std::int32_t *index, *pruned;  // [m]: the kept tokens, and the others
  float* size;                   // [m], of the kept after the others went into them
  std::int32_t* grows;           // [m], whether any did
  // By attention:
  float* importance;        // [columns]
  float* weight;            // [m], of a token in an average
  float* inverse;           // [columns], 1 / norm of LN1 of patches
  float* standing;          // [columns], importance of patches, least where there is none
  std::int32_t* candidate;  // [m], patches that may be pruned
  std::int32_t* row;        // [m], which candidate each pruned token is
  float* open;              // [columns]: 0 where a token may go into the patch, else -∞
  T* taken;                 // [kChoiceRows, D], LN1 of candidates
  std::int32_t* into;       // [m], for pruned token after pruned token
  float *total, *moment;    // [m], of the kept after the others went into them

  static OwnChoice make(Parts& parts, const Choices& choices, const BlockShape& shape) {
    const long m = choices.tokens, columns = round_up(m, kMaxLanes);
    OwnChoice own{};
    if (m == 0) return own;
    own.key = parts.take<std::int32_t>(columns);
    own.index = parts.take<std::int32_t>(m);
    own.pruned = parts.take<std::int32_t>(m);
    own.size = parts.take<float>(m);
    own.grows = parts.take<std::int32_t>(m);
    if (!choices.attends) return own;
    own.importance = parts.take<float>(columns);
    own.weight = parts.take<float>(m);
    own.inverse = parts.take<float>(columns);
    own.standing = parts.take<float>(columns);
    own.candidate = parts.take<std::int32_t>(m);
    own.row = parts.take<std::int32_t>(m);
    own.open = parts.take<float>(columns);
    own.taken = parts.take<T>(kChoiceRows * shape.width);
    own.into = parts.take<std::int32_t>(m);
    own.total = parts.take<float>(m);
    own.moment = parts.take<float>(m);
    return own;
  }
};

// What a worker needs for itself to select; `sums` to `pruned` are the same in all of a team.
template <class S, typename T>
struct OwnSelection {
  T *normed, *judged;            // [kSelectorRows, D], of one head
  float *means, *weighed;        // [H, kSelectorRows]
  float* lanes;                  // [kSelectorRows, lanes]
  float *sums, *of_mean;         // [D]
  std::int32_t* key;             // [m]: see `ordered`
  float* weight;                 // [m], of the pruned patches in their package
  std::int32_t *index, *pruned;  // [m]: the kept patches, and the others

  static OwnSelection make(Parts& parts, long m, long width) {
    OwnSelection own{};
    if (m == 0) return own;
    own.normed = parts.take<T>(kSelectorRows * width);
    own.judged = parts.take<T>(kSelectorRows * width);
    own.means = parts.take<float>(width);
    own.weighed = parts.take<float>(width);
    own.lanes = parts.take<float>(kSelectorRows * S::kLanes);
    own.sums = parts.take<float>(width);
    own.of_mean = parts.take<float>(width);
    own.key = parts.take<std::int32_t>(m);
    own.weight = parts.take<float>(selector_rows(m));
    own.index = parts.take<std::int32_t>(m);
    own.pruned = parts.take<std::int32_t>(m);
    return own;
  }
};

// What a worker needs for itself.
template <class S, typename T>
struct Own {
  AttentionMemory<S, T> attention;
  float* bias;   // [columns]
  T* hidden;     // [kMlpRows, kMlpColumns]
  float* share;  // [kMlpRows], of the spread of those rows after the norm
  OwnChoice<S, T> choice;
  OwnSelection<S, T> selection;

  static Own make(Parts& parts, long tokens, const Choices& choices, const BlockShape& shape) {
    const long columns = Panels<S, T>::columns(tokens + 1);
    Own own;
    own.attention.logits = parts.take<float>(kQueryRows<S> * columns);
    own.attention.largest = parts.take<float>(kQueryRows<S> * S::kLanes);
    own.attention.scale = parts.take<float>(kQueryRows<S>);
    own.attention.p = parts.take<T>(kQueryRows<S> * columns);
    own.bias = parts.take<float>(columns);
    own.hidden = parts.take<T>(kMlpRows * kMlpColumns);
    own.share = parts.take<float>(kMlpRows);
    own.choice = OwnChoice<S, T>::make(parts, choices, shape);
    own.selection = OwnSelection<S, T>::make(parts, choices.selected, shape.width);
    return own;
  }
};

}  // namespace
}  // namespace slimvit
