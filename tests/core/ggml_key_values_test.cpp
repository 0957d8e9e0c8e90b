// SPDX-License-Identifier: Apache-2.0
// Sources made from ggml's extents and strides: rows are where ggml has them, and what is no cache
// of rows is refused.
#include "magicpig/core/ggml_key_values.hpp"

#include <doctest/doctest.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <type_traits>
#include <vector>

namespace {

using namespace magicpig;

constexpr std::int64_t kHeads = 3;
constexpr std::int64_t kCells = 20;  // of which the tensors show kTokens
constexpr std::int64_t kTokens = 9;
constexpr std::int64_t kSequences = 2;

// As llama.cpp has them: cells of all heads' rows, [sequences, cells, heads, dim], seen permuted.
template <class T>
GgmlTensor tensor(const std::vector<T>& memory, std::int64_t dim) {
  const std::size_t row = row_bytes<T>(static_cast<std::size_t>(dim));
  return {.data = memory.data(),
          .type = kGgmlType<T>,
          .ne = {dim, kTokens, kHeads, kSequences},
          .nb = {sizeof(T), row * kHeads, row, row * kHeads * kCells}};
}

template <class T>
std::vector<T> memory(std::int64_t dim) {
  return std::vector<T>(row_bytes<T>(static_cast<std::size_t>(dim)) / sizeof(T) * kHeads * kCells *
                        kSequences);
}

template <class K, class V>
void check_rows() {
  const std::vector<K> keys = memory<K>(64);
  const std::vector<V> values = memory<V>(32);
  for (int sequence = 0; sequence < 2; ++sequence) {
    const auto source = ggml_key_values<K, V>(tensor(keys, 64), tensor(values, 32), sequence);
    REQUIRE(source.ok());
    CHECK(source->tokens() == kTokens);
    CHECK(source->kv_heads() == kHeads);
    CHECK(source->head_dim() == 64);
    CHECK(source->value_dim() == 32);
    int wrong = 0;
    for (int h = 0; h < kHeads; ++h) {
      for (TokenId t = 0; t < kTokens; ++t) {
        const std::int64_t row = (sequence * kCells + t) * kHeads + h;
        wrong += source->key(h, t) != keys.data() + row * (64 / kScalarsPerElement<K>);
        wrong += source->value(h, t) != values.data() + row * (32 / kScalarsPerElement<V>);
      }
    }
    CHECK(wrong == 0);
  }
}

TEST_CASE("rows of every type are where the strides say") {
  check_rows<float, float>();
  check_rows<fp16, fp16>();
  check_rows<bf16, bf16>();
  check_rows<q8_0, q8_0>();
  check_rows<q4_0, q4_0>();
  check_rows<q8_0, fp16>();
  check_rows<fp16, q4_0>();
}

TEST_CASE("types are ggml's numbers, and blocks its sizes") {
  static_assert(static_cast<int>(kGgmlType<float>) == 0);
  static_assert(static_cast<int>(kGgmlType<fp16>) == 1);
  static_assert(static_cast<int>(kGgmlType<q4_0>) == 2);
  static_assert(static_cast<int>(kGgmlType<q8_0>) == 8);
  static_assert(static_cast<int>(kGgmlType<bf16>) == 30);
  CHECK(sizeof(q8_0) == 34);
  CHECK(sizeof(q4_0) == 18);
}

// Bits of keys and values in the source that is visited, or -1.
template <class Pairs>
int visited(const GgmlTensor& k, const GgmlTensor& v, Status& status) {
  int bits = -1;
  status = visit_ggml_key_values<Pairs>(k, v, [&]<class Source>(const Source& source) {
    CHECK(source.tokens() == kTokens);
    CHECK(source.key(1, 2) != nullptr);
    const auto bits_of = []<class T>(const T*) {
      return static_cast<int>(8 * sizeof(T) / kScalarsPerElement<T>);
    };
    bits = 100 * bits_of(source.key(0, 0)) + bits_of(source.value(0, 0));
    return Status();
  });
  return bits;
}

TEST_CASE("the visitor gets the source of the tensors' types") {
  const auto f32 = memory<float>(32);
  const auto f16 = memory<fp16>(32);
  const auto q8 = memory<q8_0>(32);
  Status status;
  CHECK(visited<SameGgmlTypes>(tensor(f32, 32), tensor(f32, 32), status) == 3232);
  CHECK(status.ok());
  CHECK(visited<SameGgmlTypes>(tensor(q8, 32), tensor(q8, 32), status) == 808);
  using Mixed = GgmlPairs<GgmlPair<fp16>, GgmlPair<q8_0, fp16>>;
  CHECK(visited<Mixed>(tensor(q8, 32), tensor(f16, 32), status) == 816);
  CHECK(visited<Mixed>(tensor(f16, 32), tensor(f16, 32), status) == 1616);
  CHECK(visited<Mixed>(tensor(f16, 32), tensor(q8, 32), status) == -1);
  CHECK(std::string(status.message()) ==
        "k.type 1 with v.type 8 is none of the 2 pairs compiled in");
  GgmlTensor unknown = tensor(f32, 32);
  unknown.type = static_cast<GgmlType>(14);  // Q6_K
  CHECK(visited<SameGgmlTypes>(unknown, unknown, status) == -1);
  CHECK(std::string(status.message()) ==
        "k.type 14 with v.type 14 is none of the 5 pairs compiled in");
}

TEST_CASE("what the visitor returns is returned, and errors come before it") {
  const auto f32 = memory<float>(32);
  const GgmlTensor good = tensor(f32, 32);
  const auto refuse = [](const auto&) { return Status::error(ErrorCode::kNonFinite, "no"); };
  CHECK(visit_ggml_key_values(good, good, refuse).code() == ErrorCode::kNonFinite);
  CHECK(visit_ggml_key_values(good, good, refuse, 2).code() == ErrorCode::kInvalidArgument);
}

template <class Change>
std::string refusal(const Change& change) {
  const auto keys = memory<fp16>(64);
  const auto values = memory<fp16>(32);
  GgmlTensor k = tensor(keys, 64);
  GgmlTensor v = tensor(values, 32);
  int sequence = 0;
  change(k, v, sequence);
  const auto source = ggml_key_values<fp16>(k, v, sequence);
  return source.ok() ? "accepted" : source.status().message();
}

TEST_CASE("tensors that are no cache of rows are refused") {
  using T = GgmlTensor;
  CHECK(refusal([](T&, T&, int&) {}) == "accepted");
  CHECK(refusal([](T& k, T&, int&) { k.type = GgmlType::kBf16; }) == "k.type is 30, not ggml's 1");
  CHECK(refusal([](T&, T& v, int&) { v.type = GgmlType::kF32; }) == "v.type is 0, not ggml's 1");
  CHECK(refusal([](T&, T&, int& s) { s = 2; }) == "sequence 2 must lie in [0, k.ne[3] = 2)");
  CHECK(refusal([](T&, T&, int& s) { s = -1; }) == "sequence -1 must lie in [0, k.ne[3] = 2)");
  CHECK(refusal([](T& k, T&, int&) { k.ne[1] = -1; }) ==
        "k.ne[1] = -1 must lie in [0, 2147483647]");
  CHECK(refusal([](T&, T& v, int&) { v.ne[0] = std::int64_t{1} << 31; }) ==
        "v.ne[0] = 2147483648 must lie in [0, 2147483647]");
  CHECK(refusal([](T&, T& v, int&) { v.ne[1] = 8; }) == "v.ne[1] = 8 is not k.ne[1] = 9");
  CHECK(refusal([](T&, T& v, int&) { v.ne[2] = 1; }) == "v.ne[2] = 1 is not k.ne[2] = 3");
  CHECK(refusal([](T& k, T&, int&) { k.data = static_cast<const std::byte*>(k.data) + 1; }) ==
        "k.data is not aligned to 2 bytes");
  CHECK(refusal([](T& k, T&, int&) { k.nb[1] = 3; }) ==
        "key_strides.token: 3 bytes are no multiple of the scalar's 2");
  CHECK(refusal([](T&, T& v, int&) { v.data = nullptr; }) == "values is null with 9 tokens");
}

TEST_CASE("values that are transposed are refused, as they are and permuted back") {
  // [heads, dim, cells], as llama.cpp keeps them without flash attention.
  const auto transposed = [](GgmlTensor&, GgmlTensor& v, int&) {
    v.ne[0] = kTokens;
    v.ne[1] = 32;
    v.nb[1] = kCells * 2;
    v.nb[2] = kCells * 2 * 32;
  };
  CHECK(refusal(transposed) == "v.ne[1] = 32 is not k.ne[1] = 9: v must not be transposed");
  const auto permuted = [](GgmlTensor&, GgmlTensor& v, int&) {
    v.nb[0] = kCells * 2;
    v.nb[1] = 2;
    v.nb[2] = kCells * 2 * 32;
  };
  CHECK(refusal(permuted) ==
        "v.nb[0] is 40 bytes, not the 2 of its type: rows must be contiguous, v not transposed");
}

TEST_CASE("a cache without tokens needs no data") {
  CHECK(refusal([](GgmlTensor& k, GgmlTensor& v, int&) {
          k.ne[1] = v.ne[1] = 0;
          k.data = v.data = nullptr;
        }) == "accepted");
}

}  // namespace
