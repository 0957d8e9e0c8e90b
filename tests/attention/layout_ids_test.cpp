// SPDX-License-Identifier: Apache-2.0
// Which tokens are drawn from every layout that engines have, of every type: those that the plain
// layout draws, with the same probabilities, from indexes of the same bits.
#include <doctest/doctest.h>

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "layout_steps.hpp"
#include "layouts.hpp"
#include "magicpig/core/executor.hpp"
#include "magicpig/cpu/backend.hpp"
#include "magicpig/cpu/scalar.hpp"
#include "magicpig/hash/scalar_quantiser.hpp"
#include "magicpig/hash/simhash.hpp"
#include "magicpig/index/bucket_tables.hpp"
#include "magicpig/index/signatures.hpp"
#include "magicpig/sample/collision.hpp"
#include "magicpig/sample/systematic.hpp"
#include "same_index.hpp"

namespace {

using namespace magicpig;
using namespace magicpig::test;

using Codes = Signatures<HadamardQuantiser>;
using Tables = BucketTables<SimHash>;

// Built up to here, then appended to.
constexpr TokenRange kBuilt{.begin = kLayoutMiddle.begin, .end = 70};

// What is drawn for one KV head.
struct Drawn {
  std::vector<TokenId> tokens;
  std::vector<std::uint32_t> members;
  std::vector<float> log_pi;  // [group, tokens]

  friend bool operator==(const Drawn&, const Drawn&) = default;
};

// The inclusions do not know of layouts: these are compiled once, whatever is drawn from.
template <class Inclusion>
Drawn taken(const Candidates<Inclusion>& found, const QueryGroup& queries, const float* dots) {
  const auto count = static_cast<int>(found.tokens.size());
  Drawn drawn{.tokens = {found.tokens.begin(), found.tokens.end()},
              .members = {found.members.begin(), found.members.end()},
              .log_pi = {}};
  std::vector<std::int32_t> positions;
  std::vector<float> tile;  // [group, tokens]
  std::vector<HeadReads> heads;
  for (int i = 0; i < count; ++i) positions.push_back(i);
  for (int g = 0; g < queries.count; ++g) {
    heads.push_back({.row = 0, .at = g * count, .count = count});
    for (const TokenId token : found.tokens) tile.push_back(dots[g * kLayoutTokens + token]);
  }
  drawn.log_pi.resize(tile.size());
  found.inclusion.template log_probability<ScalarOps>({.tokens = found.tokens.data(),
                                                       .positions = positions.data(),
                                                       .dots = tile.data(),
                                                       .heads = heads,
                                                       .reads = count * queries.count},
                                                      drawn.log_pi.data());
  return drawn;
}

template <class Sampler>
struct Scratch {
  Scratch(const Sampler& sampler, const DrawLimits& limits) {
    Arena measure;
    (void)sampler.carve(measure, limits);
    memory.resize(measure.bytes_needed());
    Arena arena{std::span<std::byte>(memory)};
    arrays = sampler.carve(arena, limits);
  }
  std::vector<std::byte> memory;
  typename Sampler::Scratch arrays;
};

// An index over `source`, in two pieces, and what a sampler draws from it for each KV head.
template <class IndexType>
struct Found {
  IndexType index;
  Status status;
  Drawn drawn[kLayoutHeads];
};

template <class Sampler, class IndexType, class Source>
Found<IndexType> found_in(const Sampler& sampler, Result<IndexType> empty, const Source& source,
                          const LayoutStep& step, const float* dots) {
  SerialExecutor serial;
  const auto backend = make_backend<ScalarOps>(serial);
  Found<IndexType> found{.index = std::move(*empty), .status = Status(), .drawn = {}};
  found.status = found.index.build(backend, source, kBuilt);
  if (found.status.ok()) found.status = found.index.append(backend, source, kLayoutMiddle.end);
  const int group = step.shape.group();
  Scratch<Sampler> scratch(sampler, {.group = group, .tokens = kLayoutMiddle.size()});
  for (int h = 0; h < kLayoutHeads; ++h) {
    const QueryGroup queries{
        .data = step.query_of(h * group), .count = group, .dim = step.shape.head_dim};
    const DrawInput<Source, IndexType> input{.key_values = source,
                                             .index = found.index,
                                             .kv_head = h,
                                             .queries = queries,
                                             .noise = {.seed = 3, .step = 4}};
    found.drawn[h] = taken(sampler.template draw<ScalarOps>(input, scratch.arrays), queries,
                           dots + std::int64_t{h} * group * kLayoutTokens);
  }
  return found;
}

// Samplers of one head_dim.
struct Samplers {
  explicit Samplers(const Shape& shape)
      : value_dim(shape.value_dim),
        quantiser(std::move(*HadamardQuantiser::create(shape.head_dim, 2, 5))),
        systematic(*Systematic::create(quantiser, {.budget = {.fraction = 0.2}})),
        family(std::move(
            *SimHash::create({.dim = shape.head_dim, .bits = 4, .tables = 10, .seed = 6}))),
        collisions(std::move(*Collisions::create(family, {.min_collisions = 2}))) {}
  Samplers(const Samplers&) = delete;
  Samplers& operator=(const Samplers&) = delete;

