#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "cpu/run.h"
#include "cpu/stopwatch.h"

namespace py = pybind11;

namespace slimvit {
namespace {

// Addresses come as integers from tensors that the caller keeps alive; 0 is null.
using Address = std::uintptr_t;

template <typename U>
U* at(Address address) {
  return reinterpret_cast<U*>(address);
}

void require(bool holds, const std::string& message) {
  if (!holds) throw std::invalid_argument(message);
}

Dtype dtype_of(const std::string& name) {
  require(name == "float32" || name == "bfloat16",
          "dtype must be float32 or bfloat16, got '" + name + "'");
  return name == "float32" ? Dtype::float32 : Dtype::bfloat16;
}

Activation activation_of(const std::string& name) {
  if (name == "gelu") return Activation::gelu;
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  require(name == "quick_gelu",
          "activation must be gelu, gelu_tanh or quick_gelu, got '" + name + "'");
  return Activation::quick_gelu;
}

void require_multiple(const char* what, int value) {
  require(value > 0 && value % 16 == 0,
          std::string(what) + " must be a positive multiple of 16, got " + std::to_string(value));
}

std::string join(const std::vector<long>& sizes) {
  std::string text;
  for (long size : sizes) text += (text.empty() ? "" : ", ") + std::to_string(size);
  return text;
}

const Kernels& kernels_for(const std::string& dtype) { return kernels(chosen(), dtype_of(dtype)); }

const char* kind_name(PackHead::Kind kind) {
  switch (kind) {
    case PackHead::Kind::block:
      return "block";
    case PackHead::Kind::embedding:
      return "embedding";
    case PackHead::Kind::head:
      return "head";
  }
  return "unknown";
}

template <class Pack>
const Pack* pack_at(Address address, std::int64_t bytes, PackHead::Kind kind) {
  const std::string name = std::string("the pack of the ") + kind_name(kind);
  require(address % kAlignment == 0, name + " must start at a multiple of 64 bytes");
  require(bytes >= static_cast<std::int64_t>(sizeof(Pack)), name + " is too short");
  const auto* pack = at<const Pack>(address);
  const PackHead& head = pack->head;
  require(head.magic == PackHead::kMagic && head.kind == kind, name + " is something else");
  require(head.bytes == bytes, name + " is cut off: it has " + std::to_string(bytes) +
                                   " bytes instead of " + std::to_string(head.bytes));
  for (Isa isa : offered())
    if (isa == head.isa) return pack;
  throw std::invalid_argument(name + " is for " + slimvit::name(head.isa) +
                              ", which this processor does not offer: accelerate the model anew");
}

// ---- packing -----------------------------------------------------------------------------------

BlockShape block_shape(int width, int heads, int head_dim, int hidden,
                       const std::string& activation, float eps1, float eps2, float extra_bias,
                       bool lone) {
  require_multiple("width", width);
  require_multiple("head_dim", head_dim);
  require_multiple("hidden", hidden);
  require(heads > 0, "heads must be positive, got " + std::to_string(heads));
  return {width, heads, head_dim, hidden, activation_of(activation), eps1, eps2, extra_bias, lone};
}

BlockWeights block_weights(const std::vector<Address>& a) {
  require(a.size() == 14, "a block has 14 weights, got " + std::to_string(a.size()));
  const auto f = [&](int i) { return at<const float>(a[i]); };
  return {f(0), f(1), f(2), f(3), f(4), f(5), f(6), f(7), f(8), f(9), f(10), f(11), f(12), f(13)};
}

EmbeddingShape embedding_shape(int channels, int image_height, int image_width, int patch_height,
                               int patch_width, int tokens, int prefix, int width, float eps) {
  require_multiple("width", width);
  require(channels > 0 && patch_height > 0 && patch_width > 0 && image_height > 0 &&
              image_width > 0 && image_height % patch_height == 0 && image_width % patch_width == 0,
          "images must be whole patches");
  const EmbeddingShape shape{channels, image_height, image_width, patch_height, patch_width,
                             tokens,   prefix,       width,       eps};
  require(prefix >= 0 && tokens == prefix + shape.rows() * shape.columns(),
          "tokens must be prefix + patches");
  return shape;
}

EmbeddingWeights embedding_weights(const std::vector<Address>& a, const EmbeddingShape& shape) {
  require(a.size() == 5, "an embedding has 5 arrays, got " + std::to_string(a.size()));
  const auto* order = at<const std::int32_t>(a[2]);
  std::vector<bool> seen(shape.tokens);
  for (std::size_t i = 0; i < seen.size(); ++i) {
    const bool fits = order[i] >= 0 && order[i] < static_cast<long>(seen.size()) && !seen[order[i]];
    require(fits, "order must name every token once, got " + std::to_string(order[i]));
    seen[order[i]] = true;
  }
  return {at<const float>(a[0]), at<const float>(a[1]), order, at<const float>(a[3]),
          at<const float>(a[4])};
}

HeadShape head_shape(int width, int classes, int heads, float eps) {
  require_multiple("width", width);
  require(heads >= 0 && heads <= 2 && (heads == 0 || classes > 0), "a model has 0, 1 or 2 heads");
  return {width, classes, heads, eps};
}

HeadWeights head_weights(const std::vector<Address>& a) {
  require(a.size() == 6, "a head has 6 arrays, got " + std::to_string(a.size()));
  const auto f = [&](int i) { return at<const float>(a[i]); };
  return {f(0), f(1), {f(2), f(4)}, {f(3), f(5)}};
}

// The same call first tells the size and then, given memory, fills it.
template <class Shape, class Weights>
std::int64_t pack(std::int64_t (*packer)(const Shape&, const Weights&, void*), const Shape& shape,
                  const Weights& weights, Address out) {
  require(out % kAlignment == 0, "a pack must start at a multiple of 64 bytes");
  const py::gil_scoped_release release;
  return packer(shape, weights, at<void>(out));
}

// ---- calls -------------------------------------------------------------------------------------

void require_positive_threads(int threads) {
  require(threads > 0, "threads must be positive, got " + std::to_string(threads));
}

void slim_block(Address pack_address, std::int64_t pack_bytes, Address x, long x_image,
                long x_token, Address out, long out_image, long out_token, Address index,
                Address key_bias, long bias_image, long width, long batch, long m, long n,
                int threads) {
  const auto* pack = pack_at<BlockPack>(pack_address, pack_bytes, PackHead::Kind::block);
  require_positive_threads(threads);
  require(width == pack->shape.width, "x must be [m, B, " + std::to_string(pack->shape.width) +
                                          "], got [" + join({m, batch, width}) + "]");
  require(batch >= 0 && n >= 1 && (index != 0 || n <= m),
          "n must be in [1, m] = [1, " + std::to_string(m) + "], got " + std::to_string(n));
  const auto* positions = at<const std::int64_t>(index);
  for (long i = 0; positions != nullptr && i < batch * n; ++i)
    require(positions[i] >= 0 && positions[i] < m, "index must be in [0, m) = [0, " +
                                                       std::to_string(m) + "), got " +
                                                       std::to_string(positions[i]));
  const BlockCall call{pack,
                       at<const float>(x),
                       x_image,
                       x_token,
                       at<float>(out),
                       out_image,
                       out_token,
                       positions,
                       at<const float>(key_bias),
                       bias_image,
                       batch,
                       m,
                       n};
  const py::gil_scoped_release release;
  run(call, threads);
}

void slim_vit(Address embedding_address, std::int64_t embedding_bytes,
              const std::vector<Address>& block_addresses,
              const std::vector<std::int64_t>& block_bytes, Address head_address,
              std::int64_t head_bytes, const std::vector<std::int32_t>& counts, bool idle,
              long rows, long columns, Address images, const std::string& images_dtype,
              const std::vector<long>& image_shape, Address out, long batch, int threads) {
  const auto* embedding =
      pack_at<EmbeddingPack>(embedding_address, embedding_bytes, PackHead::Kind::embedding);
  const auto* head = pack_at<HeadPack>(head_address, head_bytes, PackHead::Kind::head);
  const std::size_t depth = block_addresses.size();
  require(depth > 0 && block_bytes.size() == depth && counts.size() == depth,
          "every block must have a pack and a count");
  require_positive_threads(threads);
  const EmbeddingShape& in = embedding->shape;
  const std::vector<long> wanted{in.channels, in.image_height, in.image_width};
  require(image_shape == wanted, "images must be [B, " + join(wanted) + "], got [" +
                                     std::to_string(batch) + ", " + join(image_shape) + "]");
  const auto alike = [&](const PackHead& other, int width) {
    require(other.isa == embedding->head.isa && other.dtype == embedding->head.dtype &&
                width == embedding->shape.width,
            "all packs must be of one model, instruction set and dtype");
  };
  alike(head->head, head->shape.width);
  std::vector<const BlockPack*> blocks(depth);
  std::int32_t alive = embedding->shape.tokens;
  for (std::size_t i = 0; i < depth; ++i) {
    blocks[i] = pack_at<BlockPack>(block_addresses[i], block_bytes[i], PackHead::Kind::block);
    const BlockShape& shape = blocks[i]->shape;
    alike(blocks[i]->head, shape.width);
    require(shape.heads == blocks[0]->shape.heads && shape.head_dim == blocks[0]->shape.head_dim,
            "all blocks must have the same heads");
    require(counts[i] >= 1 && counts[i] <= alive, "kept sets must be nested");
    alive = counts[i];
  }
  require(alive >= head->shape.heads, "the last block must keep a token for every head");
  const long rows_out = idle ? in.tokens : alive;
  if (rows == 0)
    require(head->shape.heads > 0 && columns == head->shape.classes,
            "logits must be " + std::to_string(head->shape.classes) + " columns");
  else
    require(rows == rows_out && columns == in.width,
            "tokens must be [" + std::to_string(rows_out) + ", " + std::to_string(in.width) + "]");
  NetworkCall call{};
  call.embedding = embedding;
  call.blocks = blocks.data();
  call.head = head;
  call.counts = counts.data();
  call.depth = static_cast<long>(depth);
  call.idle = idle;
  call.tokens = rows > 0;
  call.images = at<const void>(images);
  call.images_dtype = dtype_of(images_dtype);
  call.out = at<float>(out);
  call.batch = batch;
  const py::gil_scoped_release release;
  run(call, threads);
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (Isa isa : offered()) names.emplace_back(name(isa));
  return names;
}

}  // namespace
}  // namespace slimvit

