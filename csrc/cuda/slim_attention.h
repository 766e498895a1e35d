// A warp's share of attention: sixteen queries, and what they have attended to so far.
#pragma once

#include "cuda/mma.h"

namespace slimvit {

constexpr int kQueries = 16;  // of a warp
constexpr int kKeys = 64;     // whose logits a warp holds at a time
constexpr float kLog2e = 1.4426950408889634f;

__device__ inline float infinity() { return __int_as_float(0x7f800000); }

// What the logits of a chunk of keys need besides q kᵀ.
struct Keys {
  const float* bias;  // of the image, or null
  int m;
  float scale;  // times log2(e)

  __device__ float logit(float product, int key) const {
    if (key >= m) return -infinity();
    const float logit = product * scale;
    return bias == nullptr ? logit : logit + bias[key] * kLog2e;
  }
};

// The maximum to subtract: any number where every key so far is shut out.
__device__ inline float base_of(float top) { return top == -infinity() ? 0.0f : top; }

// A warp's queries with what they have attended to so far, for either generation of tensor cores.
// Scratch is the warp's own shared memory.
template <class M, int kD, int kStride = kD + 8>
struct Strip;

template <class T, int kD, int kStride>
struct Strip<Ampere<T>, kD, kStride> {
  using M = Ampere<T>;
  static constexpr int kKeyStride = kD + 8;
  static constexpr __host__ __device__ int scratch_bytes() {
    return kQueries * kStride * 2 + kQueries * 4;
  }

  Shared<T> tile;       // queries, in the end the result
  Shared<float> alone;  // logits of the extra key
  typename M::A q[kD / 16];
  typename M::C out[kD / 16];
  float top[2], total[2];  // of rows l / 4 and l / 4 + 8; the total of this lane's columns alone

  __device__ explicit Strip(Shared<unsigned char>& memory)
      : tile(carve<T>(memory, kQueries * kStride)), alone(carve<float>(memory, kQueries)) {}
  __device__ Strip(Shared<T> tile, Shared<float> alone) : tile(tile), alone(alone) {}

  // `tile` and, with an extra key, `alone` are filled.
  __device__ void start(const float* value, int d) {
#pragma unroll
    for (int k = 0; k < kD / 16; ++k) {
      M::load(q[k], tile + 16 * k, kStride);
      M::zero(out[k]);
    }
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      top[i] = value == nullptr ? -infinity() : alone[lane / 4 + 8 * i];
      total[i] = value != nullptr && lane % 4 == 0 ? 1.0f : 0.0f;
    }
    if (value == nullptr) return;
#pragma unroll
    for (int k = 0; k < kD / 16; ++k) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int column = 16 * k + M::column(i);
        out[k].x[i] = column < d ? value[column] : 0.0f;
      }
    }
  }

  // Keys `first` …, of which shared memory holds `tiles` times 16 and their values.
  __device__ void attend(Shared<T> keys, Shared<T> values, int tiles, int first,
                         const Keys& about) {
    typename M::C s[kKeys / 16];
    float higher[2] = {top[0], top[1]};
#pragma unroll
    for (int t = 0; t < kKeys / 16; ++t) {
      if (t >= tiles) break;
      M::zero(s[t]);
#pragma unroll
      for (int k = 0; k < kD / 16; ++k) {
        typename M::ColumnsB b;
        M::load_columns(b, keys + 16 * t * kKeyStride + 16 * k, kKeyStride);
        M::multiply_add(s[t], q[k], b);
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        s[t].x[i] = about.logit(s[t].x[i], first + 16 * t + M::column(i));
        higher[i % 4 / 2] = fmaxf(higher[i % 4 / 2], s[t].x[i]);
      }
    }
    float base[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      higher[i] = fmaxf(higher[i], __shfl_xor_sync(~0u, higher[i], 1));
      higher[i] = fmaxf(higher[i], __shfl_xor_sync(~0u, higher[i], 2));
      base[i] = base_of(higher[i]);
      const float shrink = exp2f(top[i] - base[i]);
      top[i] = higher[i];
      total[i] *= shrink;
#pragma unroll
      for (int k = 0; k < kD / 16; ++k) {
        out[k].x[2 * i] *= shrink;
        out[k].x[2 * i + 1] *= shrink;
        out[k].x[2 * i + 4] *= shrink;
        out[k].x[2 * i + 5] *= shrink;
      }
    }
#pragma unroll
    for (int t = 0; t < kKeys / 16; ++t) {
      if (t >= tiles) break;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        s[t].x[i] = exp2f(s[t].x[i] - base[i % 4 / 2]);
        total[i % 4 / 2] += s[t].x[i];
      }
      // C of one product is laid out as A of the next.
      typename M::A p;
#pragma unroll
      for (int i = 0; i < 4; ++i) p.r[i] = pack<T>(s[t].x[2 * i], s[t].x[2 * i + 1]);
#pragma unroll
      for (int k = 0; k < kD / 16; ++k) {
        typename M::RowsB b;
        M::load_rows(b, values + 16 * t * kKeyStride + 16 * k, kKeyStride);
        M::multiply_add(out[k], p, b);
      }
    }
  }

  // Leaves the result in `tile`.
  __device__ void finish() {
    float part[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      total[i] += __shfl_xor_sync(~0u, total[i], 1);
      total[i] += __shfl_xor_sync(~0u, total[i], 2);
      part[i] = 1.0f / total[i];
    }
#pragma unroll
    for (int k = 0; k < kD / 16; ++k) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int at = M::row(i) * kStride + 16 * k + M::column(i);
        tile[at] = from_float<T>(out[k].x[i] * part[i % 4 / 2]);
      }
    }
    __syncwarp();
  }
};

