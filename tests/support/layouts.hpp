// SPDX-License-Identifier: Apache-2.0
// The same keys and values in every layout that the library reads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "magicpig/core/block_column_key_values.hpp"
#include "magicpig/core/ggml_key_values.hpp"
#include "magicpig/core/listed_key_values.hpp"
#include "magicpig/core/paged_key_values.hpp"
#include "magicpig/core/ring_key_values.hpp"
#include "magicpig/core/views.hpp"
#include "random.hpp"
#include "row_batch.hpp"

namespace magicpig::test {

/// Memory in which all that has not been written is NaN, or large, so that reading it shows.
inline std::vector<std::byte> poisoned(std::int64_t bytes) {
  return std::vector<std::byte>(static_cast<std::size_t>(bytes), std::byte{0x7f});
}

/// Random keys and values, dense [kv_heads, tokens, dim]: what the other layouts are made from.
/// Tokens [64, 128) are those of [0, 64), so that pages of up to 64 tokens can be shared.
template <class K, class V>
struct PlainRows {
  static constexpr TokenId kRepeat = 64;

  PlainRows(const Shape& of, TokenId count, std::uint64_t seed) : shape(of), tokens(count) {
    Random random(seed);
    keys.resize(static_cast<std::size_t>(shape.kv_heads * tokens) * row_elements<K>(of.head_dim));
    values.resize(static_cast<std::size_t>(shape.kv_heads * tokens) *
                  row_elements<V>(of.value_dim));
    for (int h = 0; h < shape.kv_heads; ++h) {
      for (TokenId t = 0; t < tokens; ++t) {
        fill_row(random, const_cast<K*>(source().key(h, t)), shape.head_dim);
        fill_row(random, const_cast<V*>(source().value(h, t)), shape.value_dim);
        if (t < kRepeat || t >= 2 * kRepeat) continue;
        std::memcpy(const_cast<K*>(source().key(h, t)), source().key(h, t - kRepeat), key_bytes());
        std::memcpy(const_cast<V*>(source().value(h, t)), source().value(h, t - kRepeat),
                    value_bytes());
      }
    }
  }
  PlainRows(const PlainRows&) = delete;
  PlainRows& operator=(const PlainRows&) = delete;

  [[nodiscard]] StridedKeyValues<K, V> source() const {
    return *StridedKeyValues<K, V>::head_major(keys.data(), values.data(), shape, tokens);
  }
  [[nodiscard]] std::size_t key_bytes() const {
    return row_bytes<K>(static_cast<std::size_t>(shape.head_dim));
  }
  [[nodiscard]] std::size_t value_bytes() const {
    return row_bytes<V>(static_cast<std::size_t>(shape.value_dim));
  }

  Shape shape;
  TokenId tokens;
  std::vector<K> keys;
  std::vector<V> values;
};

/// Memory of an engine, and where in it keys and values begin.
template <class K, class V>
struct EngineMemory {
  /// Writes each row of `from` to key_at(h, t) and value_at(h, t), in bytes.
  template <class KeyAt, class ValueAt>
  EngineMemory(const PlainRows<K, V>& from, std::int64_t bytes, std::int64_t values_at,
               const KeyAt& key_at, const ValueAt& value_at)
      : memory(poisoned(bytes)), values_at_(values_at) {
    for (int h = 0; h < from.shape.kv_heads; ++h) {
      for (TokenId t = 0; t < from.tokens; ++t) {
        std::memcpy(memory.data() + key_at(h, t), from.source().key(h, t), from.key_bytes());
        std::memcpy(memory.data() + values_at + value_at(h, t), from.source().value(h, t),
                    from.value_bytes());
      }
    }
  }
  [[nodiscard]] const K* keys() const { return reinterpret_cast<const K*>(memory.data()); }
  [[nodiscard]] const V* values() const {
    return reinterpret_cast<const V*>(memory.data() + values_at_);
  }

  std::vector<std::byte> memory;

