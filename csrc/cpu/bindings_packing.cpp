#include "cpu/bindings.h"
#include "cpu/kernels.h"

namespace py = pybind11;

namespace slimvit {
namespace {

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

const Kernels& kernels_for(const std::string& dtype) { return kernels(chosen(), dtype_of(dtype)); }

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

ChooserShape chooser_shape(const std::string& scores, int width, int head_tokens, int reach,
                           float threshold, int before, int after, int hidden,
                           const std::string& activation, float eps) {
  require_multiple("width", width);
  require(scores == "attention" || scores == "predictor",
          "scores must be attention or predictor, got '" + scores + "'");
  if (scores == "attention") {
    require(head_tokens > 0 && head_tokens <= 16,
            "head_tokens must be in [1, 16], got " + std::to_string(head_tokens));
    require(reach > 0, "reach must be positive, got " + std::to_string(reach));
    require(threshold >= 0, "threshold must not be negative, got " + std::to_string(threshold));
    require((before == 0 && after == 0) || (0 < after && after < before),
            "with a threshold after must be in [1, before - 1] = [1, " +
                std::to_string(before - 1) + "], got " + std::to_string(after));
    return {Scores::attention, width, head_tokens, reach, threshold, before, after, 0,
            Activation::gelu,  0.0f};
  }
  require_multiple("hidden", hidden);
  return {Scores::predictor, width, 0, 0, 0.0f, 0, 0, hidden, activation_of(activation), eps};
}

ChooserWeights chooser_weights(const std::vector<Address>& a) {
  require(a.size() == 5, "a chooser has 5 arrays, got " + std::to_string(a.size()));
  const auto f = [&](int i) { return at<const float>(a[i]); };
  return {f(0), f(1), f(2), f(3), f(4)};
}

SelectorShape selector_shape(int width, int heads, int patches, int fewest, int packages,
                             float eps) {
  require_multiple("width", width);
  require(heads > 0 && width % heads == 0,
          "heads must divide the width, got " + std::to_string(heads));
  require_multiple("channels of a selector's head", width / heads);
  require(patches >= 0, "patches must not be negative, got " + std::to_string(patches));
  require(fewest >= 1, "fewest must be positive, got " + std::to_string(fewest));
  require(packages >= 0, "packages must not be negative, got " + std::to_string(packages));
  return {width, heads, patches, fewest, packages, eps};
}

SelectorWeights selector_weights(const std::vector<Address>& a) {
  require(a.size() == 14, "a selector has 14 arrays, got " + std::to_string(a.size()));
  const auto f = [&](int i) { return at<const float>(a[i]); };
  return {f(0), f(1), f(2), f(3), f(4), f(5), f(6), f(7), f(8), f(9), f(10), f(11), f(12), f(13)};
}

// The same call first tells the size and then, given memory, fills it.
template <class Shape, class Weights>
std::int64_t pack(std::int64_t (*packer)(const Shape&, const Weights&, void*), const Shape& shape,
                  const Weights& weights, Address out) {
  require(out % kAlignment == 0, "a pack must start at a multiple of 64 bytes");
  const py::gil_scoped_release release;
  return packer(shape, weights, at<void>(out));
}

}  // namespace

void bind_packing(py::module_& m) {
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
      "pack_chooser",
      [](const std::string& scores, int width, int head_tokens, int reach, float threshold,
         int before, int after, int hidden, const std::string& activation, float eps,
         const std::vector<Address>& weights, const std::string& dtype, Address out) {
        return pack(kernels_for(dtype).pack_chooser,
                    chooser_shape(scores, width, head_tokens, reach, threshold, before, after,
                                  hidden, activation, eps),
                    chooser_weights(weights), out);
      },
      py::kw_only(), py::arg("scores"), py::arg("width"), py::arg("head_tokens"), py::arg("reach"),
      py::arg("threshold"), py::arg("before"), py::arg("after"), py::arg("hidden"),
      py::arg("activation"), py::arg("eps"), py::arg("weights"), py::arg("dtype"), py::arg("out"),
      "Lay out how a block chooses its tokens; returns the bytes that takes, and only that where "
      "out is 0.");
  m.def(
      "pack_selector",
      [](int width, int heads, int patches, int fewest, int packages, float eps,
         const std::vector<Address>& weights, const std::string& dtype, Address out) {
        return pack(kernels_for(dtype).pack_selector,
                    selector_shape(width, heads, patches, fewest, packages, eps),
                    selector_weights(weights), out);
      },
      py::kw_only(), py::arg("width"), py::arg("heads"), py::arg("patches"), py::arg("fewest"),
      py::arg("packages"), py::arg("eps"), py::arg("weights"), py::arg("dtype"), py::arg("out"),
      "Lay out a selector; returns the bytes that takes, and only that where out is 0.");
}

}  // namespace slimvit
