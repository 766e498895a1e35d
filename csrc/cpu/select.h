#pragma once

#include "cpu/numbers.h"

// The highest of some scores without sorting them.

namespace slimvit {
namespace {

// An integer that is ordered as scores are: NaN counts as the lowest, and -0 as 0.
SLIMVIT_INLINE std::int32_t ordered(float x) {
  x = x == x ? x + 0.0f : -__builtin_inff();
  std::int32_t bits;
  __builtin_memcpy(&bits, &x, sizeof(bits));
  return bits ^ ((bits >> 31) & 0x7fffffff);
}

inline std::int32_t count_from(const std::int32_t* key, long count, std::int32_t least) {
  std::int32_t above = 0;
  for (long i = 0; i < count; ++i) above += key[i] >= least;
  return above;
}

// Parts [0, count) into the places of the `wanted` highest keys, among equals the earlier, and the
// others, both ascending and counted from `first`.
inline void part_highest(const std::int32_t* key, long count, long wanted, std::int32_t first,
                         std::int32_t* highest, std::int32_t* others) {
  // At least `wanted` keys reach `low`, and fewer reach `high`.
  std::int64_t low = INT32_MIN, high = std::int64_t{INT32_MAX} + 1;
  long reach = count;
  while (reach != wanted && high - low > 1) {
    const std::int64_t middle = (low + high) >> 1;
    const long these = count_from(key, count, static_cast<std::int32_t>(middle));
    if (these >= wanted) {
      low = middle;
      reach = these;
    } else {
      high = middle;
    }
  }
  long equal = wanted;  // that many of those equal to `low` are taken, the earlier ones
  if (reach != wanted) equal -= high > INT32_MAX ? 0 : count_from(key, count, low + 1);
  long taken = 0, left = 0;
  for (long i = 0; i < count; ++i) {
    const bool is_equal = key[i] == low;
    const bool take = key[i] > low || (is_equal && equal > 0);
    equal -= is_equal;
    highest[taken] = others[left] = first + static_cast<std::int32_t>(i);
    taken += take;
    left += !take;
  }
}

}  // namespace
}  // namespace slimvit
