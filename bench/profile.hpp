// SPDX-License-Identifier: Apache-2.0
// Profiles as JSON: how each KV head of each layer is read.
#pragma once

#include <array>
#include <cstddef>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <set>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "magicpig/core/error.hpp"
#include "magicpig/core/head_setting.hpp"

namespace magicpig::bench {

/// The settings of a layer's KV heads.
struct LayerProfile {
  std::string name;  ///< of the capture: its file's stem
  std::vector<HeadSetting> heads;
};

/// A profile of several layers.
struct Profile {
  std::vector<LayerProfile> layers;

  /// Error: no layer of that name.
  [[nodiscard]] Result<const LayerProfile*> layer(const std::string& name) const {
    for (const LayerProfile& layer : layers) {
      if (layer.name == name) return &layer;
    }
    return Status::error(ErrorCode::kInvalidArgument, "the profile has no layer \"%.100s\"",
                         name.c_str());
  }
};

inline constexpr std::array<std::pair<HeadKind, const char*>, 5> kHeadKinds{
    {{HeadKind::kExact, "exact"},
     {HeadKind::kUniform, "uniform"},
     {HeadKind::kSignatures, "signatures"},
     {HeadKind::kTrainedSignatures, "trained_signatures"},
     {HeadKind::kTables, "tables"}}};

[[nodiscard]] inline const char* name_of(HeadKind kind) {
  for (const auto& [own, name] : kHeadKinds) {
    if (own == kind) return name;
  }
  return "";
}

/// A field that is a whole number, and what it may be at all.
struct WholeNumber {
  const char* name;
  int HeadSetting::*member;
  int least;
  int most;
};

inline constexpr WholeNumber kBits{"bits", &HeadSetting::bits, 1, 4};
inline constexpr std::array<WholeNumber, 4> kTableFields{
    {{"functions", &HeadSetting::functions, 1, kMaxHashFunctions},
     {"tables", &HeadSetting::tables, 1, kMaxHashTables},
     {"min_collisions", &HeadSetting::min_collisions, 1, 3},
     {"probe_radius", &HeadSetting::probe_radius, 0, kMaxHashFunctions}}};

/// {"profile": 1, "layers": [{"name": ..., "kv_heads": [{"kind": "trained_signatures", "bits": 1,
/// "budget": 0.02, "temperature": 0.75, "certain": 0, "value_norms": true}, {"kind": "tables",
/// "functions": 10, "tables": 150, "min_collisions": 2, "probe_radius": 0, "uniform_part": 0.005},
/// {"kind": "uniform", "budget": 0.02}, {"kind": "exact"}]}]}, and `made_with` beside it.
[[nodiscard]] inline std::string to_json(const Profile& profile,
                                         const nlohmann::ordered_json& made_with = {}) {
  nlohmann::ordered_json layers = nlohmann::ordered_json::array();
  for (const LayerProfile& layer : profile.layers) {
    nlohmann::ordered_json heads = nlohmann::ordered_json::array();
    for (const HeadSetting& setting : layer.heads) {
      nlohmann::ordered_json head{{"kind", name_of(setting.kind)}};
      if (setting.has_codes()) head["bits"] = setting.bits;
      if (setting.has_budget()) head["budget"] = setting.budget;
      if (setting.has_codes()) {
        head["temperature"] = setting.temperature;
        head["certain"] = setting.certain;
        head["value_norms"] = setting.value_norms;
      }
      if (setting.kind == HeadKind::kTables) {
        for (const WholeNumber& field : kTableFields) head[field.name] = setting.*field.member;
        head["uniform_part"] = setting.uniform_part;
      }
      heads.push_back(head);
    }
    layers.push_back({{"name", layer.name}, {"kv_heads", heads}});
  }
  nlohmann::ordered_json all{{"profile", 1}, {"layers", layers}};
  if (!made_with.empty()) all["made_with"] = made_with;
  return all.dump(1) + "\n";
}

/// Reads what to_json() writes, one field after the other.
class ProfileReader {
 public:
  /// Errors name the layer, KV head and field at fault: no JSON, another version, a layer twice or
  /// without KV heads, a field that is missing, of another type, unknown, or outside its bounds.
  [[nodiscard]] static Result<Profile> parse(const std::string& text) {
    const Json all = Json::parse(text, nullptr, false);
    if (all.is_discarded()) return error("this is not JSON");
    if (!all.is_object() || !all.contains("profile") || all["profile"] != 1) {
      return error("\"profile\" is not 1, the version that can be read");
    }
    if (!all.contains("layers") || !all["layers"].is_array()) {
      return error("\"layers\" is not a list");
    }
    Profile profile;
    std::set<std::string> names;
    for (const Json& entry : all["layers"]) {
      if (!entry.is_object() || !entry.contains("name") || !entry["name"].is_string()) {
        return error("a layer has no \"name\"");
      }
      LayerProfile layer{.name = entry["name"].get<std::string>(), .heads = {}};
      if (!names.insert(layer.name).second) return error("two layers are \"" + layer.name + "\"");
      const Status status = read_heads(entry, layer);
      if (!status.ok()) {
        return error("layer \"" + layer.name + "\": " + status.message());
      }
      profile.layers.push_back(std::move(layer));
    }
    return profile;
  }

