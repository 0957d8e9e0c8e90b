// SPDX-License-Identifier: Apache-2.0
// The device on its own: one operation in, its output beside that of ggml's CPU backend.
#include <doctest/doctest.h>
#include <ggml-alloc.h>
#include <ggml-backend.h>
#include <ggml-cpp.h>
#include <ggml-cpu.h>
#include <ggml.h>

#include <cmath>
#include <cstring>
#include <magicpig/core/random.hpp>
#include <vector>

#include "device.hpp"
#include "difference.hpp"

namespace {

using namespace magicpig;
using llama::test::difference;

struct Attention {
  int heads = 6;
  int kv_heads = 2;
  int key_dim = 64;
  int value_dim = 64;
  int cells = 300;
  int streams = 1;
  int rows = 1;
  ggml_type type = GGML_TYPE_F16;
  float soft_cap = 0.0F;
  float max_bias = 0.0F;
  bool sinks = false;
  const char* name = "cache_k_l0";
};

// A graph of one attention over caches of random numbers, half of whose cells are hidden.
class Graph {
 public:
  explicit Graph(const Attention& of) : of_(of) {
    context_.reset(ggml_init({.mem_size = 1 << 20, .mem_buffer = nullptr, .no_alloc = true}));
    ggml_context* c = context_.get();
    // As llama.cpp keeps them: [dim of all heads, cells, streams].
    keys_ = ggml_new_tensor_3d(c, of.type, of.key_dim * of.kv_heads, of.cells, of.streams);
    values_ = ggml_new_tensor_3d(c, of.type, of.value_dim * of.kv_heads, of.cells, of.streams);
    ggml_set_name(keys_, of.name);
    ggml_set_name(values_, "cache_v_l0");
    query_ = ggml_new_tensor_4d(c, GGML_TYPE_F32, of.key_dim, of.heads, of.rows, of.streams);
    mask_ = ggml_new_tensor_4d(c, GGML_TYPE_F16, of.cells, of.rows, 1, of.streams);
    const auto heads_of = [&](ggml_tensor* cache, int dim) {
      ggml_tensor* view = ggml_view_4d(c, cache, dim, of.kv_heads, of.cells, of.streams,
                                       ggml_row_size(of.type, dim), cache->nb[1], cache->nb[2], 0);
      return ggml_permute(c, view, 0, 2, 1, 3);
    };
    out_ = ggml_flash_attn_ext(c, ggml_permute(c, query_, 0, 2, 1, 3), heads_of(keys_, of.key_dim),
                               heads_of(values_, of.value_dim), mask_, 0.125F, of.max_bias,
                               of.soft_cap);
    if (of.sinks) {
      sinks_ = ggml_new_tensor_1d(c, GGML_TYPE_F32, of.heads);
      ggml_flash_attn_ext_add_sinks(out_, sinks_);
    }
    graph_ = ggml_new_graph(c);
    ggml_build_forward_expand(graph_, out_);
    buffer_.reset(ggml_backend_alloc_ctx_tensors_from_buft(c, ggml_backend_cpu_buffer_type()));
    fill(keys_, 1);
    fill(values_, 2);
    fill(query_, 3);
    if (sinks_ != nullptr) fill(sinks_, 4);
    auto* bits = static_cast<ggml_fp16_t*>(mask_->data);
    const RandomStream coins({.seed = 5});
    for (std::int64_t i = 0; i < ggml_nelements(mask_); ++i) {
      bits[i] =
          ggml_fp32_to_fp16(coins.below(static_cast<std::uint32_t>(i), 2) == 0 ? -INFINITY : 0);
    }
  }

  std::vector<float> run(ggml_backend_t backend) {
    std::memset(out_->data, 0, ggml_nbytes(out_));
    CHECK(ggml_backend_graph_compute(backend, graph_) == GGML_STATUS_SUCCESS);
    const auto* data = static_cast<const float*>(out_->data);
    return {data, data + ggml_nelements(out_)};
  }
  ggml_tensor* attention() { return out_; }