// wmma does not say which row an element of C is in, so logits pass through shared memory, and a
// matrix of row numbers, loaded once, tells each element by which of the rows' factors to shrink.
template <int kD>
struct Strip<Volta, kD> {
  using M = Volta;
  using T = Half;
  static constexpr int kStride = kD + 8;
  static constexpr int kWide = (kD > kKeys ? kD : kKeys) + 4;
  static constexpr int kPStride = kKeys + 8;
  static constexpr __host__ __device__ int scratch_bytes() {
    return kQueries * (kStride * 2 + 4 + kWide * 4 + kPStride * 2 + 4);
  }

  Shared<T> tile;
  Shared<float> alone;
  Shared<float> logits;
  Shared<T> p;
  Shared<float> factor;  // of each row
  typename M::A q[kD / 16];
  typename M::C out[kD / 16];
  typename M::C rows;
  float top, total;  // of row l / 2

  __device__ explicit Strip(Shared<unsigned char>& memory)
      : tile(carve<T>(memory, kQueries * kStride)),
        alone(carve<float>(memory, kQueries)),
        logits(carve<float>(memory, kQueries * kWide)),
        p(carve<T>(memory, kQueries * kPStride)),
        factor(carve<float>(memory, kQueries)) {}

  static __device__ int lane() { return threadIdx.x % 32; }

  __device__ void start(const float* value, int d) {
    for (int i = lane(); i < 256; i += 32) logits[i / 16 * kWide + i % 16] = i / 16;
    __syncwarp();
    wmma::load_matrix_sync(rows, logits, kWide, wmma::mem_row_major);
    __syncwarp();
    for (int i = lane(); i < kQueries * kD; i += 32) {
      logits[i / kD * kWide + i % kD] = value != nullptr && i % kD < d ? value[i % kD] : 0.0f;
    }
    __syncwarp();
    for (int k = 0; k < kD / 16; ++k) {
      M::load(q[k], tile + 16 * k, kStride);
      wmma::load_matrix_sync(out[k], logits + 16 * k, kWide, wmma::mem_row_major);
    }
    top = value == nullptr ? -infinity() : alone[lane() / 2];
    total = value == nullptr ? 0.0f : 1.0f;
    __syncwarp();
  }

  __device__ void attend(Shared<T> keys, Shared<T> values, int tiles, int first,
                         const Keys& about) {
    for (int t = 0; t < tiles; ++t) {
      typename M::C s;
      M::zero(s);
#pragma unroll
      for (int k = 0; k < kD / 16; ++k) {
        typename M::ColumnsB b;
        M::load_columns(b, keys + 16 * t * kStride + 16 * k, kStride);
        M::multiply_add(s, q[k], b);
      }
      M::store(logits + 16 * t, s, kWide);
    }
    __syncwarp();
    // Two lanes a row, in turns, so that they read from different banks.
    const int row = lane() / 2;
    float higher = top;
    for (int i = lane() % 2; i < 16 * tiles; i += 2) {
      const float logit = about.logit(logits[row * kWide + i], first + i);
      logits[row * kWide + i] = logit;
      higher = fmaxf(higher, logit);
    }
    higher = fmaxf(higher, __shfl_xor_sync(~0u, higher, 1));
    const float base = base_of(higher), shrink = exp2f(top - base);
    float sum = 0;
    for (int i = lane() % 2; i < 16 * tiles; i += 2) {
      const float weight = exp2f(logits[row * kWide + i] - base);
      p[row * kPStride + i] = from_float<T>(weight);
      sum += weight;
    }
    sum += __shfl_xor_sync(~0u, sum, 1);
    total = total * shrink + sum;
    top = higher;
    shrink_rows(shrink);
    for (int t = 0; t < tiles; ++t) {
      typename M::A a;
      M::load(a, p + 16 * t, kPStride);
#pragma unroll
      for (int k = 0; k < kD / 16; ++k) {
        typename M::RowsB b;
        M::load_rows(b, values + 16 * t * kStride + 16 * k, kStride);
        M::multiply_add(out[k], a, b);
      }
    }
    __syncwarp();
  }

  __device__ void shrink_rows(float by) {
    if (lane() % 2 == 0) factor[lane() / 2] = by;
    __syncwarp();
#pragma unroll
    for (int k = 0; k < kD / 16; ++k) {
      for (int i = 0; i < out[k].num_elements; ++i) out[k].x[i] *= factor[int(rows.x[i])];
    }
  }

  __device__ void finish() {
    shrink_rows(1.0f / total);
    for (int k = 0; k < kD / 16; ++k) M::store(logits + 16 * k, out[k], kWide);
    __syncwarp();
    for (int i = lane(); i < kQueries * kD; i += 32) {
      tile[i / kD * kStride + i % kD] = from_float<T>(logits[i / kD * kWide + i % kD]);
    }
    __syncwarp();
  }
};

}  // namespace slimvit
