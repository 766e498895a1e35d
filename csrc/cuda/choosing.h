// The n highest scores of an image, without sorting them: all threads of a block together find the
// n-th highest, bit by bit from its first on, by counting how many scores reach that far.
#pragma once

#include "cuda/device.h"

namespace slimvit {

constexpr int kMostThreads = 1024;

// Of a block that chooses among m tokens.
inline int choosing_threads(int m) {
  const int threads = ceil_div(m, 32) * 32;
  return threads < kMostThreads ? threads : kMostThreads;
}

// Of shared memory, for `Choosing`.
inline int choosing_bytes(int m) { return ceil_div(m * 4, 32) * 32 + 2 * ceil_div(m, 256) * 32; }

// Scores as integers of the same order, NaN as the lowest of them.
__device__ inline unsigned ordered(float score) {
  if (score == 0) score = 0;  // one zero, not two
  unsigned bits;
  memcpy(&bits, &score, 4);
  if (score != score) bits = 0xff800000;  // minus infinity
  return bits >> 31 ? ~bits : bits | 0x80000000;
}

// A flag for each token, 32 to a word.
struct Flags {
  Shared<unsigned> words;

  // All lanes of a warp, for 32 tokens in a row, of which `token` is the lane's.
  __device__ void set(int token, int m, bool flag) {
    const unsigned word = __ballot_sync(~0u, token < m && flag);
    if (threadIdx.x % 32 == 0 && token < m) words[token / 32] = word;
  }
  __device__ bool at(int token) const { return words[token / 32] >> token % 32 & 1; }
  // How many are set before that of `token`.
  __device__ int before(int token) const {
    int count = __popc(words[token / 32] & ((1u << token % 32) - 1));
    for (int i = 0; i < token / 32; ++i) count += __popc(words[i]);
    return count;
  }
};

struct Choosing {
  int m;
  Shared<unsigned> keys;
  Flags equal, kept;

  __device__ Choosing(Shared<unsigned char>& memory, int m)
      : m(m),
        keys(carve<unsigned>(memory, m)),
        equal{carve<unsigned>(memory, (m + 31) / 32)},
        kept{carve<unsigned>(memory, (m + 31) / 32)} {}

  // Each thread gives the scores of the tokens that are its own in `choose`.
  __device__ void take(int token, int prefix, float score) {
    keys[token] = token < prefix ? 0xfffffffe : ordered(score);  // more than any score
  }

  __device__ int count_from(unsigned least) const {
    int count = 0;
    for (int first = 0; first < m; first += blockDim.x) {
      const int token = first + threadIdx.x;
      count += __syncthreads_count(token < m && keys[token] >= least);
    }
    return count;
  }

  // Sets `kept` for the n highest keys, among equal ones for the earlier. Whole blocks call it.
  __device__ void choose(int n) {
    unsigned least = 0;
    for (int bit = 31; bit >= 0; --bit) {
      const unsigned candidate = least | 1u << bit;
      if (count_from(candidate) >= n) least = candidate;
    }
    const int room = n - count_from(least + 1);
    for (int token = threadIdx.x; token - int(threadIdx.x) < m; token += blockDim.x) {
      equal.set(token, m, token < m && keys[token] == least);
    }
    __syncthreads();
    for (int token = threadIdx.x; token - int(threadIdx.x) < m; token += blockDim.x) {
      bool keep = token < m && keys[token] > least;
      if (token < m && keys[token] == least) keep = equal.before(token) < room;
      kept.set(token, m, keep);
    }
    __syncthreads();
  }

  // Positions of the kept, ascending.
  __device__ void write(std::int64_t* index) const {
    for (int token = threadIdx.x; token < m; token += blockDim.x) {
      if (kept.at(token)) index[kept.before(token)] = token;
    }
  }
};

}  // namespace slimvit
