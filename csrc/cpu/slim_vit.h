#pragma once

#include "cpu/selector.h"
#include "cpu/slim_block.h"

// A whole network: patch embedding, blocks, final norm and head, one group of images at a time.

namespace slimvit {
namespace {

constexpr long kGroupRows = 48;  // images share a pass over the weights while they have fewer rows

template <class S, typename T>
class Network {
 public:
  Network(const NetworkCall& call, const Team& team, char* shared, char* own)
      : call_(call), team_(team), shape_(call.blocks[0]->shape), in_(call.embedding->shape) {
    Parts own_parts(own);
    const Choices choices = all_choices();
    own_ = Own<S, T>::make(own_parts, in_.tokens, choices, shape_);
    own_used_ = own_parts.used();
    lay_out(shared, choices);
  }

  // Bytes that a team needs, and each of its workers.
  std::int64_t memory() const { return used_; }
  std::int64_t own_memory() const { return own_used_; }

  void run(long first, long count) {
    for (long done = 0; done < count; done += call_.chunk)
      chunk(first + done, least(call_.chunk, count - done));
  }

 private:
  long width() const { return shape_.width; }
  bool chooses() const { return call_.choosers != nullptr; }
  long alive(long layer) const {
    return layer == 0 || call_.idle ? in_.tokens : call_.counts[layer - 1];
  }
  const SelectorPack* selector(long layer) const {
    return chooses() ? call_.selectors[layer] : nullptr;
  }
  // Rows that an image has after the blocks.
  long rows_out() const { return call_.idle ? in_.tokens : call_.counts[call_.depth - 1]; }

  // Images that go through a block together: one, until their kept rows are too few to be worth
  // reading the weights for. Never shrinks from block to block, since kept rows never grow. One
  // throughout where images keep numbers of their own.
  long group(long layer, long count) const {
    if (call_.idle || call_.ragged || team_.size > 1) return 1;
    return most(1, least(count, kGroupRows / call_.counts[layer]));
  }

  Choices all_choices() const {
    Choices choices;
    for (long layer = 0; chooses() && layer < call_.depth; ++layer) {
      const long m = alive(layer);
      choices.add(call_.choosers[layer], m, call_.counts[layer], in_.prefix);
      if (selector(layer) != nullptr) choices.selected = most(choices.selected, m);
    }
    return choices;
  }

  void lay_out(char* shared, const Choices& choices) {
    const long count = call_.chunk;
    Parts parts(shared);
    chunk_ = parts.take<float>(count * in_.tokens * width());
    result_ = parts.take<float>(count * Panels<S, T>::columns(call_.head->shape.classes));
    patches_ = parts.take<T>(in_.tokens * Panels<S, T>::depth(in_.patch()));
    long rows = count, keys = 0;
    for (long layer = 0; layer < call_.depth; ++layer) {
      const long images = group(layer, count), m = alive(layer);
      rows = most(rows, images * m);
      keys = most(keys, images * Panels<S, T>::columns(m + 1));
    }
    shared_ = Shared<T>::make(parts, rows, keys, choices, shape_);
    for (Alive& alive : alive_)
      if (chooses())
        alive = {parts.take<std::int32_t>(count * in_.tokens),
                 parts.take<float>(count * in_.tokens), parts.take<float>(count * in_.tokens),
                 parts.take<float>(count * in_.tokens), in_.tokens};
    used_ = parts.used();
  }

  // Images of one chunk: blocks in stages of equal group size, so that most stay in the cache.
  void chunk(long first, long count) {
    for (long layer = 0; layer < call_.depth;) {
      const long g = group(layer, count);
      long end = layer + 1;
      while (end < call_.depth && group(end, count) == g) ++end;
      const long m = alive(layer), n = call_.idle ? in_.tokens : call_.counts[end - 1];
      for (long image = 0; image < count; image += g) {
        const long images = least(g, count - image);
        if (layer == 0 && chooses() && team_.rank == 0) enter(image, images);
        if (layer == 0)
          embed(first + image, images);
        else
          move(chunk_ + image * m * width(), shared_.x, images * m);
        rows_ = m;
        for (long l = layer; l < end; ++l) block(l, first, image, images);
        move(shared_.x, chunk_ + image * n * width(), images * n);
      }
      layer = end;
    }
    answer(first, count);
  }

