// SPDX-License-Identifier: Apache-2.0
// Fuzz target: saved bytes, good ones that were changed or made up ones, are refused without a
// change, or loaded; what was loaded is saved as the same bytes, and can be drawn from and changed.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <span>
#include <utility>
#include <vector>

#include "magicpig/attention.hpp"
#include "magicpig/hash/product_quantiser.hpp"
#include "magicpig/index/per_head_index.hpp"
#include "magicpig/sample/per_head.hpp"
#include "problem.hpp"
#include "reseal.hpp"

namespace magicpig::test {
namespace {

void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "not so: %s\n", what);
  std::abort();
}

constexpr Shape kShape{.query_heads = 2, .kv_heads = 1, .head_dim = 8, .value_dim = 4};
constexpr TokenId kTokens = 300;

struct Setting {
  Problem<float> problem{{.shape = kShape, .tokens = kTokens, .seed = 2, .key_offset = 0.5}};
  SerialExecutor executor;
  HadamardQuantiser quantiser = std::move(*HadamardQuantiser::create(8, 1, 3));
  SimHash family = std::move(*SimHash::create({.dim = 8, .bits = 2, .tables = 3, .seed = 3}));
  Systematic by_codes = *Systematic::create(quantiser, {.budget = {.tokens = 20}});
  Collisions by_tables = std::move(*Collisions::create(family, {.min_collisions = 1}));

  [[nodiscard]] auto backend() { return make_backend<ScalarOps>(executor); }
};

Setting& setting() {
  static Setting one;
  return one;
}

std::vector<std::byte> save(const auto& saved) {
  std::vector<std::byte> bytes(saved.saved_bytes());
  require(saved.save(bytes).ok(), "it is saved");
  return bytes;
}

// A good blob, or one whose fields are the input's.
std::vector<std::byte> make_blob(const std::vector<std::byte>& good, BlobKind kind,
                                 std::span<const std::uint8_t> input) {
  const int mode = input.empty() ? 0 : input[0] % 4;
  if (!input.empty()) input = input.subspan(1);
  if (mode == 3) {  // as it comes
    const auto bytes = std::as_bytes(input);
    return {bytes.begin(), bytes.end()};
  }
  std::vector<std::byte> bytes = good;
  if (mode == 2) {
    const BlobHeader header{.kind = static_cast<std::uint32_t>(kind)};
    bytes.resize(sizeof header + input.size());
    std::memcpy(bytes.data(), &header, sizeof header);
    std::copy_n(std::as_bytes(input).begin(), input.size(), bytes.begin() + sizeof header);
  } else {
    // Bytes that are changed: two for where, counted from the first field, one for what.
    for (; input.size() >= 3; input = input.subspan(3)) {
      const std::size_t at =
          sizeof(BlobHeader) + static_cast<std::size_t>(input[0]) * 256 + input[1];
      if (at < bytes.size()) bytes[at] = static_cast<std::byte>(input[2]);
    }
    if (mode == 1 && !input.empty()) bytes.resize(bytes.size() - input[0] % 64);
  }
  reseal(bytes);
  return bytes;
}

template <class Index, class Sampler>
void try_index(const Index& built, const Sampler& sampler, Index& index, BlobKind kind,
               std::span<const std::uint8_t> input) {
  Setting& s = setting();
  const auto before = save(index);
  const auto bytes = make_blob(save(built), kind, input);
  if (!index.load(bytes).ok()) {
    require(save(index) == before, "a blob that is refused changes nothing");
    return;
  }
  require(save(index) == bytes, "what was loaded is saved as it was");
  const TokenRange range = index.indexed();
  if (range.end <= kTokens) {
    const auto source = s.problem.source();
    const DecodePlan<Sampler> plan{.shape = kShape, .sampler = &sampler, .exact_below = 0};
    Outputs outputs(kShape);
    const auto request = make_request(s.problem, source, &index, outputs);
    require(decode_one<ScalarOps>(s.executor, plan, request).code() != ErrorCode::kInvalidArgument,
            "it is drawn from");
    require(index.append(s.backend(), source, kTokens).ok(), "it is appended to");
  }
  if (!range.empty()) require(index.erase(std::vector{range.begin}).ok(), "a token is erased");
  require(index.truncate(range.begin + range.size() / 2).ok(), "it is truncated");
}