 private:
  std::int64_t values_at_;
};

/// Bytes of rows of both kinds, up to a multiple of what any scalar is aligned to.
template <class K, class V>
struct RowSizes {
  explicit RowSizes(const PlainRows<K, V>& from)
      : key(static_cast<std::int64_t>(from.key_bytes())),
        value(static_cast<std::int64_t>(from.value_bytes())),
        heads(from.shape.kv_heads) {}
  std::int64_t key;
  std::int64_t value;
  std::int64_t heads;
};

/// [tokens, kv_heads, dim], the values behind all keys.
template <class K, class V>
class TokenMajorLayout {
 public:
  using Source = StridedKeyValues<K, V>;
  explicit TokenMajorLayout(const PlainRows<K, V>& from)
      : sizes_(from),
        memory_(
            from, from.tokens * sizes_.heads * (sizes_.key + sizes_.value),
            from.tokens * sizes_.heads * sizes_.key,
            [&](int h, std::int64_t t) { return (t * sizes_.heads + h) * sizes_.key; },
            [&](int h, std::int64_t t) { return (t * sizes_.heads + h) * sizes_.value; }),
        source(*Source::token_major(memory_.keys(), memory_.values(), from.shape, from.tokens)) {}

 private:
  RowSizes<K, V> sizes_;
  EngineMemory<K, V> memory_;

 public:
  Source source;
};

/// The value of a head next to its key, with a gap behind each token.
template <class K, class V>
class AdjacentLayout {
 public:
  using Source = StridedKeyValues<K, V>;
  explicit AdjacentLayout(const PlainRows<K, V>& from)
      : sizes_(from),
        pair_(sizes_.key + sizes_.value),
        stride_(sizes_.heads * pair_ + 64),
        memory_(
            from, from.tokens * stride_, sizes_.key,
            [&](int h, std::int64_t t) { return t * stride_ + h * pair_; },
            [&](int h, std::int64_t t) { return t * stride_ + h * pair_; }),
        source(*Source::create({.keys = memory_.keys(),
                                .values = memory_.values(),
                                .key_strides = {.head = pair_, .token = stride_},
                                .value_strides = {.head = pair_, .token = stride_},
                                .kv_heads = from.shape.kv_heads,
                                .head_dim = from.shape.head_dim,
                                .value_dim = from.shape.value_dim,
                                .tokens = from.tokens})) {}

 private:
  RowSizes<K, V> sizes_;
  std::int64_t pair_;
  std::int64_t stride_;
  EngineMemory<K, V> memory_;

 public:
  Source source;
};

/// A ring that has gone round: the oldest token is in slot 13.
template <class K, class V>
class RingLayout {
 public:
  using Source = RingKeyValues<K, V>;
  static constexpr TokenId kOldest = 13;
  explicit RingLayout(const PlainRows<K, V>& from)
      : sizes_(from),
        pair_(sizes_.key + sizes_.value),
        stride_(sizes_.heads * pair_),
        memory_(
            from, from.tokens * stride_, sizes_.key,
            [&](int h, std::int64_t t) { return slot(from, t) * stride_ + h * pair_; },
            [&](int h, std::int64_t t) { return slot(from, t) * stride_ + h * pair_; }),
        source(Source::create({.keys = memory_.keys(),
                               .values = memory_.values(),
                               .key_strides = {.head = pair_, .token = stride_},
                               .value_strides = {.head = pair_, .token = stride_},
                               .capacity = from.tokens,
                               .kv_heads = from.shape.kv_heads,
                               .head_dim = from.shape.head_dim,
                               .value_dim = from.shape.value_dim,
                               .tokens = from.tokens + kOldest})
                   ->newest()) {}

 private:
  static std::int64_t slot(const PlainRows<K, V>& from, std::int64_t t) {
    return (t + kOldest) % from.tokens;
  }

  RowSizes<K, V> sizes_;
  std::int64_t pair_;
  std::int64_t stride_;
  EngineMemory<K, V> memory_;

