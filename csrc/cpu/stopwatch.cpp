#include "cpu/stopwatch.h"

#include <atomic>
#include <chrono>

namespace slimvit {
namespace {

std::atomic<std::int64_t> times[static_cast<int>(Phase::count)];

}  // namespace

bool profiling = false;

const char* name(Phase phase) {
  constexpr const char* kNames[] = {"embedding", "keys_values", "packing", "choosing", "gathering",
                                    "queries",   "logits",      "softmax", "values",   "projection",
                                    "norm2",     "fc1",         "fc2",     "waiting",  "head"};
  static_assert(sizeof(kNames) / sizeof(*kNames) == static_cast<int>(Phase::count));
  return kNames[static_cast<int>(phase)];
}

std::int64_t nanoseconds() {
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration_cast<std::chrono::nanoseconds>(now).count();
}

void add_time(Phase phase, std::int64_t nanoseconds) {
  times[static_cast<int>(phase)].fetch_add(nanoseconds, std::memory_order_relaxed);
}

std::int64_t take_time(Phase phase) { return times[static_cast<int>(phase)].exchange(0); }

}  // namespace slimvit