void try_signatures(std::span<const std::uint8_t> input) {
  Setting& s = setting();
  auto built = Signatures<HadamardQuantiser>::create(s.quantiser, {.value_dim = 4});
  require(built->build(s.backend(), s.problem.source(), {.begin = 2, .end = 200}).ok(), "built");
  require(built->erase(std::vector<TokenId>{5, 77}).ok(), "erased");
  auto index = built->fork();
  require(index->truncate(90).ok(), "cut");
  try_index(*built, s.by_codes, *index, BlobKind::kSignatures, input);
}

void try_tables(std::span<const std::uint8_t> input) {
  Setting& s = setting();
  auto built = BucketTables<SimHash>::create(s.family, {.segment_tokens = 64, .seal_tokens = 1});
  require(built->build(s.backend(), s.problem.source(), {.begin = 2, .end = 100}).ok(), "built");
  require(built->erase(std::vector<TokenId>{5, 77}).ok(), "erased");
  auto index = built->fork();
  require(index->truncate(50).ok(), "cut");
  try_index(*built, s.by_tables, *index, BlobKind::kBucketTables, input);
}

// Of the fields around the heads' own blobs, whose checksums stay as they are.
void try_profile(std::span<const std::uint8_t> input) {
  Setting& s = setting();
  constexpr HeadSetting kProfile[] = {{.kind = HeadKind::kSignatures, .bits = 1, .budget = 0.1}};
  static const auto hashes =
      HeadHashes::create(s.backend(), s.problem.source(), {0, kTokens}, kProfile);
  static const auto sampler = PerHead::create(*hashes);
  auto built = PerHeadIndex::create(*hashes);
  require(built->build(s.backend(), s.problem.source(), {.begin = 2, .end = 100}).ok(), "built");
  require(built->erase(std::vector<TokenId>{5, 77}).ok(), "erased");
  auto index = built->fork();
  require(index->truncate(50).ok(), "cut");
  try_index(*built, *sampler, *index, BlobKind::kPerHeadIndex, input);
}

void try_quantiser(std::span<const std::uint8_t> input) {
  Setting& s = setting();
  static const auto trained =
      ProductQuantiser::train(s.backend(), s.problem.source(), {0, kTokens}, {.bits = 2});
  const auto bytes = make_blob(save(*trained), BlobKind::kProductQuantiser, input);
  const auto loaded = ProductQuantiser::load(bytes);
  if (!loaded.ok()) return;
  require(save(*loaded) == bytes, "what was loaded is saved as it was");
  if (loaded->shape().dim != kShape.head_dim || loaded->kv_heads() != 1) return;
  auto index = Signatures<ProductQuantiser>::create(*loaded, {.value_dim = 4});
  require(index->build(s.backend(), s.problem.source(), {.begin = 2, .end = 200}).ok(), "built");
  const auto sampler = Systematic::create(*loaded, {.budget = {.tokens = 20}});
  const DecodePlan<Systematic> plan{.shape = kShape, .sampler = &*sampler, .exact_below = 0};
  const auto source = s.problem.source();
  Outputs outputs(kShape);
  require(decode_one<ScalarOps>(s.executor, plan, make_request(s.problem, source, &*index, outputs))
              .ok(),
          "it is drawn from");
}

}  // namespace
}  // namespace magicpig::test

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace magicpig::test;
  const std::span<const std::uint8_t> input(data, size);
  if (input.empty()) return 0;
  if (input[0] % 4 == 0) try_signatures(input.subspan(1));
  if (input[0] % 4 == 1) try_tables(input.subspan(1));
  if (input[0] % 4 == 2) try_quantiser(input.subspan(1));
  if (input[0] % 4 == 3) try_profile(input.subspan(1));
  return 0;
}
