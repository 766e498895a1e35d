// CUDA for a host without a GPU: the kernels of csrc/cuda compile as plain C++ behind this header.
//
// A block's threads are fibers, which run in turns until they meet a barrier or an instruction of
// the whole warp. Shared memory starts as NaN and knows who wrote and read each half-word since
// which barrier: reading what nothing wrote, what another thread wrote with no barrier between, or
// what a copy has yet to bring is an error, and so is writing over it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)

struct uint4 {
  unsigned x, y, z, w;
};

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace slimvit {
namespace emulation {

// The thread that runs now.
const dim3& thread_index();
const dim3& block_index();
const dim3& block_size();

unsigned char* memory();
void barrier();
// A barrier of the block, and for how many of its threads something holds.
int count(bool holds);
void warp_barrier();
// Runs `all` once the 32 lanes of the warp have come here, with what each brought.
void together(const char* name, void* mine, const std::function<void(void* const*)>& all);

// Of `bytes` of shared memory from `offset` on.
void note_read(std::size_t offset, std::size_t bytes);
void note_write(std::size_t offset, std::size_t bytes);
// A read by another lane of this warp, in its name.
void note_read_by(int lane, std::size_t offset, std::size_t bytes);

void copy_later(std::size_t offset, const void* from, bool live);
void close_group();
void finish_groups(int but);

// Ends the launch with an error.
void fail(const std::string& what);

void run(const char* name, const std::function<void()>& kernel, dim3 grid, int threads, int shared);

extern int architecture;
extern int shared_limit;

// Sums of products as tensor cores make them: exact within a group, then cut to float32.
float accumulate(float c, const float* a, const float* b, int stride_a, int stride_b);

}  // namespace emulation

#define threadIdx (::slimvit::emulation::thread_index())
#define blockIdx (::slimvit::emulation::block_index())
#define blockDim (::slimvit::emulation::block_size())

inline void __syncthreads() { emulation::barrier(); }
inline int __syncthreads_count(bool holds) { return emulation::count(holds); }
inline void __syncwarp() { emulation::warp_barrier(); }
inline float __expf(float x) { return std::exp(x); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __int_as_float(int bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline int __popc(unsigned word) { return __builtin_popcount(word); }
inline int __ffs(unsigned word) { return __builtin_ffs(int(word)); }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline float fmaxf(float a, float b) { return std::fmax(a, b); }
inline float fminf(float a, float b) { return std::fmin(a, b); }
inline float fmaf(float a, float b, float c) { return std::fma(a, b, c); }
inline float exp2f(float x) { return std::exp2(x); }
using std::memcpy;

struct Half {
  std::uint16_t bits;
};
struct BFloat16 {
  std::uint16_t bits;
};
float to_float(Half value);
float to_float(BFloat16 value);
template <class T>
T from_float(float value);
template <>
Half from_float<Half>(float value);
template <>
BFloat16 from_float<BFloat16>(float value);

template <class T>
class Shared {
 public:
  class Value {
   public:
    explicit Value(std::size_t offset) : offset_(offset) {}
    operator T() const {
      emulation::note_read(offset_, sizeof(T));
      T value;
      std::memcpy(&value, emulation::memory() + offset_, sizeof(T));
      return value;
    }
    Value& operator=(T value) {
      emulation::note_write(offset_, sizeof(T));
      std::memcpy(emulation::memory() + offset_, &value, sizeof(T));
      return *this;
    }
    Value& operator=(const Value& other) { return *this = T(other); }

   private:
    std::size_t offset_;
  };

  explicit Shared(std::size_t offset) : offset_(offset) {}
  Value operator[](std::ptrdiff_t i) const { return Value(offset_ + i * sizeof(T)); }
  Shared operator+(std::ptrdiff_t i) const { return Shared(offset_ + i * sizeof(T)); }
  std::size_t offset() const { return offset_; }

 private:
  std::size_t offset_;
};

inline Shared<unsigned char> shared_memory() { return Shared<unsigned char>(0); }

template <class T>
Shared<T> carve(Shared<unsigned char>& at, int count) {
  const Shared<T> start(at.offset());
  at = at + (count * sizeof(T) + 31) / 32 * 32;
  return start;
}

template <class T>
uint4 load16(const T* at) {
  uint4 value;
  std::memcpy(&value, at, 16);
  return value;
}
template <class T>
uint4 load16(Shared<T> at) {
  emulation::note_read(at.offset(), 16);
  uint4 value;
  std::memcpy(&value, emulation::memory() + at.offset(), 16);
  return value;
}
template <class T>
void store16(T* at, uint4 value) {
  std::memcpy(at, &value, 16);
}
template <class T>
void store16(Shared<T> at, uint4 value) {
  emulation::note_write(at.offset(), 16);
  std::memcpy(emulation::memory() + at.offset(), &value, 16);
}

template <class T>
void store4(Shared<T> at, unsigned value) {
  emulation::note_write(at.offset(), 4);
  std::memcpy(emulation::memory() + at.offset(), &value, 4);
}

template <class T>
void copy16_async(Shared<T> to, const T* from, bool live) {
  emulation::copy_later(to.offset(), from, live);
}
inline void close_copies() { emulation::close_group(); }
template <int n>
void wait_copies() {
  emulation::finish_groups(n);
}

template <class T>
T __shfl_xor_sync(unsigned, T value, int far) {
  struct Lane {
    T value;
    int far;
    T answer;
  } mine{value, far, 0};
  emulation::together("shuffle", &mine, [](void* const* lanes) {
    for (int l = 0; l < 32; ++l) {
      Lane& lane = *static_cast<Lane*>(lanes[l]);
      lane.answer = static_cast<Lane*>(lanes[l ^ lane.far])->value;
    }
  });
  return mine.answer;
}

inline unsigned __ballot_sync(unsigned, bool flag) {
  struct Lane {
    bool flag;
    unsigned answer;
  } mine{flag, 0};
  emulation::together("ballot", &mine, [](void* const* lanes) {
    unsigned word = 0;
    for (int l = 0; l < 32; ++l) word |= unsigned(static_cast<Lane*>(lanes[l])->flag) << l;
    for (int l = 0; l < 32; ++l) static_cast<Lane*>(lanes[l])->answer = word;
  });
  return mine.answer;
}

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
  const int lane = threadIdx.x % 32;
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

inline int architecture() { return emulation::architecture; }
inline int shared_memory_limit() { return emulation::shared_limit; }

template <class P>
void launch(const char* name, void (*kernel)(P), dim3 grid, int threads, int shared, void*,
            const P& params) {
  if (shared > shared_memory_limit()) {
    throw std::runtime_error(std::string(name) + ": " + std::to_string(shared) +
                             " bytes of shared memory, more than the device has");
  }
  emulation::run(name, [&] { kernel(params); }, grid, threads, shared);
}

}  // namespace slimvit