  // Images of the chunk through a block; those of the call start at `first`.
  void block(long layer, long first, long image, long images) {
    if (selector(layer) != nullptr) select(*selector(layer), alive_[layer % 2].of(image), images);
    long n = least(rows_, call_.counts[layer]);
    Kept kept{images, rows_, n, nullptr, nullptr, 0, nullptr};
    Choosing choosing{};
    if (chooses()) {
      long total = 0, before = 0;
      for (long l = 0; l < call_.depth; ++l) {
        if (l < layer) before += call_.counts[l];
        total += call_.counts[l];
      }
      // Every block reads one set and writes the other.
      choosing = {call_.choosers[layer],
                  in_.prefix,
                  alive_[layer % 2].of(image),
                  alive_[1 - layer % 2].of(image),
                  call_.kept + (first + image) * total + before,
                  total,
                  nullptr};
      kept.bias = choosing.before.bias;
      kept.bias_image = choosing.before.ld;
      kept.choosing = &choosing;
    }
    n = Block<S, T>(*call_.blocks[layer], kept, team_, shared_, own_).run();
    for (long i = n; call_.ragged && team_.rank == 0 && i < call_.counts[layer]; ++i)
      choosing.kept[i] = -1;
    if (!call_.idle) rows_ = n;
  }

  // What a selector leaves of the images' rows, whose tokens are `alive`.
  void select(const SelectorPack& pack, const Alive& alive, long images) {
    const auto package = static_cast<std::int32_t>(in_.tokens) + pack.shape.packages;
    long left = 0;
    for (long image = 0; image < images; ++image) {
      const Selecting of{rows_,
                         in_.prefix,
                         package,
                         shared_.x + image * rows_ * width(),
                         shared_.gathered + image * left * width(),
                         alive.of(image)};
      left = Selection<S, T>(pack, of, team_, shared_.selection, own_.selection).run();
    }
    team_.sync();
    float* old = shared_.x;
    shared_.x = shared_.gathered;
    shared_.gathered = old;
    rows_ = left;
  }

  // Before the first block every token stands for itself, in its own place.
  void enter(long image, long images) const {
    for (long i = image * in_.tokens; i < (image + images) * in_.tokens; ++i) {
      alive_[0].place[i] = static_cast<std::int32_t>(i % in_.tokens);
      alive_[0].size[i] = 1.0f;
      alive_[0].bias[i] = 0.0f;
      alive_[0].spread[i] = 0.0f;
    }
  }

  // The workers' shares of some rows; all are done when it returns.
  void move(const float* from, float* to, long rows) const {
    const long begin = share(rows, team_.rank, team_.size);
    const long end = share(rows, team_.rank + 1, team_.size);
    copy_floats(from + begin * width(), (end - begin) * width(), to + begin * width());
    team_.sync();
  }

  // Z_0 in lifetime order: what each token starts from, plus its patch times the weights.
  void embed(long first, long images) {
    const Stopwatch stopwatch(Phase::embedding);
    const EmbeddingPack& pack = *call_.embedding;
    const float* table = section<float>(pack, pack.table);
    const long tokens = in_.tokens, depth = Panels<S, T>::depth(in_.patch());
    const auto columns = panels<S, T>(section<T>(pack, pack.weight), width(), in_.patch());
    const long begin = share(tokens, team_.rank, team_.size);
    const long end = share(tokens, team_.rank + 1, team_.size);
    for (long image = 0; image < images; ++image) {
      if (call_.images_dtype == Dtype::float32)
        read_patches(static_cast<const float*>(call_.images), first + image);
      else
        read_patches(static_cast<const bf16*>(call_.images), first + image);
      team_.sync();
      float* x = shared_.x + image * tokens * width();
      copy_floats(table + begin * width(), (end - begin) * width(), x + begin * width());
      Accumulate<S> add{{nullptr}, x + begin * width(), width()};
      gemm(patches_ + begin * depth, depth, end - begin, columns, add);
      if (pack.norm.weight != 0)
        norm(pack, x + begin * width(), width(), end - begin, x + begin * width());
      team_.sync();
    }
  }

