// SPDX-License-Identifier: Apache-2.0
// The published algorithm, plainly from its description: the yardstick that decode/tables is held
// against.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <vector>

#include "magicpig/attention.hpp"
#include "workload.hpp"

namespace magicpig::bench {

inline constexpr int kPublishedBits = kPublished.bits;
inline constexpr int kPublishedTables = kPublished.tables;

/// L hash tables of all middle tokens of one layer: 32-bit ids ordered by bucket, 32-bit offsets.
class PublishedIndex {
 public:
  /// The same buckets as those of `index`.
  static PublishedIndex copy_of(const Tables& index, MemoryAdvice advice) {
    PublishedIndex copy;
    copy.tokens_ = static_cast<std::size_t>(index.indexed().size());
    const auto rows = static_cast<std::size_t>(index.kv_heads()) * kPublishedTables;
    if (!copy.ids_.resize(rows * copy.tokens_, advice) ||
        !copy.offsets_.resize(rows * (kBuckets + 1), advice)) {
      fail("no memory for the published index");
    }
    for (int h = 0; h < index.kv_heads(); ++h) {
      for (int table = 0; table < kPublishedTables; ++table) copy.fill(index, h, table);
    }
    return copy;
  }

  [[nodiscard]] std::span<const std::int32_t> bucket(int kv_head, int table, Code code) const {
    const std::size_t row =
        static_cast<std::size_t>(kv_head) * kPublishedTables + static_cast<std::size_t>(table);
    const std::int32_t* offsets = offsets_.data() + row * (kBuckets + 1) + code;
    const std::int32_t* ids = ids_.data() + row * tokens_;
    return {ids + offsets[0], ids + offsets[1]};
  }

  [[nodiscard]] std::size_t bytes() const { return ids_.bytes() + offsets_.bytes(); }

 private:
  static constexpr std::size_t kBuckets = std::size_t{1} << kPublishedBits;

  void fill(const Tables& index, int kv_head, int table) {
    const std::size_t row =
        static_cast<std::size_t>(kv_head) * kPublishedTables + static_cast<std::size_t>(table);
    std::int32_t* ids = ids_.data() + row * tokens_;
    std::int32_t* offsets = offsets_.data() + row * (kBuckets + 1);
    std::int32_t at = 0;
    for (std::size_t code = 0; code < kBuckets; ++code) {
      offsets[code] = at;
      for (int s = 0; s < index.segment_count(); ++s) {
        for (const std::uint16_t id :
             index.segment(s, kv_head).bucket(table, static_cast<int>(code))) {
          ids[at++] = index.segment_begin(s) + id;
        }
      }
    }
    offsets[kBuckets] = at;
  }

  std::size_t tokens_ = 0;
  Buffer<std::int32_t> ids_;      // [kv_heads, kPublishedTables, tokens]
  Buffer<std::int32_t> offsets_;  // [kv_heads, kPublishedTables, kBuckets + 1]
};

/// One query head after the other, as described in Chen et al. 2024, algorithm 1: clear a byte mask
/// of all tokens, walk the query's L buckets, take each token at its second hit; gather its key,
/// weigh it by one over 1 - (1-p^K)^L - L p^K (1-p^K)^(L-1) with p = 1 - acos(cosine) / pi;
/// softmax; gather the values. Sink and local tokens count one. Inner products and weighted sums
/// are the library's vector code for one head; there is no prefetch, and nothing is shared within a
/// group.
template <class T>
class PublishedDecode {
 public:
  struct Head {
    std::vector<TokenId> tokens;  // exact ones first, then those drawn
    std::vector<float> weights;
    std::vector<const T*> rows;
    std::vector<std::uint8_t> mask;
    std::vector<Code> codes;
    std::vector<float> projections;
  };

  PublishedDecode(Workload<T>& workload, int workers)
      : workload_(workload), heads_(static_cast<std::size_t>(workers)) {
    for (Head& head : heads_) {
      head.mask.resize(static_cast<std::size_t>(workload.shape().tokens));
      head.codes.resize(kPublishedTables);
      head.projections.resize(workload.family().scratch_floats(1));
      head.tokens.reserve(head.mask.size());
      head.weights.reserve(head.mask.size());
      head.rows.reserve(head.mask.size());
    }
  }

