// A whole block of a narrow model in one launch: an image a block of threads, its activations in
// shared memory from the first norm to the last residual, weights streaming by from the L2 cache.
//
//   y = LN1(x);  x' = x[kept] + Attn(y[kept], y);  out = x' + MLP(LN2(x'))
//
// A warp has sixteen kept rows; of 384 channels, two warps have them together. For each head, all
// warps make keys and values of all alive rows, then each attends with its queries. What the second
// half needs, sums of the residual, stays in registers.

#include "cuda/fused_block.h"

namespace slimvit {
namespace {

// Hidden channels, as one warp makes them and all of its rows' warps read them.
template <class S>
__device__ void make_hidden(typename S::M::C (&h)[2], Shared<typename S::T> row,
                            Shared<typename S::T> weight, const float* bias,
                            Activation activation) {
  multiply_rows<S>(h, row, weight);
  add_bias<typename S::M>(h, bias);
#pragma unroll
  for (auto& tile : h) activate(tile.x, activation);
}

template <class S, int kWarps>
__global__ void __launch_bounds__(32 * kWarps) fused_block_kernel(FusedBlock p) {
  using T = typename S::T;
  using M = typename S::M;
  if constexpr (compiled_for<M>()) {
    constexpr int kSides = S::kSides, kStride = S::kStride;
    const int image = blockIdx.x;
    const int warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int strip = warp / kSides, side = warp % kSides;
    const int alive = (p.m + 15) / 16 * 16, kept = warps / kSides * 16;
    Shared<unsigned char> memory = shared_memory();
    Shared<T> ys = carve<T>(memory, alive * kStride);
    Shared<T> keys = carve<T>(memory, kSides * alive * kNarrow);
    Shared<T> values = carve<T>(memory, kSides * alive * kNarrow);
    Shared<T> own = carve<T>(memory, kept * kStride) + 16 * strip * kStride;
    Shared<T> hidden = carve<T>(memory, kSides > 1 ? kept * kNarrow : 0) + 16 * strip * kNarrow;
    Shared<float> room = carve<float>(memory, 32 * warps);
    Weights<S> weights(p, carve<T>(memory, p.stages * S::kTile));

    const T* x = static_cast<const T*>(p.x) + std::int64_t(image) * p.m * S::kWidth;
    if (p.stages == 2) weights.fetch(0);
    normalise<S>(ys, x, p.m, alive, p.eps1);

    const std::int64_t* index = p.index == nullptr ? nullptr : p.index + std::int64_t(image) * p.n;
    const auto source = [&](int row) {
      const int place = min(16 * strip + row, p.n - 1);
      return index == nullptr ? place : int(index[place]);
    };
    const Keys about = {
        p.key_bias == nullptr ? nullptr : p.key_bias + std::int64_t(image) * p.bias_image, p.m,
        rsqrtf(kD) * kLog2e};
    const Shared<T> query_row = ys + source(lane % 16) * kStride;
    const Shared<float> alone = room + 16 * warp;

    for (int first = 0; first < S::kHeads; first += kSides) {
      for (int part = 0; part < 2; ++part) {
        for (int one = 0; one < kSides; ++one) {
          const Shared<T> weight = weights.take();
          const Shared<T> to = (part == 0 ? keys : values) + one * alive * kNarrow;
          const float* bias = p.qkv_bias + (part + 1) * S::kWidth + (first + one) * kD;
          for (int row = 16 * warp; row < alive; row += 16 * warps) {
            typename M::C c[4];
            multiply_rows<S>(c, ys + (row + lane % 16) * kStride, weight);
            add_bias<M>(c, bias);
            store_rows<M>(to + row * kNarrow, kNarrow, c);
          }
        }
      }
      const int head = first + side;
      Strip<M, kD, kStride> strip_of_head(own + head * kD, alone);
      for (int one = 0; one < kSides; ++one) {
        const Shared<T> weight = weights.take();
        if (one != side) continue;
        typename M::C c[4];
        multiply_rows<S>(c, query_row, weight);
        add_bias<M>(c, p.qkv_bias + head * kD);
        store_rows<M>(strip_of_head.tile, kStride, c);
      }
      __syncwarp();
      const float* extra = p.has_extra ? p.qkv_bias + S::kWidth + head * kD : nullptr;
      if (extra != nullptr) {
        float sum = 0;
        for (int i = lane % 2; i < kD; i += 2) {
          sum += to_float(strip_of_head.tile[lane / 2 * kStride + i]) * extra[i];
        }
        sum += __shfl_xor_sync(~0u, sum, 1);
        if (lane % 2 == 0)
          strip_of_head.alone[lane / 2] = sum * about.scale + p.extra_bias * kLog2e;
        __syncwarp();
      }
      strip_of_head.start(extra == nullptr ? nullptr : extra + S::kWidth, kD);
      const Shared<T> k = keys + side * alive * kNarrow, v = values + side * alive * kNarrow;
      for (int key = 0; key < alive; key += kKeys) {
        strip_of_head.attend(k + key * kNarrow, v + key * kNarrow, min(kKeys, alive - key) / 16,
                             key, about);
      }
      __syncwarp();
      strip_of_head.finish();
    }

    // Each warp's columns of a tile of 64 columns of a weight: its rows there.
    const int share = side * kShare;
    Rows<S> rows;
    typename M::A a[4];
    for (int head = 0; head < S::kHeads; ++head) {
      const Shared<T> weight = weights.take();
#pragma unroll
      for (int k = 0; k < 4; ++k) M::load(a[k], own + head * kD + 16 * k, kStride);
      rows.add(a, weight + share * kNarrow);
    }
    const T* const residual[2] = {x + std::int64_t(source(lane / 4)) * S::kWidth + share,
                                  x + std::int64_t(source(lane / 4 + 8)) * S::kWidth + share};
    rows.add(residual, p.proj_bias + share);
    __syncwarp();
    rows.normalise(own + share, p.eps2, room);
    add_bias<M>(rows.sum, p.fc2_bias + share);
    for (int first = 0; first < p.hidden; first += 64) {
      const Shared<T> weight = weights.take();
      const Shared<T> row = own + lane % 16 * kStride;
      typename M::C h[2];  // two at a time: registers are short
      if constexpr (kSides == 1) {
#pragma unroll
        for (int j = 0; j < 4; j += 2) {
          make_hidden<S>(h, row, weight + 16 * j * kStride, p.fc1_bias + first + 16 * j,
                         p.activation);
#pragma unroll
          for (int t = 0; t < 2; ++t) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              a[j + t].r[i] = pack<T>(h[t].x[2 * i], h[t].x[2 * i + 1]);
            }
          }
        }
        rows.add(a, weights.take());
      } else {
        static_assert(kSides <= 2, "a side makes 32 of the 64");
        make_hidden<S>(h, row, weight + 32 * side * kStride, p.fc1_bias + first + 32 * side,
                       p.activation);
        store_rows<M>(hidden + 32 * side, kNarrow, h);
        const Shared<T> down = weights.take();
#pragma unroll
        for (int k = 0; k < 4; ++k) M::load(a[k], hidden + 16 * k, kNarrow);
        rows.add(a, down + share * kNarrow);
      }
    }

