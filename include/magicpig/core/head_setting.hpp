// SPDX-License-Identifier: Apache-2.0
// How the middle of one KV head is read: what a profile says of each head.
#pragma once

#include <cstddef>
#include <span>

#include "magicpig/core/error.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// What a KV head has for an index.
enum class HeadKind {
  kExact,              ///< none: every token is attended to
  kUniform,            ///< none: tokens are drawn alike
  kSignatures,         ///< codes in a random rotation
  kTrainedSignatures,  ///< codes trained on its keys
  kTables,             ///< hash tables: tokens that collide with the query in some of them
};

inline constexpr int kMaxHashFunctions = 15;  ///< of a table, K
inline constexpr int kMaxHashTables = 1024;   ///< L

/// The way of one KV head. A profile is one of these for each KV head of a layer.
struct HeadSetting {
  HeadKind kind = HeadKind::kExact;
  int bits = 0;         ///< of signatures, per dimension, 1 to 4
  double budget = 0.0;  ///< rows, as a fraction of the indexed tokens, in (0, 1]; of kUniform and
                        ///< signatures
  double temperature = 0.0;   ///< of signatures: SignatureSamplerConfig::temperature
  double certain = 0.0;       ///< of signatures: SignatureSamplerConfig::certain
  bool value_norms = true;    ///< of signatures: whether norms of values count in a token's score
  int functions = 0;          ///< of tables: K, hash functions of each, 1 to kMaxHashFunctions
  int tables = 0;             ///< of tables: L, how many there are, 1 to kMaxHashTables
  int min_collisions = 2;     ///< of tables: CollisionConfig::min_collisions, t
  int probe_radius = 0;       ///< of tables: CollisionConfig::probe_radius, r
  double uniform_part = 0.0;  ///< of tables: the budget of Defensive, as a fraction of the indexed
                              ///< tokens, in [0, 1]; 0 for collisions alone

  [[nodiscard]] constexpr bool has_codes() const {
    return kind == HeadKind::kSignatures || kind == HeadKind::kTrainedSignatures;
  }
  [[nodiscard]] constexpr bool has_index() const {
    return has_codes() || kind == HeadKind::kTables;
  }
  /// Whether heads with these two can have the same codes or tables.
  [[nodiscard]] constexpr bool shares_index(const HeadSetting& other) const {
    if (!has_index()) return !other.has_index();
    if (kind != other.kind) return false;
    return has_codes() ? bits == other.bits && value_norms == other.value_norms
                       : functions == other.functions && tables == other.tables;
  }
  [[nodiscard]] constexpr bool has_budget() const {
    return kind == HeadKind::kUniform || has_codes();
  }
  friend constexpr bool operator==(const HeadSetting&, const HeadSetting&) = default;
};

/// As check_head(), of tables.
[[nodiscard]] inline Status check_head_tables(const HeadSetting& head, int kv_head) noexcept {
  const auto check = [kv_head](const char* name, int value, int least, int most) {
    if (value >= least && value <= most) return Status();
    return Status::error(ErrorCode::kInvalidArgument, "KV head %d: %s %d must lie in [%d, %d]",
                         kv_head, name, value, least, most);
  };
  Status status = check("functions (K)", head.functions, 1, kMaxHashFunctions);
  if (status.ok()) status = check("tables (L)", head.tables, 1, kMaxHashTables);
  const int most = head.tables < 3 ? head.tables : 3;
  if (status.ok()) status = check("min_collisions (t)", head.min_collisions, 1, most);
  if (status.ok()) status = check("probe_radius (r)", head.probe_radius, 0, head.functions);
  if (!status.ok() || (head.uniform_part >= 0.0 && head.uniform_part <= 1.0)) return status;
  return Status::error(ErrorCode::kInvalidArgument,
                       "KV head %d: uniform_part %g must lie in [0, 1]", kv_head,
                       head.uniform_part);
}

/// Error: a value outside its bounds; `kv_head` is named in the message.
[[nodiscard]] inline Status check_head(const HeadSetting& head, int kv_head) noexcept {
  const auto outside = [kv_head](const char* name, double value, const char* bounds) {
    return Status::error(ErrorCode::kInvalidArgument, "KV head %d: %s %g must lie in %s", kv_head,
                         name, value, bounds);
  };
  if (head.kind == HeadKind::kExact) return Status();
  if (head.kind == HeadKind::kTables) return check_head_tables(head, kv_head);
  if (!(head.budget > 0.0 && head.budget <= 1.0)) return outside("budget", head.budget, "(0, 1]");
  if (!head.has_codes()) return Status();
  if (head.bits < 1 || head.bits > 4) return outside("bits", head.bits, "[1, 4]");
  if (!(head.temperature >= 0.0 && head.temperature <= 4.0)) {
    return outside("temperature", head.temperature, "[0, 4]");
  }
  if (!(head.certain >= 0.0 && head.certain < 1.0)) {
    return outside("certain", head.certain, "[0, 1)");
  }
  return Status();
}

/// Errors: as check_head(), and a profile of other KV heads than `kv_heads`.
[[nodiscard]] inline Status check_profile(std::span<const HeadSetting> profile,
                                          int kv_heads) noexcept {
  if (kv_heads < 1 || profile.size() != static_cast<std::size_t>(kv_heads)) {
    return Status::error(ErrorCode::kShapeMismatch,
                         "a profile of %zu KV heads does not fit keys of %d", profile.size(),
                         kv_heads);
  }
  for (int h = 0; h < kv_heads; ++h) {
    const Status status = check_head(profile[static_cast<std::size_t>(h)], h);
    if (!status.ok()) return status;
  }
  return Status();
}

}  // namespace magicpig::inline MAGICPIG_ABI