 public:
  Source source;
};

/// Pages as a block table names them: backwards, each second one left out, and those of repeated
/// tokens shared.
inline std::vector<std::int32_t> shared_pages(TokenId tokens, int page) {
  std::vector<std::int32_t> table;
  const int repeat = PlainRows<float, float>::kRepeat / page;
  const int count = (tokens - 1) / page + 1;
  for (int i = 0; i < count; ++i) {
    const bool shared = i >= repeat && i < 2 * repeat && (i + 1) * page <= tokens;
    table.push_back(shared ? table[static_cast<std::size_t>(i - repeat)] : 2 * (count - i));
  }
  return table;
}
inline std::int64_t physical_pages(const std::vector<std::int32_t>& table) {
  return 2 * static_cast<std::int64_t>(table.size()) + 1;
}

/// Pages of kPage tokens. Of 32 tokens [kv_heads, page, dim], with the values behind the keys of a
/// page; of others [page, kv_heads, dim], with values in a pool of their own.
template <int kPage>
struct Paged {
  template <class K, class V>
  class Layout {
   public:
    using Source = PagedKeyValues<K, V>;
    explicit Layout(const PlainRows<K, V>& from)
        : sizes_(from),
          table(shared_pages(from.tokens, kPage)),
          strides_(kPage == 32 ? head_major() : token_major()),
          values_at_(kPage == 32 ? kPage * sizes_.heads * sizes_.key
                                 : physical_pages(table) * strides_.keys.page),
          memory_(
              from, physical_pages(table) * kPage * sizes_.heads * (sizes_.key + sizes_.value),
              values_at_, [&](int h, TokenId t) { return at(strides_.keys, h, t); },
              [&](int h, TokenId t) { return at(strides_.values, h, t); }),
          source(*Source::create({.keys = memory_.keys(),
                                  .values = memory_.values(),
                                  .key_strides = strides_.keys,
                                  .value_strides = strides_.values,
                                  .block_table = table,
                                  .physical_pages = physical_pages(table),
                                  .page_tokens = kPage,
                                  .kv_heads = from.shape.kv_heads,
                                  .head_dim = from.shape.head_dim,
                                  .value_dim = from.shape.value_dim,
                                  .tokens = from.tokens})) {}
    Layout(const Layout&) = delete;
    Layout& operator=(const Layout&) = delete;

   private:
    struct Strides {
      PageStrides keys;
      PageStrides values;
    };
    [[nodiscard]] Strides head_major() const {
      const std::int64_t page = kPage * sizes_.heads * (sizes_.key + sizes_.value);
      return {.keys = {.page = page, .head = kPage * sizes_.key, .token = sizes_.key},
              .values = {.page = page, .head = kPage * sizes_.value, .token = sizes_.value}};
    }
    [[nodiscard]] Strides token_major() const {
      const std::int64_t key = sizes_.heads * sizes_.key;
      const std::int64_t value = sizes_.heads * sizes_.value;
      return {.keys = {.page = kPage * key, .head = sizes_.key, .token = key},
              .values = {.page = kPage * value, .head = sizes_.value, .token = value}};
    }
    [[nodiscard]] std::int64_t at(const PageStrides& s, int h, TokenId t) const {
      return table[static_cast<std::size_t>(t / kPage)] * s.page + h * s.head + t % kPage * s.token;
    }

    RowSizes<K, V> sizes_;

   public:
    std::vector<std::int32_t> table;

   private:
    Strides strides_;
    std::int64_t values_at_;
    EngineMemory<K, V> memory_;

   public:
    Source source;
  };
};
template <class K, class V>
using Paged16Layout = Paged<16>::Layout<K, V>;
template <class K, class V>
using Paged32Layout = Paged<32>::Layout<K, V>;
template <class K, class V>
using Paged64Layout = Paged<64>::Layout<K, V>;

/// A pool of rows [rows, kv_heads, dim], of which every third is used; repeated tokens share them.
template <class K, class V>
class ListedLayout {
 public:
  using Source = ListedKeyValues<K, V, std::int64_t>;
  explicit ListedLayout(const PlainRows<K, V>& from)
      : sizes_(from),
        ids(listed(from.tokens)),
        memory_(
            from, 3 * from.tokens * sizes_.heads * (sizes_.key + sizes_.value),
            3 * from.tokens * sizes_.heads * sizes_.key,
            [&](int h, TokenId t) {
              return (ids[static_cast<std::size_t>(t)] * sizes_.heads + h) * sizes_.key;
            },
            [&](int h, TokenId t) {
              return (ids[static_cast<std::size_t>(t)] * sizes_.heads + h) * sizes_.value;
            }),
        source(*Source::create(
            {.keys = memory_.keys(),
             .values = memory_.values(),
             .key_strides = {.head = sizes_.key, .token = sizes_.heads * sizes_.key},
             .value_strides = {.head = sizes_.value, .token = sizes_.heads * sizes_.value},
             .ids = ids,
             .pool_rows = 3 * std::int64_t{from.tokens},
             .kv_heads = from.shape.kv_heads,
             .head_dim = from.shape.head_dim,
             .value_dim = from.shape.value_dim})) {}
  ListedLayout(const ListedLayout&) = delete;
  ListedLayout& operator=(const ListedLayout&) = delete;

