#pragma once

#include "cpu/selector.h"

// One selector as an op: images one after another, each with all workers of the team.

namespace slimvit {
namespace {

template <class S, typename T>
class SelectOp {
 public:
  SelectOp(const SelectCall& call, const Team& team, char* shared, char* own)
      : call_(call), team_(team) {
    Parts shared_parts(shared), own_parts(own);
    const long m = call.m;
    x_ = shared_parts.take<float>(m * width());
    out_ = shared_parts.take<float>(m * width());
    alive_ = {shared_parts.take<std::int32_t>(m), shared_parts.take<float>(m),
              shared_parts.take<float>(m), shared_parts.take<float>(m), m};
    shared_ = SharedSelection<T>::make(shared_parts, m, width());
    own_ = OwnSelection<S, T>::make(own_parts, m, width());
    used_ = shared_parts.used();
    own_used_ = own_parts.used();
  }

  // Bytes that a team needs, and each of its workers.
  std::int64_t memory() const { return used_; }
  std::int64_t own_memory() const { return own_used_; }

  void run(long image) {
    each(call_.m, [&](long t) {
      copy_floats(call_.x + image * call_.x_image + t * call_.x_token, width(), x_ + t * width());
      alive_.place[t] = static_cast<std::int32_t>(t);
      alive_.size[t] = 1.0f;
      alive_.bias[t] = 0.0f;
      alive_.spread[t] = 0.0f;
    });
    team_.sync();
    const auto package = static_cast<std::int32_t>(call_.m);
    const Selecting of{call_.m, call_.prefix, package, x_, out_, alive_};
    Selection<S, T>(*call_.pack, of, team_, shared_, own_).run();
    team_.sync();
    each(call_.n, [&](long t) {
      copy_floats(out_ + t * width(), width(),
                  call_.out + image * call_.out_image + t * call_.out_token);
      call_.place[image * call_.n + t] = alive_.place[t];
    });
    team_.sync();
  }

 private:
  long width() const { return call_.pack->shape.width; }

  template <class Fn>
  void each(long count, Fn fn) const {
    const long end = share(count, team_.rank + 1, team_.size);
    for (long i = share(count, team_.rank, team_.size); i < end; ++i) fn(i);
  }

  const SelectCall& call_;
  const Team team_;
  float *x_, *out_;
  Alive alive_;
  SharedSelection<T> shared_;
  OwnSelection<S, T> own_;
  std::int64_t used_, own_used_;
};

template <class S, typename T>
std::int64_t select_memory(const SelectCall& call) {
  return SelectOp<S, T>(call, Team{}, nullptr, nullptr).memory();
}

template <class S, typename T>
std::int64_t select_own_memory(const SelectCall& call) {
  return SelectOp<S, T>(call, Team{}, nullptr, nullptr).own_memory();
}

template <class S, typename T>
void select(const SelectCall& call, long first, long count, const Team& team, char* shared,
            char* own) {
  SelectOp<S, T> op(call, team, shared, own);
  for (long image = first; image < first + count; ++image) op.run(image);
}

}  // namespace
}  // namespace slimvit
