// SPDX-License-Identifier: Apache-2.0
// The registry of methods: one entry each, with the settings that it is measured at.
#pragma once

#include <functional>
#include <span>
#include <string>
#include <vector>

#include "magicpig/core/error.hpp"
#include "profile.hpp"

namespace magicpig::bench {

class Trial;

/// One setting of a method: run() makes a sampler and calls Trial::decode with it.
struct Setting {
  std::string label;
  bool random = true;  ///< whether seeds make a difference; if not, one is enough
  std::function<Status(Trial&)> run;
};

/// An entry of the registry; `settings` takes the rows of --rows, as fractions of the middle.
struct Method {
  const char* name;
  const char* summary;
  std::vector<Setting> (*settings)(std::span<const double> rows);
  bool needs_weights = false;  ///< of --learned
};

/// All methods, in the order of the table.
[[nodiscard]] std::span<const Method> all_methods();

/// The method of a profile, which is none of all_methods(): it has one setting, of `profile`.
inline constexpr Method kProfileMethod{
    .name = "profile", .summary = "each KV head as --profile says", .settings = nullptr};
[[nodiscard]] Setting profile_setting(Profile profile);

/// The shares of the softmax that selections by mass are measured at.
inline constexpr double kTopP[] = {0.5, 0.7, 0.8, 0.9, 0.95};

// What the entries refer to; a file of its own for each kind of index, so that they compile side by
// side.
[[nodiscard]] std::vector<Setting> exact_settings(std::span<const double> rows);
[[nodiscard]] std::vector<Setting> top_k_settings(std::span<const double> rows);
[[nodiscard]] std::vector<Setting> top_p_settings(std::span<const double> rows);
[[nodiscard]] std::vector<Setting> uniform_settings(std::span<const double> rows);
[[nodiscard]] std::vector<Setting> multinomial_settings(std::span<const double> rows);
[[nodiscard]] std::vector<Setting> poisson_settings(std::span<const double> rows);
[[nodiscard]] std::vector<Setting> published_settings(std::span<const double> rows);
[[nodiscard]] std::vector<Setting> table_settings(std::span<const double> rows);
[[nodiscard]] std::vector<Setting> cross_polytope_settings(std::span<const double> rows);
[[nodiscard]] std::vector<Setting> signature_settings(std::span<const double> rows);
[[nodiscard]] std::vector<Setting> trained_settings(std::span<const double> rows);
[[nodiscard]] std::vector<Setting> signature_draw_settings(std::span<const double> rows);
[[nodiscard]] std::vector<Setting> estimated_top_p_settings(std::span<const double> rows);
[[nodiscard]] std::vector<Setting> pq_settings(std::span<const double> rows);
[[nodiscard]] std::vector<Setting> quest_settings(std::span<const double> rows);
[[nodiscard]] std::vector<Setting> socket_settings(std::span<const double> rows);
[[nodiscard]] std::vector<Setting> vattention_settings(std::span<const double> rows);
[[nodiscard]] std::vector<Setting> uniform_tail_settings(std::span<const double> rows);
[[nodiscard]] std::vector<Setting> learned_settings(std::span<const double> rows);
[[nodiscard]] std::vector<Setting> double_sparsity_settings(std::span<const double> rows);
[[nodiscard]] std::vector<Setting> ivf_settings(std::span<const double> rows);

}  // namespace magicpig::bench