 private:
  static std::vector<std::int64_t> listed(TokenId tokens) {
    constexpr TokenId kRepeat = PlainRows<K, V>::kRepeat;
    std::vector<std::int64_t> rows;
    for (TokenId t = 0; t < tokens; ++t) {
      const bool shared = t >= kRepeat && t < 2 * kRepeat;
      rows.push_back(shared ? rows[static_cast<std::size_t>(t - kRepeat)]
                            : 3 * (std::int64_t{t} * 7 % tokens));
    }
    return rows;
  }

  RowSizes<K, V> sizes_;

 public:
  std::vector<std::int64_t> ids;

 private:
  EngineMemory<K, V> memory_;

 public:
  Source source;
};

/// As llama.cpp has it: [cells, kv_heads, dim] for the second of two sequences, seen permuted.
template <class K, class V>
class GgmlLayout {
 public:
  using Source = StridedKeyValues<K, V>;
  explicit GgmlLayout(const PlainRows<K, V>& from)
      : sizes_(from),
        cells_(from.tokens + 5),
        memory_(
            from, 2 * cells_ * sizes_.heads * (sizes_.key + sizes_.value),
            2 * cells_ * sizes_.heads * sizes_.key,
            [&](int h, std::int64_t t) { return ((cells_ + t) * sizes_.heads + h) * sizes_.key; },
            [&](int h, std::int64_t t) {
              return ((cells_ + t) * sizes_.heads + h) * sizes_.value;
            }),
        source(*ggml_key_values<K, V>(
            tensor(memory_.keys(), from, from.shape.head_dim, sizes_.key),
            tensor(memory_.values(), from, from.shape.value_dim, sizes_.value), 1)) {}

 private:
  template <class T>
  [[nodiscard]] GgmlTensor tensor(const T* data, const PlainRows<K, V>& from, int dim,
                                  std::int64_t row) const {
    const auto bytes = [](std::int64_t count) { return static_cast<std::size_t>(count); };
    return {.data = data,
            .type = kGgmlType<T>,
            .ne = {dim, from.tokens, sizes_.heads, 2},
            .nb = {sizeof(T), bytes(row * sizes_.heads), bytes(row),
                   bytes(row * sizes_.heads * cells_)}};
  }

  RowSizes<K, V> sizes_;
  std::int64_t cells_;
  EngineMemory<K, V> memory_;

 public:
  Source source;
};

/// As vLLM has it on CPUs, on pages of 32 tokens; K is a type of single scalars.
template <class K, class V>
class BlockColumnLayout {
 public:
  using Source = BlockColumnKeyValues<K, V>;
  static constexpr int kPage = 32;
  explicit BlockColumnLayout(const PlainRows<K, V>& from)
      : table(shared_pages(from.tokens, kPage)),
        keys_(poisoned(physical_pages(table) * kPage * from.shape.kv_heads *
                       static_cast<std::int64_t>(from.key_bytes()))),
        values_(poisoned(physical_pages(table) * kPage * from.shape.kv_heads *
                         static_cast<std::int64_t>(from.value_bytes()))),
        source(*Source::dense({.keys = reinterpret_cast<const K*>(keys_.data()),
                               .values = reinterpret_cast<const V*>(values_.data()),
                               .block_table = table,
                               .physical_pages = physical_pages(table),
                               .page_tokens = kPage,
                               .kv_heads = from.shape.kv_heads,
                               .head_dim = from.shape.head_dim,
                               .value_dim = from.shape.value_dim,
                               .tokens = from.tokens})) {
    for (int h = 0; h < from.shape.kv_heads; ++h) {
      for (TokenId t = 0; t < from.tokens; ++t) {
        const std::int64_t page =
            std::int64_t{table[static_cast<std::size_t>(t / kPage)]} * from.shape.kv_heads + h;
        K* columns = reinterpret_cast<K*>(keys_.data()) + page * kPage * from.shape.head_dim;
        for (int j = 0; j < from.shape.head_dim; ++j) {
          columns[j * kPage + t % kPage] = from.source().key(h, t)[j];
        }
        std::memcpy(values_.data() +
                        (page * kPage + t % kPage) * static_cast<std::int64_t>(from.value_bytes()),
                    from.source().value(h, t), from.value_bytes());
      }
    }
  }
  BlockColumnLayout(const BlockColumnLayout&) = delete;
  BlockColumnLayout& operator=(const BlockColumnLayout&) = delete;

  std::vector<std::int32_t> table;

 private:
  std::vector<std::byte> keys_;
  std::vector<std::byte> values_;

 public:
  Source source;
};

}  // namespace magicpig::test
