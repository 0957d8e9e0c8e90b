// SPDX-License-Identifier: Apache-2.0
// Keys and values read where an engine has them: one function for each layout, as docs/layouts.md
// shows them.
#include <cstdio>
#include <magicpig/attention.hpp>
#include <magicpig/core/block_column_key_values.hpp>
#include <magicpig/core/ggml_key_values.hpp>
#include <magicpig/core/listed_key_values.hpp>
#include <magicpig/core/paged_key_values.hpp>
#include <magicpig/core/ring_key_values.hpp>
#include <vector>

using namespace magicpig;

// Memory of an engine with 2 KV heads of 64 dimensions. It is filled with one number here, so that
// every layout finds keys and values in it.
struct Engine {
  Shape shape{.query_heads = 8, .kv_heads = 2, .head_dim = 64, .value_dim = 64};
  TokenId tokens = 1000;
  std::int64_t pages = 100;  // in a pool, of 16 tokens
  std::vector<fp16> keys = std::vector<fp16>(1600 * 2 * 64, to_fp16(0.5F));
  std::vector<fp16> values = keys;
  std::vector<std::int32_t> block_table;   // of the pages of one request
  std::vector<std::int64_t> token_to_row;  // or of its tokens
};

Result<StridedKeyValues<fp16>> strided(const Engine& e) {
  // [tokens, kv_heads, dim], with room for more tokens behind these.
  return StridedKeyValues<fp16>::token_major(e.keys.data(), e.values.data(), e.shape, e.tokens);
}

Result<StridedKeyValues<fp16>> side_by_side(const Engine& e) {
  // One allocation [tokens, kv_heads, 2, dim]: a head's value follows its key.
  constexpr ByteStrides kStrides{.head = 2 * 64 * 2, .token = 2 * 2 * 64 * 2};
  return StridedKeyValues<fp16>::create({.keys = e.keys.data(),
                                         .values = e.keys.data() + 64,
                                         .key_strides = kStrides,
                                         .value_strides = kStrides,
                                         .kv_heads = 2,
                                         .head_dim = 64,
                                         .value_dim = 64,
                                         .tokens = e.tokens / 2});
}

Result<PagedKeyValues<fp16>> paged(const Engine& e) {
  // Pools [pages, page_tokens, kv_heads, dim] (NHD). Of HND pages, [kv_heads, page_tokens, dim],
  // head and token swap what they have here.
  constexpr PageStrides kStrides{.page = 16 * 2 * 64 * 2, .head = 64 * 2, .token = 2 * 64 * 2};
  return PagedKeyValues<fp16>::create({.keys = e.keys.data(),
                                       .values = e.values.data(),
                                       .key_strides = kStrides,
                                       .value_strides = kStrides,
                                       .block_table = e.block_table,
                                       .physical_pages = e.pages,
                                       .page_tokens = 16,
                                       .kv_heads = 2,
                                       .head_dim = 64,
                                       .value_dim = 64,
                                       .tokens = e.tokens});
}

Result<BlockColumnKeyValues<fp16>> block_columns(const Engine& e) {
  // vLLM on CPUs: keys [pages, kv_heads, dim, page_tokens], values [.., page_tokens, dim].
  return BlockColumnKeyValues<fp16>::dense({.keys = e.keys.data(),
                                            .values = e.values.data(),
                                            .block_table = e.block_table,
                                            .physical_pages = e.pages,
                                            .page_tokens = 16,
                                            .kv_heads = 2,
                                            .head_dim = 64,
                                            .value_dim = 64,
                                            .tokens = e.tokens});
}

Result<ListedKeyValues<fp16, fp16, std::int64_t>> listed(const Engine& e) {
  // SGLang: pools [rows, kv_heads, dim], and the row of each token of the request.
  constexpr ByteStrides kStrides{.head = 64 * 2, .token = 2 * 64 * 2};
  return ListedKeyValues<fp16, fp16, std::int64_t>::create({.keys = e.keys.data(),
                                                            .values = e.values.data(),
                                                            .key_strides = kStrides,
                                                            .value_strides = kStrides,
                                                            .ids = e.token_to_row,
                                                            .pool_rows = 1600,
                                                            .kv_heads = 2,
                                                            .head_dim = 64,
                                                            .value_dim = 64});
}

