// SPDX-License-Identifier: Apache-2.0
// Settings as the programs' users write them: "signatures bits=2 rows=0.04".
#pragma once

#include <array>
#include <charconv>
#include <cstddef>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>

#include "settings.hpp"

namespace magicpig::llama {

inline constexpr std::array<std::pair<std::string_view, Method>, 6> kMethods{
    {{"exact", Method::kExact},
     {"signatures", Method::kSignatures},
     {"tables", Method::kTables},
     {"topk", Method::kTopK},
     {"quest", Method::kQuest},
     {"uniform", Method::kUniform}}};

/// The engine's own attention.
inline constexpr std::string_view kEngine = "engine";
/// What others are compared with: that, and exact attention.
[[nodiscard]] inline bool is_reference(std::string_view spec) {
  return spec == kEngine || spec == "exact";
}

template <class Number>
Number number_of(const std::string& text, const std::string& name) {
  Number value{};
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size()) {
    throw std::runtime_error(name + "=" + text + " is not a number");
  }
  return value;
}

[[nodiscard]] inline Method method_of(std::string_view name) {
  for (const auto& [known, method] : kMethods) {
    if (known == name) return method;
  }
  std::string list;
  for (const auto& [known, method] : kMethods) list += " " + std::string(known);
  throw std::runtime_error("method \"" + std::string(name) + "\" is none of" + list);
}

/// A method and what `base` is to be changed in: rows, bits, K, L, page. Throws std::runtime_error.
[[nodiscard]] inline Settings settings_of(const std::string& spec, const Settings& base) {
  std::istringstream words(spec);
  std::string word;
  words >> word;
  Settings settings = base;
  settings.method = method_of(word);
  while (words >> word) {
    const std::size_t equals = word.find('=');
    const std::string name = word.substr(0, equals);
    const std::string value = equals == std::string::npos ? "" : word.substr(equals + 1);
    if (name == "rows") {
      settings.rows = number_of<double>(value, name);
    } else if (name == "bits") {
      settings.bits = number_of<int>(value, name);
    } else if (name == "K") {
      settings.table_bits = number_of<int>(value, name);
    } else if (name == "L") {
      settings.tables = number_of<int>(value, name);
    } else if (name == "page") {
      settings.page = number_of<int>(value, name);
    } else {
      throw std::runtime_error("\"" + word + "\" in \"" + spec +
                               "\" sets none of rows bits K L page");
    }
  }
  return settings;
}

}  // namespace magicpig::llama