 private:
  static void fill(ggml_tensor* tensor, std::uint64_t seed) {
    const RandomStream stream({.seed = seed});
    std::vector<float> numbers(static_cast<std::size_t>(ggml_nelements(tensor)));
    for (std::size_t i = 0; i < numbers.size(); ++i) {
      numbers[i] = static_cast<float>(stream.normals(static_cast<std::uint32_t>(i))[0]);
    }
    if (tensor->type == GGML_TYPE_F32) {
      std::memcpy(tensor->data, numbers.data(), ggml_nbytes(tensor));
    } else {
      ggml_quantize_chunk(tensor->type, numbers.data(), tensor->data, 0, ggml_nrows(tensor),
                          tensor->ne[0], nullptr);
    }
  }

  Attention of_;
  ggml_context_ptr context_;
  ggml_backend_buffer_ptr buffer_;
  ggml_tensor *keys_, *values_, *query_, *mask_, *out_, *sinks_ = nullptr;
  ggml_cgraph* graph_;
};

ggml_backend_dev_t device() {
  llama::register_device();
  return ggml_backend_dev_by_name("magicpig");
}

}  // namespace

TEST_CASE("exact attention of one operation is that of ggml's CPU backend") {
  const ggml_backend_ptr cpu(ggml_backend_cpu_init());
  const ggml_backend_ptr ours(ggml_backend_dev_init(device(), nullptr));
  llama::use({.method = llama::Method::kExact, .max_rows = 5});
  for (const Attention& of :
       {Attention{}, Attention{.type = GGML_TYPE_Q8_0}, Attention{.soft_cap = 2.0F},
        Attention{.sinks = true}, Attention{.soft_cap = 3.0F, .sinks = true},
        Attention{.key_dim = 192, .value_dim = 128}, Attention{.heads = 8, .kv_heads = 8},
        Attention{.heads = 32, .kv_heads = 4, .key_dim = 128, .value_dim = 128},
        Attention{.streams = 3}, Attention{.rows = 5}, Attention{.streams = 2, .rows = 3},
        Attention{.cells = 1}, Attention{.cells = 64},
        Attention{.cells = 20000, .type = GGML_TYPE_Q8_0}}) {
    CAPTURE(of.cells);
    CAPTURE(of.key_dim);
    CAPTURE(of.streams);
    CAPTURE(of.rows);
    CAPTURE(of.soft_cap);
    CAPTURE(of.sinks);
    Graph graph(of);
    REQUIRE(ggml_backend_dev_supports_op(device(), graph.attention()));
    const auto wanted = graph.run(cpu.get());
    llama::invalidate();          // another cache under the same name
    if (of.cells == 1) continue;  // hidden: the next test
    CHECK(difference(graph.run(ours.get()), wanted) < 0.01);
    CHECK(llama::totals().fallbacks == 0);
  }
}

TEST_CASE("a query that sees nothing gets zeros") {
  const ggml_backend_ptr ours(ggml_backend_dev_init(device(), nullptr));
  llama::use({.method = llama::Method::kSignatures});
  Graph graph({.cells = 1});
  for (const float x : graph.run(ours.get())) CHECK(x == 0.0F);
}

TEST_CASE("operations that the library does not have are refused") {
  llama::use({});
  const auto supports = [](const Attention& of) {
    Graph graph(of);
    return ggml_backend_dev_supports_op(device(), graph.attention());
  };
  CHECK(supports({}));
  CHECK_FALSE(supports({.rows = 2}));                    // a prompt
  CHECK_FALSE(supports({.type = GGML_TYPE_F32}));        // another type
  CHECK_FALSE(supports({.type = GGML_TYPE_Q4_0}));       //
  CHECK_FALSE(supports({.max_bias = 8.0F}));             // ALiBi
  CHECK_FALSE(supports({.name = "k"}));                  // no cache
  CHECK_FALSE(supports({.heads = 128, .kv_heads = 1}));  // more heads than kMaxGroup
}