    __syncwarp();
    store_rows<M>(own + share, kStride, rows.sum);
    __syncwarp();
    // Eight lanes a part of 64 columns, as its statistics want them.
    T* out = static_cast<T*>(p.out) + std::int64_t(image) * p.out_rows * S::kWidth;
    float* stats = p.out_stats + std::int64_t(image) * p.out_rows * S::kHeads * 2;
    for (int i = lane; i < 16 * kShare / 8; i += 32) {
      const int local = i / (kShare / 8), column = share + i % (kShare / 8) * 8;
      const int place = 16 * strip + local;
      const bool live = place < p.n;
      const uint4 packed = load16(own + local * kStride + column);
      if (live) store16(out + place * S::kWidth + column, packed);
      float parts[8];
      unpack<T>(packed, parts);
      store_stats(stats + (place * S::kHeads + column / 64) * 2, parts, 8, live);
    }
  }
}

template <class S>
int shared_bytes(const FusedBlock& p, int stages) {
  const int alive = ceil_div(p.m, 16) * 16, kept = ceil_div(p.n, 16) * 16;
  int values = alive * (S::kStride + 2 * S::kSides * kNarrow) + kept * S::kStride;
  if (S::kSides > 1) values += kept * kNarrow;
  return 2 * (values + stages * S::kTile) + 8 * kept * S::kSides;
}

template <class S>
int stages_of(const FusedBlock& p, int most_warps) {
  if (ceil_div(p.n, 16) * S::kSides > most_warps) return 0;
  const int room = shared_memory_limit();
  return shared_bytes<S>(p, 2) <= room ? 2 : shared_bytes<S>(p, 1) <= room ? 1 : 0;
}

template <class S, int kWarps>
void launch_block(const FusedBlock& p, void* stream) {
  launch("fused_block", fused_block_kernel<S, kWarps>, dim3(p.batch),
         32 * ceil_div(p.n, 16) * S::kSides, shared_bytes<S>(p, p.stages), stream, p);
}

// Eight warps have 255 registers a thread, twelve 168.
template <class T>
void launch_block(const FusedBlock& p, void* stream) {
  if (p.width == 384) return launch_block<Shape<T, 384>, 8>(p, stream);
  if (p.n <= 128) return launch_block<Shape<T, 192>, 8>(p, stream);
  launch_block<Shape<T, 192>, 12>(p, stream);
}

}  // namespace

int fused_block_stages(const FusedBlock& p) {
  if (architecture() < 80 || p.heads * kD != p.width || p.hidden % 64 != 0) return 0;
  if (p.width == 192) return stages_of<Shape<Half, 192>>(p, 12);
  if (p.width == 384) return stages_of<Shape<Half, 384>>(p, 8);
  return 0;
}

void fused_block(FusedBlock p, Type type, void* stream) {
  p.stages = fused_block_stages(p);
  if (p.stages == 0) throw std::runtime_error("fused_block: it does not fit this device");
  if (type == Type::half) return launch_block<Half>(p, stream);
  launch_block<BFloat16>(p, stream);
}

}  // namespace slimvit
