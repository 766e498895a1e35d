// A whole block of a narrow model in one launch: an image a block of threads, its activations in
// shared memory from the first norm to the last residual, weights streaming by from the L2 cache.
//
//   y = LN1(x);  x' = x[kept] + Attn(y[kept], y);  out = x' + MLP(LN2(x'))
//
// A warp has sixteen kept rows. For each head, all warps make keys and values of all alive rows,
// then each attends with its queries. What the second half needs, sums of the residual, stays in
// registers.

#include "cuda/fused_block.h"

namespace slimvit {
namespace {

template <class T, int kWarps>
__global__ void __launch_bounds__(32 * kWarps) fused_block_kernel(FusedBlock p) {
  using M = Core<T>;
  if constexpr (compiled_for<M>()) {
    const int image = blockIdx.x;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int alive = (p.m + 15) / 16 * 16, kept = blockDim.x / 32 * 16;
    Shared<unsigned char> memory = shared_memory();
    Shared<T> ys = carve<T>(memory, alive * kStride);
    Shared<T> keys = carve<T>(memory, alive * kNarrow);
    Shared<T> values = carve<T>(memory, alive * kNarrow);
    Shared<T> own = carve<T>(memory, kept * kStride) + 16 * warp * kStride;
    Shared<float> alone = carve<float>(memory, kept) + 16 * warp;
    Weights<T, 32 * kWarps> weights(p, carve<T>(memory, p.stages * kTile));

    const T* x = static_cast<const T*>(p.x) + std::int64_t(image) * p.m * kWidth;
    if (p.stages == 2) weights.fetch(0);
    normalise<T>(ys, x, p.m, alive, p.eps1);

    const std::int64_t* index = p.index == nullptr ? nullptr : p.index + std::int64_t(image) * p.n;
    const auto source = [&](int row) {
      const int place = min(16 * warp + row, p.n - 1);
      return index == nullptr ? place : int(index[place]);
    };
    const Keys about = {
        p.key_bias == nullptr ? nullptr : p.key_bias + std::int64_t(image) * p.bias_image, p.m,
        rsqrtf(kD) * 1.4426950408889634f};
    const Shared<T> query_row = ys + source(lane % 16) * kStride;

    for (int head = 0; head < kHeads; ++head) {
      typename M::C c[4];
      for (int part = 0; part < 2; ++part) {
        const Shared<T> weight = weights.take();
        const Shared<T> to = part == 0 ? keys : values;
        for (int row = 16 * warp; row < alive; row += kept) {
          multiply_rows<T>(c, ys + (row + lane % 16) * kStride, weight);
          store_rows<T>(to + row * kNarrow, kNarrow, c,
                        p.qkv_bias + (part + 1) * kWidth + head * kD);
        }
      }
      const Shared<T> weight = weights.take();
      multiply_rows<T>(c, query_row, weight);
      Strip<M, kD, kStride> strip(own + head * kD, alone);
      store_rows<T>(strip.tile, kStride, c, p.qkv_bias + head * kD);
      __syncwarp();
      const float* extra = p.has_extra ? p.qkv_bias + kWidth + head * kD : nullptr;
      if (extra != nullptr) {
        float sum = 0;
        for (int i = lane % 2; i < kD; i += 2) {
          sum += to_float(strip.tile[lane / 2 * kStride + i]) * extra[i];
        }
        sum += __shfl_xor_sync(~0u, sum, 1);
        if (lane % 2 == 0) alone[lane / 2] = sum * about.scale + p.extra_bias * 1.4426950408889634f;
        __syncwarp();
      }
      strip.start(extra == nullptr ? nullptr : extra + kWidth, kD);
      for (int key = 0; key < alive; key += kKeys) {
        strip.attend(keys + key * kNarrow, values + key * kNarrow, min(kKeys, alive - key) / 16,
                     key, about);
      }
      __syncwarp();
      strip.finish();
    }

    Rows<T> rows;
    for (auto& tile : rows.sum) M::zero(tile);
    typename M::A a[4];
    for (int head = 0; head < kHeads; ++head) {
      const Shared<T> weight = weights.take();
#pragma unroll
      for (int k = 0; k < 4; ++k) M::load(a[k], own + head * kD + 16 * k, kStride);
      rows.add(a, weight);
    }
    const T* const residual[2] = {x + std::int64_t(source(lane / 4)) * kWidth,
                                  x + std::int64_t(source(lane / 4 + 8)) * kWidth};
    rows.add(residual, p.proj_bias);
    __syncwarp();
    rows.normalise(own, p.eps2, p.fc2_bias);
    for (int first = 0; first < p.hidden; first += 64) {
      const Shared<T> weight = weights.take();
#pragma unroll
      for (int j = 0; j < 4; j += 2) {  // two at a time: registers are short
        typename M::C h[2];
        multiply_rows<T>(h, own + lane % 16 * kStride, weight + 16 * j * kStride);
#pragma unroll
        for (int t = 0; t < 2; ++t) {
          const float* bias = p.fc1_bias + first + 16 * (j + t);
#pragma unroll
          for (int i = 0; i < 8; ++i) h[t].x[i] += bias[M::column(i)];
          activate(h[t].x, p.activation);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            a[j + t].r[i] = pack<T>(h[t].x[2 * i], h[t].x[2 * i + 1]);
          }
        }
      }
      rows.add(a, weights.take());
    }

    rows.store(own);
    // Eight lanes a part of 64 columns, as its statistics want them.
    T* out = static_cast<T*>(p.out) + std::int64_t(image) * p.out_rows * kWidth;
    float* stats = p.out_stats + std::int64_t(image) * p.out_rows * kHeads * 2;
    for (int i = lane; i < 16 * kWidth / 8; i += 32) {
      const int row = 16 * warp + i / (kWidth / 8), column = i % (kWidth / 8) * 8;
      const bool live = row < p.n;
      const uint4 packed = load16(own + i / (kWidth / 8) * kStride + column);
      if (live) store16(out + row * kWidth + column, packed);
      float parts[8];
      unpack<T>(packed, parts);
      store_stats(stats + (row * kHeads + column / 64) * 2, parts, 8, live);
    }
  }
}

int shared_bytes(const FusedBlock& p, int stages) {
  const int alive = ceil_div(p.m, 16) * 16, kept = ceil_div(p.n, 16) * 16;
  return 2 * (alive * (kStride + 2 * kNarrow) + kept * kStride + stages * kTile) + 4 * kept;
}

template <class T>
void launch_block(const FusedBlock& p, void* stream) {
  const int warps = ceil_div(p.n, 16);
  const auto kernel = warps <= 8 ? fused_block_kernel<T, 8> : fused_block_kernel<T, kMostWarps>;
  launch("fused_block", kernel, dim3(p.batch), 32 * warps, shared_bytes(p, p.stages), stream, p);
}

}  // namespace

int fused_block_stages(const FusedBlock& p) {
  const bool fits =
      p.width == kWidth && p.heads == kHeads && p.hidden % 64 == 0 && p.n <= 16 * kMostWarps;
  if (!fits || architecture() < 80) return 0;
  const int room = shared_memory_limit();
  return shared_bytes(p, 2) <= room ? 2 : shared_bytes(p, 1) <= room ? 1 : 0;
}

void fused_block(FusedBlock p, Type type, void* stream) {
  p.stages = fused_block_stages(p);
  if (p.stages == 0) throw std::runtime_error("fused_block: it does not fit this device");
  if (type == Type::half) return launch_block<Half>(p, stream);
  launch_block<BFloat16>(p, stream);
}

}  // namespace slimvit