Result<RingKeyValues<fp16>> ring(const Engine& e) {
  // gemma.cpp: [slots, kv_heads, 2, dim], token t in slot t % 512. It has gone round: of the 1,000
  // tokens written the newest 512 exist, which newest() numbers from 0.
  constexpr ByteStrides kStrides{.head = 2 * 64 * 2, .token = 2 * 2 * 64 * 2};
  const auto all = RingKeyValues<fp16>::create({.keys = e.keys.data(),
                                                .values = e.keys.data() + 64,
                                                .key_strides = kStrides,
                                                .value_strides = kStrides,
                                                .capacity = 512,
                                                .kv_heads = 2,
                                                .head_dim = 64,
                                                .value_dim = 64,
                                                .tokens = e.tokens});
  if (!all.ok()) return all.status();
  return all->newest();
}

template <class Use>
Status of_ggml(const GgmlTensor& k, const GgmlTensor& v, const Use& use) {
  // llama.cpp: k and v as ggml_flash_attn_ext() takes them, of types known when running. Code is
  // compiled for the pairs named: with -ctk q8_0 -ctv f16 for the second one.
  using Pairs = GgmlPairs<GgmlPair<fp16>, GgmlPair<q8_0, fp16>>;
  return visit_ggml_key_values<Pairs>(k, v, use);
}

// Exact attention of one step over any source.
template <class Source>
Status attend(const char* name, const Engine& e, const Source& source) {
  const std::vector<float> query(8 * 64, 0.25F);
  std::vector<float> out(8 * 64);
  std::vector<AttentionState> states;
  for (std::size_t h = 0; h < 8; ++h) states.push_back({.out = std::span(out).subspan(h * 64, 64)});
  const Exact sampler;
  const DecodePlan<Exact> plan{.shape = e.shape, .sampler = &sampler};
  SerialExecutor serial;
  // Named, as rows of some sources must be copied.
  std::vector<std::byte> workspace(workspace_bytes<Source>(plan, source.tokens(), 1));
  const Request<Source> requests[] = {{.key_values = &source, .query = query, .states = states}};
  const Status status = decode(make_backend<ScalarOps>(serial), plan, requests, workspace);
  std::printf("%-14s %4d tokens, lse %.3f, out %.3f ... %s\n", name, source.tokens(), states[0].lse,
              out[0], status.message());
  return status;
}

int main() {
  Engine e;
  for (std::int32_t i = 0; i < 63; ++i) e.block_table.push_back(99 - i);
  for (std::int64_t t = 0; t < 1000; ++t) e.token_to_row.push_back(t * 7 % 1600);
  const auto tensor = [&](const std::vector<fp16>& memory) {
    return GgmlTensor{.data = memory.data(),
                      .type = GgmlType::kF16,
                      .ne = {64, e.tokens, 2, 1},
                      .nb = {2, 2 * 64 * 2, 64 * 2, 1600 * 2 * 64 * 2}};
  };
  bool ok = true;
  const auto show = [&](const char* name, const auto& source) {
    const Status status = source.ok() ? attend(name, e, *source) : source.status();
    if (!status.ok()) std::printf("%s: %s\n", name, status.message());
    ok = ok && status.ok();
  };
  show("strided", strided(e));
  show("side by side", side_by_side(e));
  show("paged", paged(e));
  show("block columns", block_columns(e));
  show("listed", listed(e));
  show("ring", ring(e));
  const Status status = of_ggml(tensor(e.keys), tensor(e.values),
                                [&](const auto& source) { return attend("ggml", e, source); });
  return ok && status.ok() ? 0 : 1;
}
