// SPDX-License-Identifier: Apache-2.0
// The host's part of a layer: hash tables, keys and values of all tokens but the first and the
// newest.
#pragma once

#include <cstddef>
#include <magicpig/attention.hpp>
#include <magicpig/index/hashed_keys.hpp>
#include <memory>
#include <span>
#include <vector>

namespace magicpig::hybrid {

inline constexpr int kQueryHeads = 32;
inline constexpr int kKvHeads = 8;
inline constexpr int kDim = 128;
inline constexpr int kFunctions = 10;  ///< K
inline constexpr int kTables = 150;    ///< L

class HostPart {
 public:
  /// `keys` and `values` [kKvHeads, capacity, kDim] are memory of the caller's, who puts the rows
  /// of tokens there before they are taken.
  HostPart(const SimHash& family, bf16* keys, bf16* values, TokenId capacity);

  /// Where the row of a token begins in both.
  [[nodiscard]] std::size_t row(int kv_head, TokenId token) const {
    return (static_cast<std::size_t>(kv_head) * static_cast<std::size_t>(capacity_) +
            static_cast<std::size_t>(token)) *
           kDim;
  }

  /// The first tokens, with the centres of their hashes.
  [[nodiscard]] Status begin(const HashedKeys& hashes);
  /// The tokens that follow.
  [[nodiscard]] Status append(const HashedKeys& hashes);
  /// Tokens that it has.
  [[nodiscard]] TokenRange tokens() const { return tables_.indexed(); }

  /// Attention to them, drawn by the codes [kQueryHeads, kTables] of the queries [kQueryHeads,
  /// kDim], to states().
  [[nodiscard]] Status attend(std::span<const float> queries, std::span<const Code> codes);
  /// To all of them.
  [[nodiscard]] Status attend_exactly(std::span<const float> queries);
  [[nodiscard]] std::span<AttentionState> states() { return states_; }

  /// What it computes with.
  [[nodiscard]] static const char* backend();
  /// Of tables, keys and values.
  [[nodiscard]] std::size_t bytes() const;

 private:
  template <class Plan>
  Status run(const Plan& plan, std::span<const float> queries, std::span<const Code> codes);

  const bf16* keys_;
  const bf16* values_;
  TokenId capacity_;
  Collisions sampler_;
  BucketTables<SimHash> tables_;
  std::unique_ptr<ThreadPool> pool_;
  std::vector<float> out_;
  std::vector<AttentionState> states_;
  std::vector<std::byte> workspace_;
};

}  // namespace magicpig::hybrid
