#pragma once

#include <cstdint>

#include "cpu/inline.h"

namespace slimvit {

// Parts of a forward pass whose time is told apart where a profile is asked for.
enum class Phase {
  embedding,
  keys_values,
  packing,
  choosing,
  gathering,
  queries,
  logits,
  softmax,
  values,
  projection,
  norm2,
  fc1,
  fc2,
  waiting,
  head,
  count
};

const char* name(Phase phase);

extern bool profiling;  // whether stopwatches run; off, they cost one test each

std::int64_t nanoseconds();  // of a clock that never goes back
void add_time(Phase phase, std::int64_t nanoseconds);
std::int64_t take_time(Phase phase);  // summed over all threads; starts again at 0

// Counts the time until the end of its scope.
class Stopwatch {
 public:
  SLIMVIT_INLINE explicit Stopwatch(Phase phase)
      : phase_(phase), start_(__atomic_load_n(&profiling, __ATOMIC_RELAXED) ? nanoseconds() : 0) {}
  SLIMVIT_INLINE ~Stopwatch() {
    if (start_ != 0) add_time(phase_, nanoseconds() - start_);
  }
  Stopwatch(const Stopwatch&) = delete;
  Stopwatch& operator=(const Stopwatch&) = delete;

 private:
  const Phase phase_;
  const std::int64_t start_;
};

}  // namespace slimvit
