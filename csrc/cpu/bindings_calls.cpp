#include <algorithm>

#include "cpu/bindings.h"
#include "cpu/run.h"

namespace py = pybind11;

namespace slimvit {
namespace {

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
  require(batch >= 0 && n >= 1 && (index != 0 || batch == 0 || n <= m),
          "n must be in [1, m] = [1, " + std::to_string(m) + "], got " + std::to_string(n));
  const auto* positions = at<const std::int64_t>(index);
  for (long i = 0; positions != nullptr && i < batch * n; ++i)
    require(positions[i] >= 0 && positions[i] < m, "index must be in [0, m) = [0, " +
                                                       std::to_string(m) + "), got " +
                                                       std::to_string(positions[i]));
  BlockCall call{};
  call.pack = pack;
  call.x = at<const float>(x);
  call.x_image = x_image;
  call.x_token = x_token;
  call.out = at<float>(out);
  call.out_image = out_image;
  call.out_token = out_token;
  call.index = positions;
  call.key_bias = at<const float>(key_bias);
  call.bias_image = bias_image;
  call.batch = batch;
  call.m = m;
  call.n = n;
  const py::gil_scoped_release release;
  run(call, threads);
}

const ChooserPack* chooser_at(Address address, std::int64_t bytes, const BlockPack& block,
                              long prefix) {
  const auto* chooser = pack_at<ChooserPack>(address, bytes, PackHead::Kind::chooser);
  require(chooser->head.isa == block.head.isa && chooser->head.dtype == block.head.dtype &&
              chooser->shape.width == block.shape.width,
          "all packs must be of one model, instruction set and dtype");
  require(chooser->shape.head_tokens <= prefix,
          "the " + std::to_string(chooser->shape.head_tokens) +
              " tokens that the head reads must be among the prefix, got prefix " +
              std::to_string(prefix));
  require(block.extra == 0, "a block that chooses its tokens has no extra key");
  return chooser;
}

bool is_selector(Address address, std::int64_t bytes) {
  return bytes >= static_cast<std::int64_t>(sizeof(PackHead)) && address % kAlignment == 0 &&
         at<const PackHead>(address)->kind == PackHead::Kind::selector;
}

const SelectorPack* selector_at(Address address, std::int64_t bytes) {
  return pack_at<SelectorPack>(address, bytes, PackHead::Kind::selector);
}

// Patches that a selector keeps at least.
long fewest(const SelectorShape& shape) {
  return shape.patches == 0 ? shape.fewest : shape.patches;
}

// Of `alive` tokens, at most.
std::int32_t left_by(const SelectorShape& shape, std::int32_t alive, long prefix) {
  require(prefix >= 0 && prefix <= alive, "prefix must be in [0, m] = [0, " +
                                              std::to_string(alive) + "], got " +
                                              std::to_string(prefix));
  const long patches = alive - prefix - shape.packages;
  require(fewest(shape) < patches, "a selector must keep fewer patches than the " +
                                       std::to_string(patches) + " that reach it, got " +
                                       std::to_string(fewest(shape)));
  const long kept = shape.patches == 0 ? patches - 1 : shape.patches;
  return static_cast<std::int32_t>(prefix + kept + shape.packages + 1);
}

void select_tokens(Address pack_address, std::int64_t pack_bytes, Address x, long x_image,
                   long x_token, Address out, long out_image, long out_token, Address place,
                   long width, long batch, long m, long n, long prefix, int threads) {
  const SelectorPack* pack = selector_at(pack_address, pack_bytes);
  require_positive_threads(threads);
  require(width == pack->shape.width, "x must be [m, B, " + std::to_string(pack->shape.width) +
                                          "], got [" + join({m, batch, width}) + "]");
  require(pack->shape.patches > 0, "a selector alone must keep a fixed number of patches");
  require(n == left_by(pack->shape, static_cast<std::int32_t>(m), prefix),
          "n must be what the selector leaves, got " + std::to_string(n));
  SelectCall call{};
  call.pack = pack;
  call.x = at<const float>(x);
  call.x_image = x_image;
  call.x_token = x_token;
  call.out = at<float>(out);
  call.out_image = out_image;
  call.out_token = out_token;
  call.place = at<std::int64_t>(place);
  call.batch = batch;
  call.m = m;
  call.n = n;
  call.prefix = prefix;
  const py::gil_scoped_release release;
  run(call, threads);
}

void dynamic_block(Address pack_address, std::int64_t pack_bytes, Address chooser_address,
                   std::int64_t chooser_bytes, Address x, long x_image, long x_token, Address out,
                   long out_image, long out_token, Address size, Address spread, Address kept,
                   Address into, Address size_out, Address spread_out, long width, long batch,
                   long m, long n, long prefix, int threads) {
  const auto* pack = pack_at<BlockPack>(pack_address, pack_bytes, PackHead::Kind::block);
  require_positive_threads(threads);
  require(width == pack->shape.width, "x must be [m, B, " + std::to_string(pack->shape.width) +
                                          "], got [" + join({m, batch, width}) + "]");
  require(batch >= 0 && prefix >= 0 && prefix < n && n < m, "n must be in [prefix + 1, m - 1] = [" +
                                                                join({prefix + 1, m - 1}) +
                                                                "], got " + std::to_string(n));
  BlockCall call{};
  call.pack = pack;
  call.chooser = chooser_at(chooser_address, chooser_bytes, *pack, prefix);
  require(!call.chooser->shape.ragged(), "a block alone must keep a fixed number of tokens");
  call.x = at<const float>(x);
  call.x_image = x_image;
  call.x_token = x_token;
  call.out = at<float>(out);
  call.out_image = out_image;
  call.out_token = out_token;
  call.batch = batch;
  call.m = m;
  call.n = n;
  call.prefix = prefix;
  call.size = at<const float>(size);
  call.spread = at<const float>(spread);
  call.kept = at<std::int64_t>(kept);
  call.into = at<std::int64_t>(into);
  call.size_out = at<float>(size_out);
  call.spread_out = at<float>(spread_out);
  const py::gil_scoped_release release;
  run(call, threads);
}

// Where one pack of several lies that follow each other.
struct Part {
  Address address;
  std::int64_t bytes;
};

std::vector<Part> parts_of(Address packs, std::int64_t bytes,
                           const std::vector<std::int64_t>& sizes) {
  std::vector<Part> parts;
  std::int64_t end = 0;
  for (std::int64_t size : sizes) {
    require(size >= 0 && size <= bytes - end,
            "packs must have the bytes that sizes tell, got " + std::to_string(bytes));
    parts.push_back({packs + static_cast<Address>(end), size});
    end += size;
  }
  return parts;
}

// `sizes`: of the packs of the embedding, the blocks and the head, and of the choosers if there are
// any.
void slim_vit(Address packs, std::int64_t packs_bytes, const std::vector<std::int64_t>& sizes,
              const std::vector<std::int32_t>& counts, bool idle, long rows, long columns,
              Address images, const std::string& images_dtype, const std::vector<long>& image_shape,
              Address out, long batch, int threads, Address kept) {
  const std::size_t depth = counts.size();
  const bool chooses = depth > 0 && sizes.size() == 2 * depth + 2;
  require(depth > 0 && (chooses || sizes.size() == depth + 2),
          "packs must be an embedding, " + std::to_string(depth) +
              " blocks, a head, and a chooser for each block if any chooses, got " +
              std::to_string(sizes.size()));
  require(chooses == (kept != 0) || batch == 0,
          chooses ? "packs with choosers are for dynamic_vit" : "dynamic_vit needs choosers");
  const std::vector<Part> parts = parts_of(packs, packs_bytes, sizes);
  const auto* embedding =
      pack_at<EmbeddingPack>(parts[0].address, parts[0].bytes, PackHead::Kind::embedding);
  const Part& last = parts[depth + 1];
  const auto* head = pack_at<HeadPack>(last.address, last.bytes, PackHead::Kind::head);
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
    const Part& part = parts[1 + i];
    blocks[i] = pack_at<BlockPack>(part.address, part.bytes, PackHead::Kind::block);
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
  std::vector<const ChooserPack*> choosers(chooses ? depth : 0);
  std::vector<const SelectorPack*> selectors(choosers.size());
  std::int32_t packages = 0;
  long sure = in.tokens - in.prefix;  // patches that reach a selector at least
  bool ragged = false;
  require(!chooses || !idle, "pruned tokens cannot stay keys where they are chosen for each image");
  alive = in.tokens;
  for (std::size_t i = 0; i < choosers.size(); ++i) {
    const Part& part = parts[2 + depth + i];
    if (is_selector(part.address, part.bytes)) {
      selectors[i] = selector_at(part.address, part.bytes);
      alike(selectors[i]->head, selectors[i]->shape.width);
      require(selectors[i]->shape.packages == packages,
              "the selector before block " + std::to_string(i + 1) + " expects " +
                  std::to_string(selectors[i]->shape.packages) + " packages, there are " +
                  std::to_string(packages));
      require(fewest(selectors[i]->shape) < sure,
              "the selector before block " + std::to_string(i + 1) +
                  " must keep fewer patches than may reach it, " + std::to_string(sure) + ", got " +
                  std::to_string(fewest(selectors[i]->shape)));
      alive = left_by(selectors[i]->shape, alive, in.prefix);
      sure = fewest(selectors[i]->shape);
      ++packages;
      ragged = ragged || selectors[i]->shape.patches == 0;
    } else if (part.bytes != 0) {
      choosers[i] = chooser_at(part.address, part.bytes, *blocks[i], in.prefix);
      ragged = ragged || choosers[i]->shape.ragged();
      require(!choosers[i]->shape.ragged() || counts[i] == alive,
              "block " + std::to_string(i + 1) + " may keep all of " + std::to_string(alive) +
                  " tokens, got room for " + std::to_string(counts[i]));
    }
    require(choosers[i] != nullptr || counts[i] == alive || counts[i] <= in.prefix,
            "block " + std::to_string(i + 1) + " keeps " + std::to_string(counts[i]) + " of " +
                std::to_string(alive) + " tokens, it needs a chooser");
    alive = counts[i];
    sure = std::min<long>(sure, alive - in.prefix - packages);
  }
  require(!ragged || alive <= in.prefix,
          "where images keep numbers of their own, the last block must keep prefix tokens alone");
  NetworkCall call{};
  call.choosers = chooses ? choosers.data() : nullptr;
  call.selectors = chooses ? selectors.data() : nullptr;
  call.ragged = ragged;
  call.kept = at<std::int64_t>(kept);
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

}  // namespace

void bind_calls(py::module_& m) {
  m.def("slim_block", &slim_block, py::arg("pack"), py::arg("pack_bytes"), py::arg("x"),
        py::arg("x_image"), py::arg("x_token"), py::arg("out"), py::arg("out_image"),
        py::arg("out_token"), py::arg("index"), py::arg("key_bias"), py::arg("bias_image"),
        py::arg("width"), py::arg("batch"), py::arg("m"), py::arg("n"), py::arg("threads"),
        "Images through one block: float32 tokens, strides counted in floats.");
  m.def("slim_vit", &slim_vit, py::arg("packs"), py::arg("packs_bytes"), py::arg("sizes"),
        py::arg("counts"), py::arg("idle"), py::arg("rows"), py::arg("columns"), py::arg("images"),
        py::arg("images_dtype"), py::arg("image_shape"), py::arg("out"), py::arg("batch"),
        py::arg("threads"), py::arg("kept"),
        "Images [B, C, H, W] through a whole network, to float32 logits or tokens. Where there is "
        "room for what they keep, each image's kept tokens are its own, as choosers tell.");
  m.def("dynamic_block", &dynamic_block, py::arg("pack"), py::arg("pack_bytes"), py::arg("chooser"),
        py::arg("chooser_bytes"), py::arg("x"), py::arg("x_image"), py::arg("x_token"),
        py::arg("out"), py::arg("out_image"), py::arg("out_token"), py::arg("size"),
        py::arg("spread"), py::arg("kept"), py::arg("into"), py::arg("size_out"),
        py::arg("spread_out"), py::arg("width"), py::arg("batch"), py::arg("m"), py::arg("n"),
        py::arg("prefix"), py::arg("threads"),
        "Images through one block that chooses n of its m tokens for each of them.");
  m.def("select_tokens", &select_tokens, py::arg("pack"), py::arg("pack_bytes"), py::arg("x"),
        py::arg("x_image"), py::arg("x_token"), py::arg("out"), py::arg("out_image"),
        py::arg("out_token"), py::arg("place"), py::arg("width"), py::arg("batch"), py::arg("m"),
        py::arg("n"), py::arg("prefix"), py::arg("threads"),
        "Images' tokens through one selector: the n that are left of m, the package last.");
}

}  // namespace slimvit
