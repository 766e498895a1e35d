// Matrix instructions: ldmatrix and mma.m16n8k16 as PTX lays them out, and wmma.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "block.h"
#include "halves.h"
#include "shared.h"

namespace slimvit {
namespace emulation {

// Sums of products as tensor cores make them: exact within a group, then cut to float32.
float accumulate(float c, const float* a, const float* b, int stride_a, int stride_b);

}  // namespace emulation

template <bool transposed, class T>
void load_matrices(unsigned (&to)[4], Shared<T> row) {
  struct Lane {
    unsigned* to;
    std::size_t row;
  } mine{to, row.offset()};
  emulation::together("ldmatrix", &mine, [](void* const* lanes) {
    std::uint16_t matrices[4][8][8];
    for (int l = 0; l < 32; ++l) {
      const std::size_t row = static_cast<Lane*>(lanes[l])->row;
      emulation::note_read_by(l, row, 16);
      std::memcpy(matrices[l / 8][l % 8], emulation::memory() + row, 16);
    }
    for (int l = 0; l < 32; ++l) {
      for (int m = 0; m < 4; ++m) {
        std::uint16_t pair[2];
        for (int i = 0; i < 2; ++i) {
          const int r = l / 4, c = l % 4 * 2 + i;
          pair[i] = transposed ? matrices[m][c][r] : matrices[m][r][c];
        }
        std::memcpy(static_cast<Lane*>(lanes[l])->to + m, pair, 4);
      }
    }
  });
}

template <class T>
float half_of(unsigned packed, int i) {
  T parts[2];
  std::memcpy(parts, &packed, 4);
  return to_float(parts[i]);
}

// mma.m16n8k16 as PTX lays it out.
template <class T>
void multiply(float* c, const unsigned (&a)[4], unsigned b0, unsigned b1) {
  struct Lane {
    float* c;
    const unsigned* a;
    unsigned b[2];
  } mine{c, a, {b0, b1}};
  emulation::together("mma", &mine, [](void* const* lanes) {
    float a[16][16], b[8][16];
    for (int l = 0; l < 32; ++l) {
      const Lane& lane = *static_cast<Lane*>(lanes[l]);
      for (int i = 0; i < 8; ++i) {
        a[l / 4 + i / 2 % 2 * 8][l % 4 * 2 + i % 2 + i / 4 * 8] = half_of<T>(lane.a[i / 2], i % 2);
      }
      for (int i = 0; i < 4; ++i) {
        b[l / 4][l % 4 * 2 + i % 2 + i / 2 * 8] = half_of<T>(lane.b[i / 2], i % 2);
      }
    }
    for (int l = 0; l < 32; ++l) {
      for (int i = 0; i < 4; ++i) {
        float& c = static_cast<Lane*>(lanes[l])->c[i];
        c = emulation::accumulate(c, a[l / 4 + i / 2 * 8], b[l % 4 * 2 + i % 2], 1, 1);
      }
    }
  });
}

namespace wmma {

struct matrix_a;
struct matrix_b;
struct accumulator;
struct row_major;
struct col_major;
constexpr int mem_row_major = 0;

// Which number, row by row, element i of a lane has: CUDA does not say, and no kernel may rely on
// it, so lanes come in an order in which no kernel writes what wmma reads.
inline int element(int i, int lane) { return 32 * i + (11 * lane + 5) % 32; }

template <class Use, int m, int n, int k, class T, class Layout = row_major>
struct fragment {
  static constexpr int num_elements = 8;
  T x[num_elements];
};

template <class F, class T>
void load_matrix_sync(F& to, Shared<T> from, int stride, bool by_columns) {
  struct Lane {
    F* to;
  } mine{&to};
  const std::size_t start = from.offset();
  if (start % 32 != 0 || stride * sizeof(T) % 16 != 0) {
    emulation::fail("a wmma matrix must start at a multiple of 32 bytes, and its rows of 16");
  }
  emulation::together("wmma load", &mine, [=](void* const* lanes) {
    for (int l = 0; l < 32; ++l) {
      for (int i = 0; i < 8; ++i) {
        const int row = element(i, l) / 16, column = element(i, l) % 16;
        const int at = by_columns ? column * stride + row : row * stride + column;
        emulation::note_read_by(l ^ 1, start + at * sizeof(T), sizeof(T));  // whose it may be
        std::memcpy(&static_cast<Lane*>(lanes[l])->to->x[i],
                    emulation::memory() + start + at * sizeof(T), sizeof(T));
      }
    }
  });
}

template <class Use, class T, class Layout>
void load_matrix_sync(fragment<Use, 16, 16, 16, T, Layout>& to, Shared<T> from, int stride) {
  load_matrix_sync(to, from, stride, std::is_same<Layout, col_major>::value);
}

inline void load_matrix_sync(fragment<accumulator, 16, 16, 16, float>& to, Shared<float> from,
                             int stride, int) {
  load_matrix_sync(to, from, stride, false);
}

inline void store_matrix_sync(Shared<float> to,
                              const fragment<accumulator, 16, 16, 16, float>& from, int stride,
                              int) {
  const int lane = emulation::thread_index().x % 32;
  for (int i = 0; i < 8; ++i) {
    to[element(i, lane) / 16 * stride + element(i, lane) % 16] = from.x[i];
  }
}

template <class F>
void fill_fragment(F& to, float value) {
  for (auto& x : to.x) x = value;
}

template <class C, class A, class B>
void mma_sync(C& to, const A& a, const B& b, const C& c) {
  struct Lane {
    C* to;
    const A* a;
    const B* b;
    const C* c;
  } mine{&to, &a, &b, &c};
  emulation::together("wmma", &mine, [](void* const* lanes) {
    float a[16][16], b[16][16];
    for (int l = 0; l < 32; ++l) {
      const Lane& lane = *static_cast<Lane*>(lanes[l]);
      for (int i = 0; i < 8; ++i) {
        a[element(i, l) / 16][element(i, l) % 16] = to_float(lane.a->x[i]);
        b[element(i, l) / 16][element(i, l) % 16] = to_float(lane.b->x[i]);
      }
    }
    for (int l = 0; l < 32; ++l) {
      const Lane& lane = *static_cast<Lane*>(lanes[l]);
      for (int i = 0; i < 8; ++i) {
        const int row = element(i, l) / 16, column = element(i, l) % 16;
        lane.to->x[i] = emulation::accumulate(lane.c->x[i], a[row], b[0] + column, 1, 16);
      }
    }
  });
}

}  // namespace wmma

}  // namespace slimvit