 private:
  using Json = nlohmann::json;

  static Status error(const std::string& what) {
    return Status::error(ErrorCode::kInvalidArgument, "%.200s", what.c_str());
  }

  static Status read_heads(const Json& entry, LayerProfile& layer) {
    if (!entry.contains("kv_heads") || !entry["kv_heads"].is_array() || entry["kv_heads"].empty()) {
      return error("\"kv_heads\" is not a list of settings");
    }
    for (const Json& head : entry["kv_heads"]) {
      const auto number = static_cast<int>(layer.heads.size());
      HeadSetting setting;
      Status status = read_head(head, setting);
      if (!status.ok()) return error("KV head " + std::to_string(number) + ": " + status.message());
      status = check_head(setting, number);
      if (!status.ok()) return status;
      layer.heads.push_back(setting);
    }
    return Status();
  }

  static Status read_head(const Json& head, HeadSetting& setting) {
    if (!head.is_object() || !head.contains("kind") || !head["kind"].is_string()) {
      return error("no \"kind\"");
    }
    const auto kind = head["kind"].get<std::string>();
    bool known = false;
    for (const auto& [own, name] : kHeadKinds) {
      if (kind == name) setting.kind = own;
      known |= kind == name;
    }
    if (!known) return error("no kind is called \"" + kind + "\"");
    std::set<std::string> wanted{"kind"};
    if (setting.has_budget()) wanted.insert("budget");
    if (setting.has_codes()) wanted.insert({"bits", "temperature", "certain", "value_norms"});
    if (setting.kind == HeadKind::kTables) {
      wanted.insert({"functions", "tables", "min_collisions", "probe_radius", "uniform_part"});
    }
    for (const auto& [name, value] : head.items()) {
      if (wanted.count(name) == 0) return error("\"" + name + "\" says nothing about " + kind);
      if (name == "kind") continue;
      const Status status = read_field(name, value, setting);
      if (!status.ok()) return status;
    }
    for (const char* name : {"budget", "bits", "functions", "tables"}) {
      if (wanted.count(name) != 0 && !head.contains(name)) {
        return error(std::string("no \"") + name + "\"");
      }
    }
    return Status();
  }

  static Status read_field(const std::string& name, const Json& value, HeadSetting& setting) {
    if (name == "value_norms") {
      if (!value.is_boolean()) return error("\"value_norms\" is neither true nor false");
      setting.value_norms = value.get<bool>();
      return Status();
    }
    if (!value.is_number()) return error("\"" + name + "\" is not a number");
    const auto number = value.get<double>();
    if (name == "budget") setting.budget = number;
    if (name == "temperature") setting.temperature = number;
    if (name == "certain") setting.certain = number;
    if (name == "uniform_part") setting.uniform_part = number;
    if (name == kBits.name) return read_whole(kBits, value, setting);
    for (const WholeNumber& field : kTableFields) {
      if (name == field.name) return read_whole(field, value, setting);
    }
    return Status();
  }

  static Status read_whole(const WholeNumber& field, const Json& value, HeadSetting& setting) {
    const auto number = value.get<double>();
    if (!(number >= field.least && number <= field.most && value.is_number_integer())) {
      return error(std::string("\"") + field.name + "\" is not a whole number from " +
                   std::to_string(field.least) + " to " + std::to_string(field.most));
    }
    setting.*field.member = static_cast<int>(number);
    return Status();
  }
};

/// Errors: those of ProfileReader::parse(), and a file that cannot be read; the path is part of the
/// message.
[[nodiscard]] inline Result<Profile> read_profile(const std::string& path) {
  std::FILE* file = std::fopen(path.c_str(), "rb");
  std::string text;
  std::array<char, 4096> chunk{};
  bool good = file != nullptr;
  for (std::size_t got = chunk.size(); good && got == chunk.size();) {
    got = std::fread(chunk.data(), 1, chunk.size(), file);
    text.append(chunk.data(), got);
    good = std::ferror(file) == 0;
  }
  if (file != nullptr) (void)std::fclose(file);
  Result<Profile> profile =
      good ? ProfileReader::parse(text)
           : Result<Profile>(Status::error(ErrorCode::kInvalidArgument, "cannot be read"));
  if (profile.ok()) return profile;
  return Status::error(profile.status().code(), "%.100s: %s", path.c_str(),
                       profile.status().message());
}

}  // namespace magicpig::bench
