// The kernels that choose tokens for each image.

#include "cuda/bindings.h"

namespace {

void bind_absorb_scores(const py::kwargs& kwargs) {
  const Given given{kwargs};
  AbsorbScores p;
  p.x = in(given.address("x"));
  p.stats = in<float>(given.address("stats"));
  p.q = in(given.address("q"));
  p.kv = in(given.address("kv"));
  p.norm_weight = in<float>(given.address("norm_weight"));
  p.norm_bias = in<float>(given.address("norm_bias"));
  p.key_bias = in<float>(given.address("key_bias"));
  p.normed = out(given.address("normed"));
  p.shrink = out<float>(given.address("shrink"));
  p.of_heads = out<float>(given.address("of_heads"));
  p.importance = out<float>(given.address("importance"));
  p.score = out<float>(given.address("score"));
  p.cosine = out<float>(given.address("cosine"));
  p.batch = given.number("batch");
  p.m = given.number("m");
  p.width = given.number("width");
  p.x_parts = given.number("x_parts");
  p.tokens = given.number("tokens");
  p.heads = given.number("heads");
  p.d = given.number("d");
  p.prefix = given.number("prefix");
  p.candidates = given.number("candidates");
  p.scale = given.real("scale");
  p.eps = given.real("eps");
  launch(absorb_scores, p, given.type(), given.stream());
}

void bind_absorb_select(const py::kwargs& kwargs) {
  const Given given{kwargs};
  AbsorbSelect p;
  p.score = in<float>(given.address("score"));
  p.cosine = in<float>(given.address("cosine"));
  p.index = out<std::int64_t>(given.address("index"));
  p.into = out<int>(given.address("into"));
  p.batch = given.number("batch");
  p.m = given.number("m");
  p.n = given.number("n");
  p.prefix = given.number("prefix");
  launch(absorb_select, p, given.stream());
}

void bind_absorb_merge(const py::kwargs& kwargs) {
  const Given given{kwargs};
  AbsorbMerge p;
  p.x = in(given.address("x"));
  p.stats = in<float>(given.address("stats"));
  p.importance = in<float>(given.address("importance"));
  p.index = in<std::int64_t>(given.address("index"));
  p.into = in<int>(given.address("into"));
  p.size = in<float>(given.address("size"));
  p.spread = in<float>(given.address("spread"));
  p.out = out(given.address("out"));
  p.out_stats = out<float>(given.address("out_stats"));
  p.out_size = out<float>(given.address("out_size"));
  p.out_bias = out<float>(given.address("out_bias"));
  p.out_spread = out<float>(given.address("out_spread"));
  p.batch = given.number("batch");
  p.m = given.number("m");
  p.n = given.number("n");
  p.width = given.number("width");
  p.part = given.number("part");
  launch(absorb_merge, p, given.type(), given.stream());
}

void bind_top_tokens(const py::kwargs& kwargs) {
  const Given given{kwargs};
  TopTokens p;
  p.scores = in(given.address("scores"));
  p.weight = in<float>(given.address("weight"));
  p.index = out<std::int64_t>(given.address("index"));
  p.batch = given.number("batch");
  p.m = given.number("m");
  p.n = given.number("n");
  p.prefix = given.number("prefix");
  p.channels = given.number("channels");
  // Float32 scores without a weight have no matrix whose dtype would count.
  launch(top_tokens, p, p.weight == nullptr ? Type::half : given.type(), given.stream());
}

void bind_selector_judge(const py::kwargs& kwargs) {
  const Given given{kwargs};
  SelectorJudge p;
  p.x = in(given.address("x"));
  p.embed = in(given.address("embed"));
  p.embed_bias = in<float>(given.address("embed_bias"));
  p.judge1 = in(given.address("judge1"));
  p.bias1 = in<float>(given.address("bias1"));
  p.judge2 = in(given.address("judge2"));
  p.bias2 = in<float>(given.address("bias2"));
  p.judge3 = in<float>(given.address("judge3"));
  p.bias3 = in<float>(given.address("bias3"));
  p.weigh1 = in<float>(given.address("weigh1"));
  p.weigh1_bias = in<float>(given.address("weigh1_bias"));
  p.weigh2 = in<float>(given.address("weigh2"));
  p.weigh2_bias = in<float>(given.address("weigh2_bias"));
  p.local = out(given.address("local"));
  p.sums = out<float>(given.address("sums"));
  p.means = out<float>(given.address("means"));
  p.verdict = out<float>(given.address("verdict"));
  p.weight = out<float>(given.address("weight"));
  p.batch = given.number("batch");
  p.m = given.number("m");
  p.p = given.number("p");
  p.prefix = given.number("prefix");
  p.heads = given.number("heads");
  p.c = given.number("c");
  p.half = given.number("half");
  p.quarter = given.number("quarter");
  p.hidden = given.number("hidden");
  p.eps = given.real("eps");
  launch(selector_judge, p, given.type(), given.stream());
}

void bind_selector_choose(const py::kwargs& kwargs) {
  const Given given{kwargs};
  SelectorChoose p;
  p.verdict = in<float>(given.address("verdict"));
  p.weight = in<float>(given.address("weight"));
  p.score = out<float>(given.address("score"));
  p.share = out<float>(given.address("share"));
  p.index = out<std::int64_t>(given.address("index"));
  p.batch = given.number("batch");
  p.heads = given.number("heads");
  p.p = given.number("p");
  p.n = given.number("n");
  p.prefix = given.number("prefix");
  p.packages = given.number("packages");
  launch(selector_choose, p, given.stream());
}

void bind_package_tokens(const py::kwargs& kwargs) {
  const Given given{kwargs};
  PackageTokens p;
  p.x = in(given.address("x"));
  p.index = in<std::int64_t>(given.address("index"));
  p.share = in<float>(given.address("share"));
  p.out = out(given.address("out"));
  p.out_stats = out<float>(given.address("out_stats"));
  p.batch = given.number("batch");
  p.m = given.number("m");
  p.p = given.number("p");
  p.prefix = given.number("prefix");
  p.count = given.number("count");
  p.width = given.number("width");
  p.part = given.number("part");
  launch(package_tokens, p, given.type(), given.stream());
}

}  // namespace

void bind_choosing(py::module_& m) {
  m.def("absorb_scores", &bind_absorb_scores, "See ops.h.");
  m.def("absorb_select", &bind_absorb_select, "See ops.h.");
  m.def("absorb_merge", &bind_absorb_merge, "See ops.h.");
  m.def("top_tokens", &bind_top_tokens, "See ops.h.");
  m.def("selector_judge", &bind_selector_judge, "See ops.h.");
  m.def("selector_choose", &bind_selector_choose, "See ops.h.");
  m.def("package_tokens", &bind_package_tokens, "See ops.h.");
}
