#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/packs.h"
#ifdef SLIMVIT_SANITIZED
#include <sanitizer/asan_interface.h>
#endif

namespace slimvit {
namespace {

// Memory that is about to be handed out in parts. Where memory is checked, it is NaN again, so that
// a number that was never written shows in the answer, and has no fences of an earlier call.
inline void renew([[maybe_unused]] char* begin, [[maybe_unused]] std::size_t bytes) {
#ifdef SLIMVIT_SANITIZED
  ASAN_UNPOISON_MEMORY_REGION(begin, bytes);
  __builtin_memset(begin, 0xff, bytes);
#endif
}

// Hands out parts of one buffer, each at the start of a cache line and with a vector to spare
// behind it. Without a buffer it only counts.
class Parts {
 public:
  explicit Parts(char* base) : base_(base) {}

  template <typename U>
  U* take(long count) {
    U* part = base_ == nullptr ? nullptr : reinterpret_cast<U*>(base_ + used_);
    const auto bytes = static_cast<std::int64_t>(sizeof(U)) * count + kAlignment;
    used_ += (bytes + kAlignment - 1) / kAlignment * kAlignment;
    fence();
    return part;
  }
  std::int64_t used() const { return used_; }

 private:
  // Where memory is checked, one part's end is not the next one's start.
  void fence() {
#ifdef SLIMVIT_SANITIZED
    constexpr std::int64_t kFence = 4096;
    if (base_ != nullptr) ASAN_POISON_MEMORY_REGION(base_ + used_, kFence);
    used_ += kFence;
#endif
  }

  char* base_;
  std::int64_t used_ = 0;
};

// The same for a pack, by offsets from its header.
class Sections {
 public:
  explicit Sections(std::int64_t header) : used_(up(header)) {}

  template <typename U>
  std::int64_t take(long count) {
    const std::int64_t offset = used_;
    used_ = up(used_ + static_cast<std::int64_t>(sizeof(U)) * count);
    return offset;
  }
  std::int64_t used() const { return used_; }

 private:
  static std::int64_t up(std::int64_t n) { return (n + kAlignment - 1) / kAlignment * kAlignment; }
  std::int64_t used_;
};

template <typename U, class Pack>
const U* section(const Pack& pack, std::int64_t offset) {
  return offset == 0 ? nullptr
                     : reinterpret_cast<const U*>(reinterpret_cast<const char*>(&pack) + offset);
}

template <typename U>
U* section(void* pack, std::int64_t offset) {
  return reinterpret_cast<U*>(static_cast<char*>(pack) + offset);
}

}  // namespace
}  // namespace slimvit