  // The worker's share of an image as rows of patches in lifetime order, zero for prefix tokens.
  // The image is read as it lies in memory, which the processor foresees; the patches scatter, and
  // their lines are fetched two rows ahead.
  template <typename In>
  void read_patches(const In* images, long image) const {
    const auto* tokens = section<std::int32_t>(*call_.embedding, call_.embedding->place);
    const std::int32_t* place = tokens + in_.prefix;
    const long depth = Panels<S, T>::depth(in_.patch());
    const long down = share(in_.rows(), team_.rank, team_.size);
    const long below = share(in_.rows(), team_.rank + 1, team_.size);
    for (long c = 0; c < in_.channels; ++c)
      for (long y = down * in_.patch_height; y < below * in_.patch_height; ++y) {
        const In* row =
            images + ((image * in_.channels + c) * in_.image_height + y) * in_.image_width;
        const std::int32_t* places = place + y / in_.patch_height * in_.columns();
        T* to = patches_ + (c * in_.patch_height + y % in_.patch_height) * in_.patch_width;
        for (long i = 0; i < in_.columns(); ++i, row += in_.patch_width) {
          __builtin_prefetch(to + places[i] * depth + 2 * in_.patch_width, 1);
          read_row(row, to + places[i] * depth);
        }
      }
    for (long t = team_.rank; t < in_.prefix; t += team_.size)
      for (long i = 0; i < depth; ++i) narrow(0.0f, patches_[tokens[t] * depth + i]);
    if (depth > in_.patch())
      for (long i = down * in_.columns(); i < below * in_.columns(); ++i)
        narrow(0.0f, patches_[place[i] * depth + in_.patch()]);
  }

  template <typename In>
  void read_row(const In* row, T* out) const {
    long i = 0;
    for (; i + S::kLanes <= in_.patch_width; i += S::kLanes) S::store(out + i, S::load(row + i));
    for (; i < in_.patch_width; ++i) narrow(widen(row[i]), out[i]);
  }

  template <class Pack, typename Out>
  void norm(const Pack& pack, const float* x, long ldx, long rows, Out* y) const {
    layer_norm<S>(x, ldx, rows, width(), section<float>(pack, pack.norm.weight),
                  section<float>(pack, pack.norm.bias), Scale{pack.norm.eps}, y, width());
  }

  // `rows` rows of the chunk, `ldx` apart, after the final norm if there is one.
  template <typename Out>
  void final_norm(const float* x, long ldx, long rows, Out* y) const {
    const HeadPack& pack = *call_.head;
    if (pack.norm.weight != 0) return norm(pack, x, ldx, rows, y);
    for (long r = 0; r < rows; ++r)
      for (long c = 0; c < width(); c += S::kLanes)
        S::store(y + r * width() + c, S::load(x + r * ldx + c));
  }

  void answer(long first, long count) {
    const Stopwatch stopwatch(Phase::head);
    const long rows = rows_out();
    if (call_.tokens) {
      const long begin = share(count * rows, team_.rank, team_.size);
      const long end = share(count * rows, team_.rank + 1, team_.size);
      final_norm(chunk_ + begin * width(), width(), end - begin,
                 call_.out + (first * rows + begin) * width());
    } else if (team_.rank == 0) {
      logits(first, count, rows);
    }
    team_.sync();
  }

  void logits(long first, long count, long rows) {
    const HeadPack& pack = *call_.head;
    const long classes = pack.shape.classes, ld = Panels<S, T>::columns(classes);
    for (long i = 0; i < count * ld; ++i) result_[i] = 0.0f;
    for (int head = 0; head < pack.shape.heads; ++head) {
      final_norm(chunk_ + head * width(), rows * width(), count, shared_.y);
      const Linear& linear = pack.linear[head];
      Accumulate<S> add{{section<float>(pack, linear.bias)}, result_, ld};
      gemm(shared_.y, width(), count,
           panels<S, T>(section<T>(pack, linear.weight), classes, width()), add);
    }
    for (long i = 0; i < count; ++i)
      copy_floats(result_ + i * ld, classes, call_.out + (first + i) * classes);
  }

  const NetworkCall& call_;
  const Team team_;
  const BlockShape& shape_;
  const EmbeddingShape& in_;
  float *chunk_, *result_;
  T* patches_;
  Alive alive_[2] = {};  // of the images of a chunk
  Shared<T> shared_;
  Own<S, T> own_;
  long rows_ = 0;  // of each of the images that are going through a block
  std::int64_t used_, own_used_;
};

template <class S, typename T>
std::int64_t network_memory(const NetworkCall& call) {
  return Network<S, T>(call, Team{}, nullptr, nullptr).memory();
}

template <class S, typename T>
std::int64_t network_own_memory(const NetworkCall& call) {
  return Network<S, T>(call, Team{}, nullptr, nullptr).own_memory();
}

template <class S, typename T>
void network(const NetworkCall& call, long first, long count, const Team& team, char* shared,
             char* own) {
  Network<S, T>(call, team, shared, own).run(first, count);
}

}  // namespace
}  // namespace slimvit
