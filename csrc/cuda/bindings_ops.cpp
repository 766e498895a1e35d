#include "cuda/bindings.h"

void bind_choosing(py::module_& m);

namespace {

Activation activation_of(const std::string& name) {
  if (name == "none") return Activation::none;
  if (name == "gelu") return Activation::gelu;
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  if (name == "quick_gelu") return Activation::quick_gelu;
  throw py::value_error("activation must be none, gelu, gelu_tanh or quick_gelu, got " + name);
}

void bind_linear(const py::kwargs& kwargs) {
  const Given given{kwargs};
  Linear p;
  p.x = in(given.address("x"));
  p.stats = in<float>(given.address("stats"));
  p.weight = in(given.address("weight"));
  p.row_sums = in<float>(given.address("row_sums"));
  p.spread = in<float>(given.address("spread"));
  p.squares = in<float>(given.address("squares"));
  p.bias = in<float>(given.address("bias"));
  p.residual = in(given.address("residual"));
  p.index = in<std::int64_t>(given.address("index"));
  p.out = out(given.address("out"));
  p.tail_out = out(given.address("tail_out"));
  p.out_stats = out<float>(given.address("out_stats"));
  p.batch = given.number("batch");
  p.n = given.number("n");
  p.x_rows = given.number("x_rows");
  p.residual_rows = given.number("residual_rows");
  p.out_rows = given.number("out_rows");
  p.groups = given.number("groups");
  p.inner = given.number("inner");
  p.columns = given.number("columns");
  p.tail_columns = given.number("tail_columns");
  p.x_parts = given.number("x_parts");
  p.part = given.number("part");
  p.eps = given.real("eps");
  p.activation = activation_of(given.text("activation"));
  launch(slim_linear, p, given.type(), given.stream());
}

void bind_attention(const py::kwargs& kwargs) {
  const Given given{kwargs};
  Attention p;
  p.q = in(given.address("q"));
  p.kv = in(given.address("kv"));
  p.key_bias = in<float>(given.address("key_bias"));
  p.extra = in<float>(given.address("extra"));
  p.out = out(given.address("out"));
  p.batch = given.number("batch");
  p.n = given.number("n");
  p.m = given.number("m");
  p.heads = given.number("heads");
  p.d = given.number("d");
  p.bias_image = given.number("bias_image");
  p.segment = 0;
  p.extra_bias = given.real("extra_bias");
  launch(slim_attention, p, given.type(), given.stream());
}

void bind_last_attention(const py::kwargs& kwargs) {
  const Given given{kwargs};
  LastAttention p;
  p.x = in(given.address("x"));
  p.stats = in<float>(given.address("stats"));
  p.u = in(given.address("u"));
  p.key_bias = in<float>(given.address("key_bias"));
  p.out = out(given.address("out"));
  p.batch = given.number("batch");
  p.m = given.number("m");
  p.width = given.number("width");
  p.queries = given.number("queries");
  p.parts = given.number("parts");
  p.bias_image = given.number("bias_image");
  p.scale = given.real("scale");
  p.eps = given.real("eps");
  p.has_zero = given.number("has_zero") != 0;
  p.zero_bias = given.real("zero_bias");
  launch(last_attention, p, given.type(), given.stream());
}

FusedBlock fused_block_of(const Given& given) {
  FusedBlock p;
  p.x = in(given.address("x"));
  p.qkv = in(given.address("qkv"));
  p.qkv_bias = in<float>(given.address("qkv_bias"));
  p.proj = in(given.address("proj"));
  p.proj_bias = in<float>(given.address("proj_bias"));
  p.fc1 = in(given.address("fc1"));
  p.fc1_bias = in<float>(given.address("fc1_bias"));
  p.fc2 = in(given.address("fc2"));
  p.fc2_bias = in<float>(given.address("fc2_bias"));
  p.key_bias = in<float>(given.address("key_bias"));
  p.index = in<std::int64_t>(given.address("index"));
  p.out = out(given.address("out"));
  p.out_stats = out<float>(given.address("out_stats"));
  p.batch = given.number("batch");
  p.m = given.number("m");
  p.n = given.number("n");
  p.out_rows = given.number("out_rows");
  p.width = given.number("width");
  p.heads = given.number("heads");
  p.hidden = given.number("hidden");
  p.bias_image = given.number("bias_image");
  p.stages = 0;
  p.has_extra = given.number("has_extra") != 0;
  p.extra_bias = given.real("extra_bias");
  p.eps1 = given.real("eps1");
  p.eps2 = given.real("eps2");
  p.activation = activation_of(given.text("activation"));
  return p;
}

void bind_fused_block(const py::kwargs& kwargs) {
  const Given given{kwargs};
  launch(fused_block, fused_block_of(given), given.type(), given.stream());
}

int bind_fused_block_stages(int width, int heads, int hidden, int m, int n) {
  FusedBlock p = {};
  p.width = width;
  p.heads = heads;
  p.hidden = hidden;
  p.m = m;
  p.n = n;
  return fused_block_stages(p);
}

void bind_row_stats(const py::kwargs& kwargs) {
  const Given given{kwargs};
  RowStats p;
  p.x = in(given.address("x"));
  p.out = out<float>(given.address("out"));
  p.rows = given.number("rows");
  p.width = given.number("width");
  p.part = given.number("part");
  launch(row_stats, p, given.type(), given.stream());
}

void bind_scatter_tokens(const py::kwargs& kwargs) {
  const Given given{kwargs};
  Scatter p;
  p.x = in(given.address("x"));
  p.index = in<std::int64_t>(given.address("index"));
  p.out = out(given.address("out"));
  p.batch = given.number("batch");
  p.kept = given.number("kept");
  p.length = given.number("length");
  p.width = given.number("width");
  p.index_image = given.number("index_image");
  launch(scatter_tokens, p, given.stream());
}

}  // namespace

// Keyword arguments are the members of each op's struct in ops.h; pointers are integers, 0 for
// null.
void bind_ops(py::module_& m) {
  m.def("slim_linear", &bind_linear, "See ops.h.");
  m.def("slim_attention", &bind_attention, "See ops.h.");
  m.def("last_attention", &bind_last_attention, "See ops.h.");
  m.def("fused_block", &bind_fused_block, "See ops.h.");
  m.def("fused_block_stages", &bind_fused_block_stages, py::arg("width"), py::arg("heads"),
        py::arg("hidden"), py::arg("m"), py::arg("n"), "See ops.h.");
  m.def("row_stats", &bind_row_stats, "See ops.h.");
  m.def("scatter_tokens", &bind_scatter_tokens, "See ops.h.");
  bind_choosing(m);
}