PYBIND11_MODULE(_cpu, m) {
  using namespace slimvit;
  m.doc() = "What slimvit compiles for processors. Arrays are passed as addresses.";
#ifdef SLIMVIT_SANITIZED
  m.attr("sanitized") = true;
#else
  m.attr("sanitized") = false;
#endif
  m.def("instruction_sets", &instruction_sets,
        "Instruction sets that this processor offers, slowest first.");
  m.def(
      "chosen", [] { return std::string(name(chosen())); },
      "The set that kernels use: the fastest, or the one that SLIMVIT_ISA names.\n\n"
      "Raises ValueError if SLIMVIT_ISA is unknown or not offered here.");
  m.def(
      "peak",
      [](const std::string& dtype) {
        const Isa isa = chosen();
        const Dtype of = dtype_of(dtype);
        const py::gil_scoped_release release;
        return measure_peak(isa, of);
      },
      py::arg("dtype"), "Measured peak of one thread, in floating-point operations per second.");

  m.def(
      "pack_block",
      [](int width, int heads, int head_dim, int hidden, const std::string& activation, float eps1,
         float eps2, float extra_bias, bool lone, const std::vector<Address>& weights,
         const std::string& dtype, Address out) {
        return pack(
            kernels_for(dtype).pack_block,
            block_shape(width, heads, head_dim, hidden, activation, eps1, eps2, extra_bias, lone),
            block_weights(weights), out);
      },
      py::kw_only(), py::arg("width"), py::arg("heads"), py::arg("head_dim"), py::arg("hidden"),
      py::arg("activation"), py::arg("eps1"), py::arg("eps2"), py::arg("extra_bias"),
      py::arg("lone"), py::arg("weights"), py::arg("dtype"), py::arg("out"),
      "Lay out a block's weights; returns the bytes that takes, and only that where out is 0.");
  m.def(
      "pack_embedding",
      [](int channels, int image_height, int image_width, int patch_height, int patch_width,
         int tokens, int prefix, int width, float eps, const std::vector<Address>& weights,
         const std::string& dtype, Address out) {
        const EmbeddingShape shape =
            embedding_shape(channels, image_height, image_width, patch_height, patch_width, tokens,
                            prefix, width, eps);
        return pack(kernels_for(dtype).pack_embedding, shape, embedding_weights(weights, shape),
                    out);
      },
      py::kw_only(), py::arg("channels"), py::arg("image_height"), py::arg("image_width"),
      py::arg("patch_height"), py::arg("patch_width"), py::arg("tokens"), py::arg("prefix"),
      py::arg("width"), py::arg("eps"), py::arg("weights"), py::arg("dtype"), py::arg("out"),
      "Lay out the patch embedding; returns the bytes that takes, and only that where out is 0.");
  m.def(
      "pack_head",
      [](int width, int classes, int heads, float eps, const std::vector<Address>& weights,
         const std::string& dtype, Address out) {
        return pack(kernels_for(dtype).pack_head, head_shape(width, classes, heads, eps),
                    head_weights(weights), out);
      },
      py::kw_only(), py::arg("width"), py::arg("classes"), py::arg("heads"), py::arg("eps"),
      py::arg("weights"), py::arg("dtype"), py::arg("out"),
      "Lay out the final norm and the head; returns the bytes that takes, and only that where out "
      "is 0.");
  m.def(
      "profile",
      [](bool on) {
        py::dict seconds;
        for (int i = 0; i < static_cast<int>(Phase::count); ++i)
          seconds[name(static_cast<Phase>(i))] = 1e-9 * take_time(static_cast<Phase>(i));
        __atomic_store_n(&profiling, on, __ATOMIC_RELAXED);
        return seconds;
      },
      py::arg("on"),
      "Start or stop measuring where time goes; returns the seconds of each part, summed over "
      "threads, since the last call. Waits of workers count in the parts they wait in, too.");
  m.def(
      "prefer_huge_pages",
      [](Address begin, std::int64_t bytes) { prefer_huge_pages(at<void>(begin), bytes); },
      py::arg("begin"), py::arg("bytes"),
      "Ask the system for huge pages where it has them: weights are read end to end for every "
      "image.");
  m.def("slim_block", &slim_block, py::arg("pack"), py::arg("pack_bytes"), py::arg("x"),
        py::arg("x_image"), py::arg("x_token"), py::arg("out"), py::arg("out_image"),
        py::arg("out_token"), py::arg("index"), py::arg("key_bias"), py::arg("bias_image"),
        py::arg("width"), py::arg("batch"), py::arg("m"), py::arg("n"), py::arg("threads"),
        "Images through one block: float32 tokens, strides counted in floats.");
  m.def("slim_vit", &slim_vit, py::arg("embedding"), py::arg("embedding_bytes"), py::arg("blocks"),
        py::arg("block_bytes"), py::arg("head"), py::arg("head_bytes"), py::arg("counts"),
        py::arg("idle"), py::arg("rows"), py::arg("columns"), py::arg("images"),
        py::arg("images_dtype"), py::arg("image_shape"), py::arg("out"), py::arg("batch"),
        py::arg("threads"),
        "Images [B, C, H, W] through a whole network, to float32 logits or tokens.");
}