  [[nodiscard]] Result<Codes> codes() const {
    return Codes::create(quantiser, {.kv_heads = kLayoutHeads, .value_dim = value_dim});
  }
  [[nodiscard]] Result<Tables> tables() const {
    return Tables::create(family,
                          {.kv_heads = kLayoutHeads, .segment_tokens = 100, .seal_tokens = 1});
  }

  int value_dim;
  HadamardQuantiser quantiser;
  Systematic systematic;
  SimHash family;
  Collisions collisions;
};

// What one layout gives.
struct Layouted {
  template <class Source>
  Layouted(const Samplers& samplers, const Source& source, const LayoutStep& step,
           const std::vector<float>& dots)
      : codes(found_in(samplers.systematic, samplers.codes(), source, step, dots.data())),
        tables(found_in(samplers.collisions, samplers.tables(), source, step, dots.data())) {}

  Found<Codes> codes;
  Found<Tables> tables;
};

// Inner products with all keys, [query heads, tokens].
template <class Source>
std::vector<float> products(const LayoutStep& step, const Source& source) {
  std::vector<float> dots;
  for (int head = 0; head < step.shape.query_heads; ++head) {
    for (TokenId t = 0; t < kLayoutTokens; ++t) {
      double dot = 0.0;
      for (int j = 0; j < step.shape.head_dim; ++j) {
        dot += static_cast<double>(step.query_of(head)[j]) *
               static_cast<double>(scalar_at(source.key(head / step.shape.group(), t), j));
      }
      dots.push_back(static_cast<float>(dot));
    }
  }
  return dots;
}

// What differs first, or null.
template <class IndexType>
const char* difference(const Found<IndexType>& a, const Found<IndexType>& b) {
  if (!a.status.ok() || !b.status.ok()) return "status";
  const char* index = index_difference(a.index, b.index);
  if (index != nullptr) return index;
  for (int h = 0; h < kLayoutHeads; ++h) {
    if (a.drawn[h].tokens != b.drawn[h].tokens) return "tokens";
    if (a.drawn[h] != b.drawn[h]) return "probabilities";
  }
  return nullptr;
}
const char* difference(const Layouted& a, const Layouted& b) {
  const char* codes = difference(a.codes, b.codes);
  return codes != nullptr ? codes : difference(a.tables, b.tables);
}

// Compiled once, as checks take long to compile.
void check_same(const Layouted& found, const Layouted& expected) {
  const char* different = difference(found, expected);
  CHECK_MESSAGE(different == nullptr, std::string(different == nullptr ? "" : different));
}
// Some tokens are drawn, and not all.
void check_plain(const Layouted& plain) {
  for (int h = 0; h < kLayoutHeads; ++h) {
    for (const Drawn* drawn : {&plain.codes.drawn[h], &plain.tables.drawn[h]}) {
      CHECK(!drawn->tokens.empty());
      CHECK(static_cast<TokenId>(drawn->tokens.size()) < kLayoutMiddle.size());
    }
  }
}

// Whether both indexes have noticed a row that is another's, and the draws from each.
void check_differs(const Layouted& found, const Layouted& expected) {
  CHECK(found.codes.status.ok());
  CHECK(found.tables.status.ok());
  CHECK(index_difference(found.codes.index, expected.codes.index) != nullptr);
  CHECK(index_difference(found.tables.index, expected.tables.index) != nullptr);
  const auto draws_differ = [](const auto& a, const auto& b) {
    return a.drawn[0].tokens != b.drawn[0].tokens || a.drawn[1].tokens != b.drawn[1].tokens;
  };
  CHECK(draws_differ(found.codes, expected.codes));
  CHECK(draws_differ(found.tables, expected.tables));
}

// One shape for each group, so that each of the dimensions comes.
template <class K, class V, template <class, class> class... Layouts>
void check_types(LayoutList<Layouts...>) {
  int number = 0;
  for (const int group : kLayoutGroups) {
    const LayoutDims* dims = &kLayoutDims[number++ % kLayoutDimsCount];
    if (!fits<K, V>(*dims)) dims = kLayoutDims;
    CAPTURE(group);
    CAPTURE(dims->key);
    const LayoutStep step(*dims, group);
    const Samplers samplers(step.shape);
    const PlainRows<K, V> rows(step.shape, kLayoutTokens, 17);
    const std::vector<float> dots = products(step, rows.source());
    const Layouted plain(samplers, rows.source(), step, dots);
    check_plain(plain);
    (check_same(Layouted(samplers, Layouts<K, V>(rows).source, step, dots), plain), ...);
  }
}

TEST_CASE("a wrong page, row, slot or stride is noticed in the codes, the buckets and the ids") {
  using Rows = PlainRows<float, float>;
  const LayoutStep step({64, 64}, 2);
  const Samplers samplers(step.shape);
  const Rows rows(step.shape, kLayoutTokens, 17);
  const std::vector<float> dots = products(step, rows.source());
  const auto found = [&](const auto& source) { return Layouted(samplers, source, step, dots); };
  const Layouted plain = found(rows.source());
  check_same(found(rows.source()), plain);
  Paged16Layout<float, float> paged(rows);
  check_same(found(paged.source), plain);
  paged.table[3] = paged.table[2];
  check_differs(found(paged.source), plain);
  BlockColumnLayout<float, float> columns(rows);
  check_same(found(columns.source), plain);
  columns.table[2] = columns.table[1];
  check_differs(found(columns.source), plain);
  ListedLayout<float, float> listed(rows);
  check_same(found(listed.source), plain);
  for (std::size_t t = 40; t < 56; ++t) listed.ids[t] = listed.ids[t + 16];
  check_differs(found(listed.source), plain);
  const auto ring = [&](TokenId written) {
    constexpr std::int64_t kRow = 64 * sizeof(float);
    constexpr ByteStrides kStrides{.head = kLayoutTokens * kRow, .token = kRow};
    return RingKeyValues<float>::create({.keys = rows.keys.data(),
                                         .values = rows.values.data(),
                                         .key_strides = kStrides,
                                         .value_strides = kStrides,
                                         .capacity = kLayoutTokens,
                                         .kv_heads = kLayoutHeads,
                                         .head_dim = 64,
                                         .value_dim = 64,
                                         .tokens = written})
        ->newest();
  };
  check_same(found(ring(kLayoutTokens)), plain);
  check_differs(found(ring(kLayoutTokens + 1)), plain);
  // Of values an index of codes has the norms, one of buckets nothing.
  auto values = rows.values;
  for (std::size_t i = 40 * 64; i < 56 * 64; ++i) values[i] = values[i + std::size_t{16 * 64}];
  const Layouted other = found(*StridedKeyValues<float>::head_major(rows.keys.data(), values.data(),
                                                                    step.shape, kLayoutTokens));
  const char* noticed = index_difference(other.codes.index, plain.codes.index);
  REQUIRE(noticed != nullptr);
  CHECK(std::string(noticed) == "value norms");
  CHECK(difference(other.tables, plain.tables) == nullptr);
}

TEST_CASE("every layout of float32 draws what the plain layout draws") {
  check_types<float, float>(AllLayouts());
}
TEST_CASE("every layout of float16 draws so") { check_types<fp16, fp16>(AllLayouts()); }
TEST_CASE("every layout of bfloat16 draws so") { check_types<bf16, bf16>(AllLayouts()); }
TEST_CASE("every layout of q8_0 draws so") { check_types<q8_0, q8_0>(BlockLayouts()); }
TEST_CASE("every layout of q4_0 draws so") { check_types<q4_0, q4_0>(BlockLayouts()); }
TEST_CASE("keys of q8_0 with values of float16 draw so") {
  check_types<q8_0, fp16>(LayoutList<GgmlLayout>());
}
TEST_CASE("keys of bfloat16 in columns with values of q4_0 draw so") {
  check_types<bf16, q4_0>(LayoutList<BlockColumnLayout>());
}

}  // namespace
