#pragma once

#include "cpu/absorb.h"
#include "cpu/block_parts.h"
#include "cpu/gather.h"
#include "cpu/predictor.h"
#include "cpu/stopwatch.h"

// How a block chooses between its keys and its queries, each image for itself.

namespace slimvit {
namespace {

template <class S, typename T>
class Chooser : protected BlockParts<S, T> {
 protected:
  using Base = BlockParts<S, T>;
  using Base::ask;
  using Base::Base;
  using Base::inner;
  using Base::kept_;
  using Base::logit_bias;
  using Base::own_;
  using Base::pack_;
  using Base::packed_size;
  using Base::shape_;
  using Base::shared_;
  using Base::team_;
  using Base::width;

  // The worker's rows of the kept tokens, chosen where there is a choice.
  void advance() {
    const Choosing& choosing = *kept_.choosing;
    for (long image = 0; image < kept_.images; ++image) {
      const Alive before = choosing.before.of(image), after = choosing.after.of(image);
      if (kept_.chooses()) choose(image);
      const long rows = kept_.images * kept_.n, base = image * kept_.n;
      const long begin = share(rows, team_.rank, team_.size);
      const long end = share(rows, team_.rank + 1, team_.size);
      const long first = least(most(begin - base, 0), kept_.n);
      const long last = least(most(end - base, 0), kept_.n);
      if (kept_.chooses())
        gather(image, before, after, first, last);
      else
        keep_first(before, after, first, last);
      for (long k = first; choosing.kept != nullptr && k < last; ++k)
        choosing.kept[image * choosing.kept_image + k] = after.place[k];
    }
  }

 private:
  bool absorbs() const { return kept_.choosing->pack->shape.scores == Scores::attention; }

  // own_.choice: which tokens of an image are kept, and where the others go. How many that are is
  // kept_.n, or becomes it.
  void choose(long image) {
    const Stopwatch stopwatch(Phase::choosing);
    if (!absorbs()) {
      predict_scores(image);
      select(shared_.choice.score + kept_.choosing->prefix);
      return;
    }
    const Choosing& choosing = *kept_.choosing;
    const ChooserShape& how = choosing.pack->shape;
    const long m = kept_.m, row = image * m, to = image * kept_.n;
    const Tokens<T> tokens{m,
                           choosing.prefix,
                           shared_.kv + row * 2 * inner(),
                           shared_.keys + image * shape_.heads * packed_size(),
                           packed_size(),
                           shared_.q + to * inner(),
                           how.head_tokens,
                           shared_.y + row * width(),
                           shared_.y_kept + to * width()};
    const Absorb<S, T> absorb(tokens, shape_, shared_.choice, own_.choice);
    attend_scores(image, absorb);
    if (how.ragged()) kept_.n = m - absorb.count_below(candidates(), how.threshold);
    absorb.prune(candidates(), kept_.n);
    absorb.find_nearest(kept_.n);
    if (choosing.into != nullptr && team_.rank == 0)
      for (long i = 0; i < m - kept_.n; ++i) choosing.into[i] = own_.choice.into[i];
  }

  // Kept rows [first, last) of an image, averaged with what goes into them.
  void gather(long image, const Alive& before, const Alive& after, long first, long last) {
    const Stopwatch stopwatch(Phase::gathering);
    const long m = kept_.m, n = kept_.n, row = image * m, to = image * n;
    const Gathering<T> of{width(),
                          m,
                          n,
                          shared_.x + row * width(),
                          shared_.y + row * width(),
                          shared_.gathered + to * width(),
                          shared_.y_kept + to * width(),
                          before,
                          after};
    const std::int32_t* into = absorbs() ? own_.choice.into : nullptr;
    Gather<S, T, BlockPack>(of, pack_, own_.choice, into).run(first, last);
  }

  long candidates() const {
    const Choosing& choosing = *kept_.choosing;
    return candidates_of(choosing.pack->shape, kept_.m, kept_.n, choosing.prefix);
  }

  // Candidates, their scores, and their cosines, once all workers are done.
  void attend_scores(long image, const Absorb<S, T>& absorb) {
    const long m = kept_.m, row = image * m, head_tokens = kept_.choosing->pack->shape.head_tokens;
    const long rank = team_.rank, size = team_.size;
    absorb.measure_values(share(m, rank, size), share(m, rank + 1, size));
    absorb.pack(rank, size);
    // Again with all the others' later: the head's tokens are kept as they are.
    constexpr long kPanel = S::kVecs * S::kLanes;
    ask(shared_.y + row * width(), image * kept_.n, head_tokens, share(inner(), rank, size, kPanel),
        share(inner(), rank + 1, size, kPanel));
    team_.sync();
    logit_bias(image, m);
    absorb.weigh(own_.bias, own_.attention);
    absorb.find_candidates(candidates());
    absorb.score(share(candidates(), rank, size), share(candidates(), rank + 1, size));
    team_.sync();
  }

  // shared_.choice.score, once all workers are done.
  void predict_scores(long image) {
    const long m = kept_.m, row = image * m * width();
    const long begin = share(m, team_.rank, team_.size), end = share(m, team_.rank + 1, team_.size);
    predict<S, T>(*kept_.choosing->pack, shared_.x + row, begin, end, shared_.y_kept + row,
                  own_.attention.largest, shared_.choice.score);
    team_.sync();
  }

  // The prefix tokens and the patches of the highest scores.
  void select(const float* score) {
    const long prefix = kept_.choosing->prefix, patches = kept_.m - prefix;
    const OwnChoice<S, T>& own = own_.choice;
    for (long i = 0; i < patches; ++i) own.key[i] = ordered(score[i]);
    for (long k = 0; k < prefix; ++k) own.index[k] = static_cast<std::int32_t>(k);
    part_highest(own.key, patches, kept_.n - prefix, static_cast<std::int32_t>(prefix),
                 own.index + prefix, own.pruned);
  }
};

}  // namespace
}  // namespace slimvit
