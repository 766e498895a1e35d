#pragma once

// For what files of several instruction sets share: a copy of its own in each of them, which the
// linker cannot take for another's, however little the compiler inlines.
#define SLIMVIT_INLINE inline __attribute__((always_inline))