  /// Attention of all query heads to one layer; out [query_heads, head_dim].
  void run(ThreadPool& pool, const PublishedIndex& index, std::span<float> out) {
    const int heads = workload_.attention_shape().query_heads;
    pool.parallel_for(heads, [&](int query_head, int worker) {
      attend(index, query_head, heads_[static_cast<std::size_t>(worker)],
             out.data() + std::int64_t{query_head} * dim());
    });
  }

  /// What one head draws: tokens of the middle, in the order of their second hits.
  std::span<const TokenId> draw(const PublishedIndex& index, int query_head, Head& head) const {
    workload_.family().template hash<Ops>(query(query_head), 1, head.codes.data(),
                                          head.projections.data());
    head.tokens.clear();
    const TokenRange middle = workload_.middle();
    for (TokenId t = 0; t < middle.begin; ++t) head.tokens.push_back(t);
    for (TokenId t = middle.end; t < workload_.shape().tokens; ++t) head.tokens.push_back(t);
    const std::size_t exact = head.tokens.size();
    std::memset(head.mask.data(), 0, head.mask.size());
    for (int table = 0; table < kPublishedTables; ++table) {
      const Code code = head.codes[static_cast<std::size_t>(table)];
      for (const std::int32_t id : index.bucket(query_head / group(), table, code)) {
        if (++head.mask[static_cast<std::size_t>(id)] == 2) head.tokens.push_back(id);
      }
    }
    return std::span<const TokenId>(head.tokens).subspan(exact);
  }

  [[nodiscard]] Head& head(int worker) { return heads_[static_cast<std::size_t>(worker)]; }

 private:
  [[nodiscard]] int group() const { return workload_.shape().group; }
  [[nodiscard]] int dim() const { return workload_.shape().head_dim; }
  [[nodiscard]] const float* query(int query_head) const {
    return workload_.queries().data() + std::int64_t{query_head} * dim();
  }

  void attend(const PublishedIndex& index, int query_head, Head& head, float* out) const {
    const int kv_head = query_head / group();
    const std::size_t drawn = draw(index, query_head, head).size();
    const auto& view = workload_.view();
    head.rows.clear();
    for (const TokenId t : head.tokens) head.rows.push_back(view.key(kv_head, t));
    head.weights.resize(head.tokens.size());
    const auto count = static_cast<int>(head.rows.size());
    Ops::dot_rows(Rows<T>{.rows = head.rows.data(), .count = count, .dim = dim()},
                  query(query_head), 1, head.weights.data());
    weigh(kv_head, query(query_head), drawn, head);
    head.rows.clear();
    for (const TokenId t : head.tokens) head.rows.push_back(view.value(kv_head, t));
    for (int j = 0; j < dim(); ++j) out[j] = 0.0F;
    Ops::add_rows(Rows<T>{.rows = head.rows.data(), .count = count, .dim = dim()},
                  head.weights.data(), 1, out);
  }

  // Inner products of exact and drawn tokens to softmax weights.
  void weigh(int kv_head, const float* q, std::size_t drawn, Head& head) const {
    const float* centre = workload_.index().centre(kv_head);
    const float* norms = workload_.index().norms(kv_head);
    float shift = 0.0F;
    float square = 0.0F;
    for (int j = 0; j < dim(); ++j) {
      shift += q[j] * centre[j];
      square += q[j] * q[j];
    }
    const float inverse = 1.0F / std::sqrt(square);
    const std::size_t exact = head.tokens.size() - drawn;
    for (std::size_t i = 0; i < head.weights.size(); ++i) {
      const float dot = head.weights[i];
      head.weights[i] = dot * workload_.scale();
      if (i < exact) continue;
      const float norm = norms[head.tokens[i] - workload_.middle().begin];
      const float p = 1.0F - std::acos((dot - shift) * inverse / norm) * 0.318309886F;
      const float a = std::pow(p, static_cast<float>(kPublishedBits));
      const float none = std::pow(1.0F - a, static_cast<float>(kPublishedTables - 1));
      head.weights[i] -= std::log(1.0F - none * (1.0F - a) - kPublishedTables * a * none);
    }
    const auto count = static_cast<int>(head.weights.size());
    const float sum =
        Ops::exp_sum(head.weights.data(), count, (Ops::max)(head.weights.data(), count));
    for (float& weight : head.weights) weight /= sum;
  }

  Workload<T>& workload_;
  std::vector<Head> heads_;
};

}  // namespace magicpig::bench
