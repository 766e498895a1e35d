#pragma once

#include "cpu/slim_block.h"

// One block as an op: images one after another, each with all workers of the team.

namespace slimvit {
namespace {

template <class S, typename T>
class BlockOp {
 public:
  BlockOp(const BlockCall& call, const Team& team, char* shared, char* own)
      : call_(call), team_(team) {
    Parts shared_parts(shared), own_parts(own);
    const BlockShape& shape = call.pack->shape;
    const long rows = most(call.m, call.n);  // an index may name a row more than once
    Choices choices;
    choices.add(call.chooser, call.m, call.n, call.prefix);
    shared_ =
        Shared<T>::make(shared_parts, rows, Panels<S, T>::columns(call.m + 1), choices, shape);
    for (Alive& alive : alive_)
      if (call.chooser != nullptr)
        alive = {shared_parts.take<std::int32_t>(call.m), shared_parts.take<float>(call.m),
                 shared_parts.take<float>(call.m), shared_parts.take<float>(call.m), call.m};
    own_ = Own<S, T>::make(own_parts, call.m, choices, shape);
    used_ = shared_parts.used();
    own_used_ = own_parts.used();
  }

  // Bytes that a team needs, and each of its workers.
  std::int64_t memory() const { return used_; }
  std::int64_t own_memory() const { return own_used_; }

  void run(long image) {
    const long width = call_.pack->shape.width;
    each(call_.m, [&](long t) {
      copy_floats(call_.x + image * call_.x_image + t * call_.x_token, width,
                  shared_.x + t * width);
      if (call_.chooser != nullptr) enter(image, t);
    });
    team_.sync();
    const Choosing choosing = choosing_of(image);
    const bool chooses = call_.chooser != nullptr;
    const float* bias =
        call_.key_bias == nullptr ? nullptr : call_.key_bias + image * call_.bias_image;
    const Kept kept{1,
                    call_.m,
                    call_.n,
                    call_.index == nullptr ? nullptr : call_.index + image * call_.n,
                    chooses ? alive_[0].bias : bias,
                    0,
                    chooses ? &choosing : nullptr};
    Block<S, T>(*call_.pack, kept, team_, shared_, own_).run();
    each(call_.n, [&](long t) {
      copy_floats(shared_.x + t * width, width,
                  call_.out + image * call_.out_image + t * call_.out_token);
      if (!chooses) return;
      call_.size_out[image * call_.n + t] = alive_[1].size[t];
      call_.spread_out[image * call_.n + t] = alive_[1].spread[t];
    });
    team_.sync();
  }

 private:
  template <class Fn>
  void each(long count, Fn fn) const {
    const long end = share(count, team_.rank + 1, team_.size);
    for (long i = share(count, team_.rank, team_.size); i < end; ++i) fn(i);
  }

  void enter(long image, long t) const {
    const float size = call_.size == nullptr ? 1.0f : call_.size[image * call_.m + t];
    alive_[0].place[t] = static_cast<std::int32_t>(t);
    alive_[0].size[t] = size;
    alive_[0].bias[t] = __builtin_logf(size);
    alive_[0].spread[t] = call_.spread == nullptr ? 0.0f : call_.spread[image * call_.m + t];
  }

  Choosing choosing_of(long image) const {
    return {call_.chooser,
            call_.prefix,
            alive_[0],
            alive_[1],
            call_.kept == nullptr ? nullptr : call_.kept + image * call_.n,
            0,
            call_.into == nullptr ? nullptr : call_.into + image * (call_.m - call_.n)};
  }

  const BlockCall& call_;
  const Team team_;
  Shared<T> shared_;
  Alive alive_[2] = {};
  Own<S, T> own_;
  std::int64_t used_, own_used_;
};

template <class S, typename T>
std::int64_t block_memory(const BlockCall& call) {
  return BlockOp<S, T>(call, Team{}, nullptr, nullptr).memory();
}

template <class S, typename T>
std::int64_t block_own_memory(const BlockCall& call) {
  return BlockOp<S, T>(call, Team{}, nullptr, nullptr).own_memory();
}

template <class S, typename T>
void block(const BlockCall& call, long first, long count, const Team& team, char* shared,
           char* own) {
  BlockOp<S, T> op(call, team, shared, own);
  for (long image = first; image < first + count; ++image) op.run(image);
}

}  // namespace
}  // namespace slimvit
