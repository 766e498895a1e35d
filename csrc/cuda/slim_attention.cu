// Rectangular attention: n queries of the kept tokens over the m keys of the alive ones.
//
//   out = softmax(q kᵀ / sqrt(d) + bias) v,   for every image and head
//
// Keys and values of an image's head lie in shared memory, whole where they fit. A warp has 16
// queries, so that 141 of them cost 144; a block has as many warps as there are queries, up to
// sixteen, and then reads keys and values once. Softmax is in float32, with a running maximum.

#include "cuda/mma.h"
#include "cuda/ops.h"

namespace slimvit {
namespace {

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
template <class M, int kD>
struct Strip;

template <class T, int kD>
struct Strip<Ampere<T>, kD> {
  using M = Ampere<T>;
  static constexpr int kStride = kD + 8;
  static constexpr __host__ __device__ int scratch_bytes() { return kQueries * kStride * 2 + kQueries * 4; }

  Shared<T> tile;       // queries, in the end the result
  Shared<float> alone;  // logits of the extra key
  typename M::A q[kD / 16];
  typename M::C out[kD / 16];
  float top[2], total[2];  // of rows l / 4 and l / 4 + 8; the total of this lane's columns alone

  __device__ explicit Strip(Shared<unsigned char>& memory)
      : tile(carve<T>(memory, kQueries * kStride)), alone(carve<float>(memory, kQueries)) {}

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
  __device__ void attend(Shared<T> keys, Shared<T> values, int tiles, int first, const Keys& about) {
    typename M::C s[kKeys / 16];
    float higher[2] = {top[0], top[1]};
#pragma unroll
    for (int t = 0; t < kKeys / 16; ++t) {
      if (t >= tiles) break;
      M::zero(s[t]);
#pragma unroll
      for (int k = 0; k < kD / 16; ++k) {
        typename M::ColumnsB b;
        M::load_columns(b, keys + 16 * t * kStride + 16 * k, kStride);
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
        M::load_rows(b, values + 16 * t * kStride + 16 * k, kStride);
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

  __device__ void attend(Shared<T> keys, Shared<T> values, int tiles, int first, const Keys& about) {
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

// Rows first … first + rows of a matrix of d columns, d at most kD, with zeros around what there is.
template <class M, int kD, class T>
__device__ void load_rows(Shared<T> to, const T* from, std::int64_t stride, int first, int rows,
                          int end, int d, int thread, int threads) {
  constexpr int kVectors = kD / 8;
  for (int i = thread; i < rows * kVectors; i += threads) {
    const int row = first + i / kVectors, column = i % kVectors * 8;
    const bool live = row < end && column < d;
    const T* at = from + (live ? row * stride + column : 0);
    Shared<T> place = to + i / kVectors * (kD + 8) + column;
    if constexpr (M::asynchronous) {
      copy16_async(place, at, live);
    } else {
      store16(place, live ? load16(at) : uint4{0, 0, 0, 0});
    }
  }
}

// Warps of a block at most: what registers allow, and the scratch of the older cores.
template <class M, int kD>
__host__ __device__ constexpr int most_warps() {
  return !M::asynchronous ? 4 : kD > 64 ? 8 : 16;
}

template <class M, int kD>
__global__ void __launch_bounds__(32 * most_warps<M, kD>()) slim_attention_kernel(Attention p) {
  if constexpr (compiled_for<M>()) {
    using T = typename M::T;
    constexpr int kStride = kD + 8;
    const int head = blockIdx.y, image = blockIdx.z;
    const int inner = p.heads * p.d;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int query = (blockIdx.x * (blockDim.x / 32) + warp) * kQueries;
    Shared<unsigned char> memory = shared_memory();
    Shared<T> keys = carve<T>(memory, p.segment * kStride);
    Shared<T> values = carve<T>(memory, p.segment * kStride);
    Shared<unsigned char> scratch = memory + warp * Strip<M, kD>::scratch_bytes();
    Strip<M, kD> strip(scratch);

    const T* q = static_cast<const T*>(p.q) + std::int64_t(image) * p.n * inner + head * p.d;
    load_rows<M, kD>(strip.tile, q, inner, query, kQueries, p.n, p.d, lane, 32);
    if constexpr (M::asynchronous) {
      close_copies();
      wait_copies<0>();
    }
    __syncwarp();
    const float* extra = p.extra == nullptr ? nullptr : p.extra + head * p.d;
    const Keys about = {p.key_bias == nullptr ? nullptr : p.key_bias + std::int64_t(image) * p.bias_image,
                        p.m, rsqrtf(p.d) * kLog2e};
    if (extra != nullptr) {
      float sum = 0;
      for (int i = lane % 2; i < p.d; i += 2) sum += to_float(strip.tile[lane / 2 * kStride + i]) * extra[i];
      sum += __shfl_xor_sync(~0u, sum, 1);
      if (lane % 2 == 0) strip.alone[lane / 2] = sum * about.scale + p.extra_bias * kLog2e;
      __syncwarp();
    }
    strip.start(extra == nullptr ? nullptr : extra + inner, p.d);

    const T* kv = static_cast<const T*>(p.kv) + std::int64_t(image) * p.m * 2 * inner + head * p.d;
    for (int first = 0; first < p.m; first += p.segment) {
      const int rows = min(p.segment, (p.m - first + 15) / 16 * 16);
      __syncthreads();  // until every warp is done with the segment before
      load_rows<M, kD>(keys, kv, 2 * inner, first, rows, p.m, p.d, threadIdx.x, blockDim.x);
      load_rows<M, kD>(values, kv + inner, 2 * inner, first, rows, p.m, p.d, threadIdx.x, blockDim.x);
      if constexpr (M::asynchronous) {
        close_copies();
        wait_copies<0>();
      }
      __syncthreads();
      for (int key = 0; key < rows; key += kKeys) {
        const int tiles = min(kKeys, rows - key) / 16;
        strip.attend(keys + key * kStride, values + key * kStride, tiles, first + key, about);
      }
    }
    strip.finish();

    T* out = static_cast<T*>(p.out) + std::int64_t(image) * p.n * inner + head * p.d;
    constexpr int kVectors = kD / 8;
    for (int i = lane; i < kQueries * kVectors; i += 32) {
      const int row = i / kVectors, column = i % kVectors * 8;
      if (query + row < p.n && column < p.d) {
        store16(out + std::int64_t(query + row) * inner + column,
                load16(strip.tile + row * kStride + column));
      }
    }
  }
}

template <class M, int kD>
void launch_attention(Attention p, void* stream) {
  constexpr int kRow = (kD + 8) * 2 * 2;  // bytes of a key and its value
  constexpr int kScratch = Strip<M, kD>::scratch_bytes();
  const int strips = ceil_div(p.n, kQueries);
  // As many warps as leave room for a chunk of keys.
  const int fitting = (shared_memory_limit() - kKeys * kRow - 64) / kScratch;
  const int most = fitting < most_warps<M, kD>() ? fitting : most_warps<M, kD>();
  const int blocks = ceil_div(strips, most);
  const int warps = ceil_div(strips, blocks);
  const int room = (shared_memory_limit() - warps * kScratch - 64) / kRow / 16 * 16;
  const int needed = ceil_div(p.m, 16) * 16;
  const int segments = ceil_div(needed, room);
  p.segment = ceil_div(ceil_div(needed, segments), kKeys) * kKeys;
  p.segment = p.segment < room ? p.segment : room;
  p.segment = p.segment < needed ? p.segment : needed;
  const int shared = p.segment * kRow + warps * kScratch + 64;
  launch("slim_attention", slim_attention_kernel<M, kD>, dim3(blocks, p.heads, p.batch), warps * 32,
         shared, stream, p);
}

template <class M>
void launch_attention(const Attention& p, void* stream) {
  if (p.d <= 32) return launch_attention<M, 32>(p, stream);
  if (p.d <= 64) return launch_attention<M, 64>(p, stream);
  launch_attention<M, 128>(p, stream);
}

}  // namespace

void slim_attention(const Attention& p, Type type, void* stream) {
  if (architecture() < 80) return launch_attention<Volta>(p, stream);
  if (type == Type::half) return launch_attention<Ampere<Half>>(p, stream);
  launch_attention<Ampere<BFloat16>>(p, stream);
}

}  // namespace slimvit
